"""The memory-bounded model cache of one worker: which models are resident, which load, which go.

``ModelCache`` decides and counts; it loads and unloads nothing. Its caller acts on the answers: it drops the victims
of a ``Load`` first, then loads, then says ``loaded`` or ``failed``.
"""

from __future__ import annotations

import math
from collections import OrderedDict, deque
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

from serve_app.core.cache.accounting import CacheAccounting, CacheEntry, evictable, idle
from serve_app.core.cache.decisions import (
    HIT,
    JOIN,
    Answer,
    Grant,
    Hit,
    Join,
    Load,
    Preload,
    Reject,
    RejectReason,
    Shed,
    Wait,
)
from serve_app.core.catalog import ModelProfile
from serve_app.core.lazy_heap import HeapEntry
from serve_app.core.policies.base import EvictionPolicy
from serve_app.core.vocabulary import ModelState, ResidentModel
from serve_app.errors import Conflict, NotFound


@dataclass(frozen=True, slots=True)
class _Failure:
    detail: str
    until_s: float


@dataclass(frozen=True, slots=True)
class _Advice:
    model: ModelProfile
    until_s: float
    insist: bool


@dataclass(slots=True)
class CacheCounters:
    """What has happened since the cache was made."""

    requests: int = 0
    loads: int = 0
    load_failures: int = 0
    #: Displaced by another model, or by less memory.
    evictions: int = 0
    #: Gone for any other reason: by hand, on advice, idle for too long, or no longer in the catalogue.
    unloads: int = 0
    #: Loads on nobody's request (not in ``loads``), and those of them that left again before any request came.
    preloads: int = 0
    wasted_preloads: int = 0


class ModelCache:
    """Decides what is resident in ``capacity_bytes`` of memory.

    | state   | event                         | next    |
    |---------|-------------------------------|---------|
    | absent  | ``request`` -> ``Load``       | LOADING |
    | LOADING | ``request`` -> ``Join``       | LOADING |
    | LOADING | ``loaded``                    | READY   |
    | LOADING | ``failed``                    | absent  |
    | READY   | ``request`` -> ``Hit``        | READY   |
    | READY   | victim of a ``Load``, or ``Shed`` | absent |
    | READY   | ``unload``, ``withdraw``      | absent  |
    | absent  | ``next_preload`` -> ``Preload`` | LOADING |

    A preload that nobody has joined yet may be a victim while it is still LOADING, so that no request ever waits for
    memory that was taken on a guess; ``loaded`` and ``failed`` of a load whose model has gone are to be left out.

    A request whose victims are all in use waits in line. The first in line makes way for itself: the models that it
    will displace take no new requests until it has its place, so that a large model cannot starve. Where memory was
    taken away (``resize``), models make way for nothing in the same manner. Whenever ``must_shed`` after an event, the
    caller asks ``shed`` what is to go.

    Args:
        capacity_bytes: what all models, resident and loading, may take together.
        policy: ranks the models; see ``policies.py``.
        max_loads: loads for requests under way at the same time.
        max_preloads: loads on nobody's request under way at the same time, beside the others.
        max_waiting: requests in line; more are rejected.
        failure_memory_s: how long a failed load is answered from memory.
        pinned: models that are never victims.
    """

    #: Advice waits for background loads that are under way, but no longer than this.
    ADVICE_S = 10.0

    def __init__(
        self,
        *,
        capacity_bytes: int,
        policy: EvictionPolicy,
        max_loads: int = 2,
        max_preloads: int = 1,
        max_waiting: int = 256,
        failure_memory_s: float = 5.0,
        pinned: Collection[str] = (),
    ) -> None:
        _require_capacity(capacity_bytes)
        if max_loads < 1:
            raise ValueError(f"max_loads must be at least 1, not {max_loads}")
        if max_preloads < 0:
            raise ValueError(f"max_preloads must not be negative, not {max_preloads}")
        self.counters = CacheCounters()
        self._policy = policy
        policy.preloading = max_preloads > 0
        self._books = CacheAccounting(capacity_bytes, policy)
        #: The same as in the books: every request looks here.
        self._entries = self._books.entries
        self._max_loads = max_loads
        self._max_preloads = max_preloads
        self._max_waiting = max_waiting
        self._failure_memory_s = failure_memory_s
        self._pinned = frozenset(pinned)
        self._loading = 0
        self._preloading = 0
        self._failures: dict[str, _Failure] = {}
        #: Unloaded by hand and not asked for since: nobody but a request may bring them back.
        self._put_out: set[str] = set()
        #: Unloaded on advice, or because nobody used them, and not asked for since: only who insists may, too.
        self._withdrawn: set[str] = set()
        #: No longer in the catalogue.
        self._gone: set[str] = set()
        self._known: dict[str, ModelProfile] = {}
        self._forward_s: Mapping[str, float] = {}
        self._advice: deque[_Advice] = deque()
        self._orders: deque[_Advice] = deque()
        self._waiting: OrderedDict[int, ModelProfile] = OrderedDict()
        self._tickets = 0

    # Events

    def request(self, model: ModelProfile, now: float) -> Answer | Wait:
        """A user asks for ``model``. ``Hit``, ``Join`` and ``Load`` pin it until ``finish``."""
        self.counters.requests += 1
        self._policy.on_request(model, now)
        return self._present(model.model_id, now) or self._enter(model, now)

    def preload(self, model: ModelProfile, now: float) -> Answer | Wait:
        """Like ``request``, for a load that nobody is waiting for: the policy does not count it as demand."""
        return self._present(model.model_id, now) or self._enter(model, now)

    def next_preload(self, now: float) -> Preload | None:
        """What to load in the background now, as the policy wishes or others advise.

        Ask again until None, and at ``review_s``.
        """
        if not self._may_preload():
            return None
        if (ordered := self._first_possible(self._orders, now)) is not None:
            return ordered
        for model in self._policy.wishes(now, -self._books.excess_bytes):
            preload = self._preload(model, now, self._policy.worthwhile)
            if preload is not None:
                return preload
        return self._first_possible(self._advice, now)

    def place(self, model: ModelProfile, now: float, *, insist: bool = False) -> Preload | None:
        """Load ``model`` in the background on the advice of others; None where that is not possible now.

        It may be here already, background loads or requests may be in line before it, or something that is in use, or
        worth as much to the policy, would have to go. Nothing has changed then. To ``insist`` is to ask for it whatever
        the policy finds it worth.
        """
        return self._preload(model, now, _anyway if insist else self._more_useful) if self._may_preload() else None

    def advise(self, model: ModelProfile, now: float, *, insist: bool = False) -> None:
        """Let ``next_preload`` ``place`` the model as soon as background loads that are under way have ended."""
        (self._orders if insist else self._advice).append(_Advice(model, now + self.ADVICE_S, insist))

    def know(self, models: Iterable[ModelProfile], now: float) -> None:
        """Tell the policy what can be asked for at all, so that it may preload what nobody has asked for yet."""
        models = tuple(models)
        self._known |= {model.model_id: model for model in models}
        self._gone -= self._known.keys()
        self._policy.on_catalog(models, now)

    def loaded(self, model_id: str, now: float) -> tuple[Grant, ...]:
        """The load of ``model_id`` has ended well."""
        entry = self._loading_entry(model_id)
        entry.state = ModelState.READY
        self._load_ended(entry)
        return self._advance(now)

    def failed(self, model_id: str, detail: str, now: float) -> tuple[Grant, ...]:
        """The load of ``model_id`` has failed: its bytes are free and all who waited for it have lost their pin."""
        entry = self._loading_entry(model_id)
        self._load_ended(entry)
        self.counters.load_failures += 1
        self.cannot_load(model_id, detail, now)
        self._remove(entry)
        self._policy.on_unload(entry.model, now)
        return self._advance(now)

    def finish(self, model_id: str, now: float) -> tuple[Grant, ...]:
        """One request that was answered ``Hit``, ``Join`` or ``Load`` no longer uses the model."""
        entry = self._entries.get(model_id)
        if entry is None or entry.uses < 1:
            raise ValueError(f"{model_id} is finished more often than it was requested")
        entry.uses -= 1
        entry.used_s = now
        return self._advance(now) if self._waiting and entry.uses == 0 else ()

    def unload(self, model_id: str, now: float) -> tuple[Grant, ...]:
        """Take a resident model out by hand; it stays away until a request comes for it.

        Raises:
            NotFound: it is not resident.
            Conflict: it is pinned, in use or still loading.
        """
        entry = self._entries.get(model_id)
        if entry is None:
            raise NotFound(f"model {model_id} is not loaded here; nothing to unload")
        if entry.pinned:
            raise Conflict(f"model {model_id} is pinned; unpin it in the catalogue before unloading it")
        if entry.protected:
            raise Conflict(f"model {model_id} has no copies to spare; lower its min_copies before unloading it")
        if entry.state is ModelState.LOADING or entry.uses:
            raise Conflict(f"model {model_id} is in use; unload it when its requests have ended")
        self._put_out.add(model_id)
        self._unload(entry, now)
        return self._advance(now)

    def withdraw(self, model_id: str, now: float) -> tuple[Grant, ...] | None:
        """Take a model out on the advice of others; None, and nothing has changed, if it is pinned, in use or absent.

        Neither the policy nor advice brings it back before it is asked for again, but who insists does.
        """
        entry = self._entries.get(model_id)
        if entry is None or not _spare(entry):
            return None
        self._withdrawn.add(model_id)
        self._unload(entry, now)
        return self._advance(now)

    def withdraw_unused(self, since_s: float, now: float) -> Shed:
        """``withdraw`` every model that nobody has asked for since then."""
        unused = [entry for entry in self._entries.values() if entry.used_s <= since_s and _spare(entry)]
        for entry in unused:
            self._withdrawn.add(entry.model.model_id)
            self._unload(entry, now)
        return Shed(tuple(entry.model.model_id for entry in unused), self._advance(now) if unused else ())

    def give_up(self, ticket: int, now: float) -> tuple[Grant, ...]:
        """The request behind ``ticket`` no longer waits; unknown tickets are ignored."""
        if ticket not in self._waiting:
            return ()
        self._leave(ticket, now)
        return self._advance(now)

    def cannot_load(self, model_id: str, detail: str, now: float) -> None:
        """Remember that a load would fail, without having displaced anything for it."""
        self._failures[model_id] = _Failure(detail, now + self._failure_memory_s)

    def forget_failure(self, model_id: str) -> None:
        """Let the next request for ``model_id`` try to load it again at once."""
        self._failures.pop(model_id, None)

    def forward_costs(self, forward_s: Mapping[str, float]) -> None:
        """Tell the policy which models others hold, and the extra seconds that forwarding there costs."""
        self._forward_s = forward_s
        self._policy.on_forward_costs(forward_s)

    def protect(self, model_ids: Sequence[str], now: float) -> None:
        """Pin those of these models that are here, and no others, beside what is pinned for good.

        They are the copies that the cluster cannot spare. Together they take half of the memory that is not pinned for
        good, the first ones first, and the one that exceeds it: else a model larger than that would never stay. They
        let go of it for a request that could never be served otherwise.
        """
        room_bytes = self.capacity_bytes - self._books.pinned_bytes
        largest_bytes = max((model.size_bytes for model in self._waiting.values()), default=0)
        self._books.protect(model_ids, room_bytes // 2, room_bytes - largest_bytes, now)

    # Changes of the configuration

    def resize(self, capacity_bytes: int, now: float) -> Shed:
        """Take memory away, or give more; what is in use meanwhile stays until it is idle.

        Raises:
            ValueError: what is pinned for good needs more.
        """
        _require_capacity(capacity_bytes)
        if capacity_bytes < self._books.pinned_bytes:
            raise ValueError(f"{capacity_bytes} bytes are less than the {self._books.pinned_bytes} of pinned models")
        self._books.capacity_bytes = capacity_bytes
        self._books.release(0, now)
        return self.shed(now)

    def reserve(self, reserved_bytes: int, now: float) -> Shed:
        """Leave so much of the capacity to what is no model; what is in use meanwhile stays until it is idle.

        No request is refused for it: it yields to what is pinned or kept, and to a model that does not fit beside it,
        which then goes as soon as it is idle.
        """
        if reserved_bytes < 0:
            raise ValueError(f"reserved_bytes must not be negative, not {reserved_bytes}")
        self._books.reserved_bytes = reserved_bytes
        return self.shed(now)

    def use(self, policy: EvictionPolicy, now: float) -> None:
        """Rank by another policy, which is told of everything that it cannot have seen."""
        policy.preloading = self._max_preloads > 0
        self._policy = policy
        policy.on_catalog(tuple(self._known.values()), now)
        policy.on_forward_costs(self._forward_s)
        for entry in sorted(self._entries.values(), key=lambda entry: entry.used_s):
            policy.on_load(entry.model, now)
        self._books.use(policy, now)

    def offer(self, models: Iterable[ModelProfile], pinned: Collection[str], now: float) -> Shed:
        """The catalogue is now this one: what it no longer has goes when it is idle."""
        offered = {model.model_id: model for model in models}
        self._gone = (self._gone | self._known.keys() | self._entries.keys()) - offered.keys()
        self._known = offered
        self._pinned = frozenset(pinned)
        for model_id, entry in self._entries.items():
            self._books.pin(entry, model_id in self._pinned, now)
        self._policy.on_catalog(tuple(offered.values()), now)
        return self.shed(now)

    @property
    def must_shed(self) -> bool:
        """Whether something that is resident should go as soon as it is idle."""
        return self._books.excess_bytes > 0 or not self._gone.isdisjoint(self._entries)

    def shed(self, now: float) -> Shed:
        """What goes now because its memory was taken away, or it is no longer in the catalogue."""
        # Even what is kept: it is no longer required of anybody.
        gone = [entry for model_id, entry in self._entries.items() if model_id in self._gone and _settled(entry)]
        for entry in gone:
            self._unload(entry, now)
        chosen = self._books.take_least_useful(self._books.excess_bytes, now, idle)
        self._evict(chosen, now)
        if self._books.excess_bytes > 0:
            self._make_way(now)
        elif not self._waiting:
            # Memory was taken away and given back before what made way had ended.
            self._books.drain(())
        victims = (*(entry.model for entry in gone), *(ranked.model for ranked in chosen))
        return Shed(tuple(model.model_id for model in victims), self._advance(now))

    # Queries

    @property
    def capacity_bytes(self) -> int:
        """What all models, resident and loading, may take together."""
        return self._books.capacity_bytes

    @property
    def reserved_bytes(self) -> int:
        """Of the capacity, what is left to what is no model."""
        return self._books.reserved_bytes

    @property
    def review_s(self) -> float:
        """When ``next_preload`` should be asked next though nothing else has happened; infinite if never."""
        if not self._may_preload():
            return math.inf
        return -math.inf if self._orders or self._advice else self._policy.review_s

    @property
    def used_bytes(self) -> int:
        """Bytes of all models, resident and loading."""
        return self._books.used_bytes

    @property
    def max_loads(self) -> int:
        """Loads for requests that may be under way at the same time."""
        return self._max_loads

    @property
    def waiting(self) -> int:
        """Requests in line for memory."""
        return len(self._waiting)

    def state(self, model_id: str) -> ModelState | None:
        """The state of a model, None when it is absent."""
        entry = self._entries.get(model_id)
        return entry.state if entry else None

    def models(self) -> tuple[ResidentModel, ...]:
        """The books: every model that takes up memory."""
        return tuple(
            ResidentModel(
                model_id=model_id,
                state=entry.state,
                size_bytes=entry.model.size_bytes,
                uses=entry.uses,
                unevictable=entry.unevictable,
                protected=entry.protected,
            )
            for model_id, entry in self._entries.items()
        )

    # Rules

    def _enter(self, model: ModelProfile, now: float) -> Answer | Wait:
        answer: Answer | None = self._refusal(model, now)
        if answer is None and not self._waiting:
            answer = self._place(model, now)
        return answer or self._queue(model, now)

    def _present(self, model_id: str, now: float) -> Hit | Join | None:
        entry = self._entries.get(model_id)
        if entry is None:
            return None
        if entry.draining:
            if self._waiting or self._books.excess_bytes > 0:
                return None
            # What it made way for has come to nothing.
            self._books.drain(())
        entry.uses += 1
        entry.used_s = now
        entry.speculative = False
        return HIT if entry.state is ModelState.READY else JOIN

    def _refusal(self, model: ModelProfile, now: float) -> Reject | None:
        failure = self._failures.get(model.model_id)
        if failure is not None and now < failure.until_s:
            return Reject(RejectReason.LOAD_FAILED, failure.detail, failure.until_s - now)
        free_bytes = self.capacity_bytes - self._books.pinned_bytes
        if model.size_bytes > free_bytes:
            return Reject(
                RejectReason.TOO_LARGE,
                f"model {model.model_id} needs {model.size_bytes} bytes, but only "
                f"{free_bytes} of {self.capacity_bytes} can be made free",
            )
        return None

    def _may_preload(self) -> bool:
        return self._preloading < self._max_preloads and not self._waiting

    def _first_possible(self, several: deque[_Advice], now: float) -> Preload | None:
        while several:
            advice = several.popleft()
            if now <= advice.until_s:
                preload = self.place(advice.model, now, insist=advice.insist)
                if preload is not None:
                    return preload
        return None

    def _preload(
        self,
        model: ModelProfile,
        now: float,
        worthwhile: Callable[[ModelProfile, Sequence[ModelProfile], float], bool],
    ) -> Preload | None:
        """Reserve room for ``model`` in the background, if what must go for it is idle and the load ``worthwhile``."""
        model_id = model.model_id
        if model_id in self._entries or model_id in self._put_out or model_id in self._gone:
            return None
        if model_id in self._withdrawn and worthwhile is not _anyway:
            return None
        failure = self._failures.get(model_id)
        if failure is not None and now < failure.until_s:
            return None
        # The reserve does not yield to a guess, which would go again at once.
        chosen = self._books.choose_victims(self._books.excess_bytes + model.size_bytes, now, idle)
        if chosen is None:
            return None
        if not worthwhile(model, [ranked.model for ranked in chosen], now):
            self._books.put_back(chosen, now)
            return None
        self._preloading += 1
        self.counters.preloads += 1
        return Preload(model, self._admit(model, chosen, now, uses=0, speculative=True))

    def _more_useful(self, model: ModelProfile, victims: Sequence[ModelProfile], now: float) -> bool:
        worth = self._policy.utility(model, now)
        return all(self._policy.utility(victim, now) < worth for victim in victims)

    def _place(self, model: ModelProfile, now: float) -> Load | None:
        """Reserve room for ``model`` if there is, or can be, enough of it now."""
        if self._loading >= self._max_loads or model.model_id in self._entries:
            return None
        self._books.release(model.size_bytes, now)
        chosen = self._books.choose_victims(self._books.missing_bytes(model.size_bytes), now, idle)
        if chosen is None:
            return None
        self._loading += 1
        self.counters.loads += 1
        return Load(self._admit(model, chosen, now, uses=1, speculative=False))

    def _admit(
        self, model: ModelProfile, victims: list[HeapEntry], now: float, *, uses: int, speculative: bool
    ) -> tuple[str, ...]:
        """Enter ``model`` into the books in the place of ``victims``; returns their names."""
        self._evict(victims, now)
        entry = CacheEntry(
            model=model,
            state=ModelState.LOADING,
            uses=uses,
            used_s=now,
            pinned=model.model_id in self._pinned,
            preload=speculative,
            speculative=speculative,
        )
        self._failures.pop(model.model_id, None)
        self._put_out.discard(model.model_id)
        self._withdrawn.discard(model.model_id)
        self._policy.on_load(model, now)
        self._books.enter(entry, now)
        return tuple(victim.model.model_id for victim in victims)

    def _evict(self, victims: list[HeapEntry], now: float) -> None:
        for victim in victims:
            self.counters.evictions += 1
            entry = self._entries[victim.model.model_id]
            if entry.state is ModelState.LOADING:
                self._load_ended(entry)
            self._remove(entry)
            self._policy.on_evict(victim.model, now)

    def _unload(self, entry: CacheEntry, now: float) -> None:
        self.counters.unloads += 1
        self._remove(entry)
        self._policy.on_unload(entry.model, now)

    def _queue(self, model: ModelProfile, now: float) -> Wait | Reject:
        if len(self._waiting) >= self._max_waiting:
            return Reject(RejectReason.QUEUE_FULL, f"{len(self._waiting)} requests already wait for memory", 1.0)
        self._tickets += 1
        self._waiting[self._tickets] = model
        if len(self._waiting) == 1:
            self._make_way(now)
        return Wait(self._tickets)

    def _make_way(self, now: float) -> None:
        """Let no new request onto the models that are to go, but onto all others.

        The first in line will displace them, or they are more than memory now holds.
        """
        first = next(iter(self._waiting.values()), None)
        chosen: list[HeapEntry] = []
        # One that is here and is to go displaces nothing: it stays if memory has become enough meanwhile.
        if first is not None and first.model_id not in self._entries:
            if self._loading >= self._max_loads:
                # It would have to wait with every byte free: nothing is gained by turning hits away meanwhile.
                return
            chosen = self._books.choose_victims(self._books.missing_bytes(first.size_bytes), now, evictable) or []
        if not chosen and self._books.excess_bytes > 0:
            chosen = self._books.take_least_useful(self._books.excess_bytes, now, evictable)
        self._books.put_back(chosen, now)
        self._books.drain(chosen)

    def _advance(self, now: float) -> tuple[Grant, ...]:
        """Answer everyone in line who can be answered now, in order of arrival."""
        if not self._waiting:
            return ()
        grants: list[Grant] = []
        while self._waiting:
            ticket, model = next(iter(self._waiting.items()))
            answer = self._present(model.model_id, now) or self._refusal(model, now) or self._place(model, now)
            if answer is None:
                self._make_way(now)
                grants.extend(self._grant_present(now))
                break
            self._leave(ticket, now)
            grants.append(Grant(ticket, model.model_id, answer))
        return tuple(grants)

    def _grant_present(self, now: float) -> list[Grant]:
        """Those further back need not wait for the first if their own model is there and stays."""
        grants = []
        for ticket, model in list(self._waiting.items()):
            answer = self._present(model.model_id, now)
            if answer is not None:
                self._leave(ticket, now)
                grants.append(Grant(ticket, model.model_id, answer))
        return grants

    def _leave(self, ticket: int, now: float) -> None:
        """Take a request out of the line; with the first in line goes what made way for it."""
        was_first = ticket == next(iter(self._waiting))
        del self._waiting[ticket]
        if was_first:
            self._books.drain([])
            if self._books.excess_bytes > 0:
                self._make_way(now)

    def _load_ended(self, entry: CacheEntry) -> None:
        if entry.preload:
            self._preloading -= 1
        else:
            self._loading -= 1

    def _remove(self, entry: CacheEntry) -> None:
        if entry.speculative:
            self.counters.wasted_preloads += 1
        self._books.remove(entry)

    def _loading_entry(self, model_id: str) -> CacheEntry:
        entry = self._entries.get(model_id)
        if entry is None or entry.state is not ModelState.LOADING:
            raise ValueError(f"{model_id} is not loading")
        return entry


def _spare(entry: CacheEntry) -> bool:
    return _settled(entry) and not entry.unevictable


def _settled(entry: CacheEntry) -> bool:
    return entry.state is ModelState.READY and not entry.uses


def _anyway(model: ModelProfile, victims: Sequence[ModelProfile], now: float) -> bool:
    return True


def _require_capacity(capacity_bytes: int) -> None:
    if capacity_bytes <= 0:
        raise ValueError(f"capacity_bytes must be positive, not {capacity_bytes}")
