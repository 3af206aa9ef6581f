"""The memory-bounded model cache of one worker: which models are resident, which load, which go.

``ModelCache`` decides and counts; it loads and unloads nothing. Its caller acts on the answers: it drops the victims
of a ``Load`` first, then loads, then says ``loaded`` or ``failed``.
"""

from __future__ import annotations

import enum
import math
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

from serve_app.core.catalog import ModelProfile
from serve_app.core.eviction_policy import EvictionPolicy
from serve_app.core.ranking import Ranked, Ranking
from serve_app.errors import Conflict, NotFound


class ModelState(enum.StrEnum):
    """Where a model is on its way through one worker."""

    LOADING = "loading"
    READY = "ready"


class RejectReason(enum.StrEnum):
    """Why a request cannot be taken."""

    TOO_LARGE = "too large"
    QUEUE_FULL = "queue full"
    LOAD_FAILED = "load failed"


@dataclass(frozen=True, slots=True)
class Hit:
    """The model is resident; it is pinned until ``finish``."""


@dataclass(frozen=True, slots=True)
class Join:
    """A load of the model is under way; it is pinned for this request too."""


@dataclass(frozen=True, slots=True)
class Load:
    """Unload ``victims`` (already out of the books), then load the model; its bytes are reserved."""

    victims: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Wait:
    """No feasible victim set exists now; a later ``Grant`` with this ticket brings the answer."""

    ticket: int


@dataclass(frozen=True, slots=True)
class Reject:
    """The request cannot be taken; nothing has changed."""

    reason: RejectReason
    detail: str
    retry_s: float = 0.0


Answer = Hit | Join | Load | Reject

#: They carry nothing, so one of each is enough.
_HIT, _JOIN = Hit(), Join()


@dataclass(frozen=True, slots=True)
class Preload:
    """Unload ``victims`` (already out of the books), then load ``model`` in the background; its bytes are reserved."""

    model: ModelProfile
    victims: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Grant:
    """The answer to a request that had to wait."""

    ticket: int
    model_id: str
    answer: Answer


@dataclass(frozen=True, slots=True, kw_only=True)
class ResidentModel:
    """One line of the cache's books."""

    model_id: str
    state: ModelState
    size_bytes: int
    uses: int
    pinned: bool


@dataclass(slots=True)
class _Entry:
    model: ModelProfile
    state: ModelState
    uses: int
    pinned: bool
    draining: bool = False
    #: Its load is, or was, on the policy's initiative.
    preload: bool = False
    #: And nobody has asked for it since.
    speculative: bool = False


@dataclass(frozen=True, slots=True)
class _Failure:
    detail: str
    until_s: float


@dataclass(slots=True)
class CacheCounters:
    """What has happened since the cache was made."""

    requests: int = 0
    loads: int = 0
    load_failures: int = 0
    evictions: int = 0
    unloads: int = 0
    #: Loads on the policy's initiative (not in ``loads``), and those of them that left again before any request came.
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
    | READY   | victim of a ``Load``          | absent  |
    | READY   | ``unload``                    | absent  |
    | absent  | ``next_preload`` -> ``Preload`` | LOADING |

    A preload that nobody has joined yet may be a victim while it is still LOADING, so that no request ever waits for
    memory that was taken on a guess; ``loaded`` and ``failed`` of a load whose model has gone are to be left out.

    A request whose victims are all in use waits in line. The first in line makes way for itself: the models that it
    will displace take no new requests until it has its place, so that a large model cannot starve.

    Args:
        capacity_bytes: what all models, resident and loading, may take together.
        policy: ranks the models; see ``policies.py``.
        max_loads: loads for requests under way at the same time.
        max_preloads: loads on the policy's initiative under way at the same time, beside the others.
        max_waiting: requests in line; more are rejected.
        failure_memory_s: how long a failed load is answered from memory.
        pinned: models that are never victims.
    """

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
        if capacity_bytes <= 0:
            raise ValueError(f"capacity_bytes must be positive, not {capacity_bytes}")
        if max_loads < 1:
            raise ValueError(f"max_loads must be at least 1, not {max_loads}")
        if max_preloads < 0:
            raise ValueError(f"max_preloads must not be negative, not {max_preloads}")
        self.capacity_bytes = capacity_bytes
        self.counters = CacheCounters()
        self._policy = policy
        policy.preloading = max_preloads > 0
        self._ranking = Ranking(policy.utility)
        self._max_loads = max_loads
        self._max_preloads = max_preloads
        self._max_waiting = max_waiting
        self._failure_memory_s = failure_memory_s
        self._pinned = frozenset(pinned)
        self._entries: dict[str, _Entry] = {}
        self._used_bytes = 0
        self._pinned_bytes = 0
        self._loading = 0
        self._preloading = 0
        self._draining: list[_Entry] = []
        self._failures: dict[str, _Failure] = {}
        #: Unloaded by hand and not asked for since: the policy may not bring them back.
        self._put_out: set[str] = set()
        self._waiting: OrderedDict[int, ModelProfile] = OrderedDict()
        self._tickets = 0

    # Events

    def request(self, model: ModelProfile, now: float) -> Answer | Wait:
        """A user asks for ``model``. ``Hit``, ``Join`` and ``Load`` pin it until ``finish``."""
        self.counters.requests += 1
        self._policy.on_request(model, now)
        return self._present(model.model_id) or self._enter(model, now)

    def preload(self, model: ModelProfile, now: float) -> Answer | Wait:
        """Like ``request``, for a load that nobody is waiting for: the policy does not count it as demand."""
        return self._present(model.model_id) or self._enter(model, now)

    def next_preload(self, now: float) -> Preload | None:
        """What to load in the background now on the policy's initiative; ask again until None, and at ``review_s``."""
        if self._preloading >= self._max_preloads or self._waiting:
            return None
        for model in self._policy.wishes(now, self.capacity_bytes - self._used_bytes):
            preload = self._preload(model, now, self._policy.worthwhile)
            if preload is not None:
                return preload
        return None

    def place(self, model: ModelProfile, now: float) -> Preload | None:
        """Load ``model`` in the background on the advice of others; None where that is not possible now.

        It may be here already, background loads or requests may be in line before it, or something that is in use, or
        worth as much to the policy, would have to go. Nothing has changed then.
        """
        if self._preloading >= self._max_preloads or self._waiting:
            return None
        return self._preload(model, now, self._more_useful)

    def know(self, models: Iterable[ModelProfile], now: float) -> None:
        """Tell the policy what can be asked for at all, so that it may preload what nobody has asked for yet."""
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
        if entry.state is ModelState.LOADING or entry.uses:
            raise Conflict(f"model {model_id} is in use; unload it when its requests have ended")
        self.counters.unloads += 1
        self._put_out.add(model_id)
        self._remove(entry)
        self._policy.on_unload(entry.model, now)
        return self._advance(now)

    def give_up(self, ticket: int, now: float) -> tuple[Grant, ...]:
        """The request behind ``ticket`` no longer waits; unknown tickets are ignored."""
        if ticket not in self._waiting:
            return ()
        self._leave(ticket)
        return self._advance(now)

    def cannot_load(self, model_id: str, detail: str, now: float) -> None:
        """Remember that a load would fail, without having displaced anything for it."""
        self._failures[model_id] = _Failure(detail, now + self._failure_memory_s)

    def forget_failure(self, model_id: str) -> None:
        """Let the next request for ``model_id`` try to load it again at once."""
        self._failures.pop(model_id, None)

    def forward_costs(self, forward_s: Mapping[str, float]) -> None:
        """Tell the policy which models others hold, and the extra seconds that forwarding there costs."""
        self._policy.on_forward_costs(forward_s)

    # Queries

    @property
    def review_s(self) -> float:
        """When ``next_preload`` should be asked next though nothing else has happened; infinite if never."""
        return math.inf if self._preloading >= self._max_preloads or self._waiting else self._policy.review_s

    @property
    def used_bytes(self) -> int:
        """Bytes of all models, resident and loading."""
        return self._used_bytes

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
                pinned=entry.pinned,
            )
            for model_id, entry in self._entries.items()
        )

    # Rules

    def _enter(self, model: ModelProfile, now: float) -> Answer | Wait:
        answer: Answer | None = self._refusal(model, now)
        if answer is None and not self._waiting:
            answer = self._place(model, now)
        return answer or self._queue(model, now)

    def _present(self, model_id: str) -> Hit | Join | None:
        entry = self._entries.get(model_id)
        if entry is None or entry.draining:
            return None
        entry.uses += 1
        entry.speculative = False
        return _HIT if entry.state is ModelState.READY else _JOIN

    def _refusal(self, model: ModelProfile, now: float) -> Reject | None:
        failure = self._failures.get(model.model_id)
        if failure is not None and now < failure.until_s:
            return Reject(RejectReason.LOAD_FAILED, failure.detail, failure.until_s - now)
        if model.size_bytes > self.capacity_bytes - self._pinned_bytes:
            return Reject(
                RejectReason.TOO_LARGE,
                f"model {model.model_id} needs {model.size_bytes} bytes, but only "
                f"{self.capacity_bytes - self._pinned_bytes} of {self.capacity_bytes} can be made free",
            )
        return None

    def _preload(
        self,
        model: ModelProfile,
        now: float,
        worthwhile: Callable[[ModelProfile, Sequence[ModelProfile], float], bool],
    ) -> Preload | None:
        """Reserve room for ``model`` in the background, if what must go for it is idle and the load ``worthwhile``."""
        failure = self._failures.get(model.model_id)
        if model.model_id in self._entries or model.model_id in self._put_out:
            return None
        if failure is not None and now < failure.until_s:
            return None
        chosen = self._choose_victims(model, now, _idle)
        if chosen is None:
            return None
        if not worthwhile(model, [ranked.model for ranked in chosen], now):
            self._put_back(chosen, now)
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
        chosen = self._choose_victims(model, now, _idle)
        if chosen is None:
            return None
        self._loading += 1
        self.counters.loads += 1
        return Load(self._admit(model, chosen, now, uses=1, speculative=False))

    def _admit(
        self, model: ModelProfile, victims: list[Ranked], now: float, *, uses: int, speculative: bool
    ) -> tuple[str, ...]:
        """Enter ``model`` into the books in the place of ``victims``; returns their names."""
        for victim in victims:
            self.counters.evictions += 1
            entry = self._entries[victim.model.model_id]
            if entry.state is ModelState.LOADING:
                self._load_ended(entry)
            self._remove(entry)
            self._policy.on_evict(victim.model, now)
        pinned = model.model_id in self._pinned
        self._entries[model.model_id] = _Entry(
            model=model,
            state=ModelState.LOADING,
            uses=uses,
            pinned=pinned,
            preload=speculative,
            speculative=speculative,
        )
        self._used_bytes += model.size_bytes
        self._failures.pop(model.model_id, None)
        self._put_out.discard(model.model_id)
        self._policy.on_load(model, now)
        if pinned:
            self._pinned_bytes += model.size_bytes
        else:
            self._ranking.add(model, now)
        return tuple(victim.model.model_id for victim in victims)

    def _choose_victims(
        self, model: ModelProfile, now: float, eligible: Callable[[_Entry], bool]
    ) -> list[Ranked] | None:
        """The models to unload so that ``model`` fits, out of the ranking; None if all together are not enough.

        Takes the lowest utilities until enough bytes are free. If the policy says so, it then keeps only the largest of
        those that suffice: a small model is spared when its bytes are not needed.
        """
        missing_bytes = self._used_bytes + model.size_bytes - self.capacity_bytes
        if missing_bytes <= 0:
            return []
        for model_id in self._policy.fallen(now):
            self._ranking.renew(model_id, now)
        # A model that already makes way goes first: it was ranked lowest a moment ago and has been emptied since.
        taken: list[Ranked] = []
        freed_bytes = 0
        for entry in self._draining:
            if freed_bytes < missing_bytes and eligible(entry):
                ranked = self._ranking.take(entry.model.model_id)
                if ranked is not None:
                    taken.append(ranked)
                    freed_bytes += entry.model.size_bytes
        passed_over: list[Ranked] = []
        while freed_bytes < missing_bytes and (ranked := self._ranking.pop(now)) is not None:
            if eligible(self._entries[ranked.model.model_id]):
                taken.append(ranked)
                freed_bytes += ranked.model.size_bytes
            else:
                passed_over.append(ranked)
        chosen = taken if freed_bytes >= missing_bytes else []
        if len(chosen) > 1 and self._policy.spares_small:
            chosen = _largest_that_suffice(taken, missing_bytes)
        self._put_back(passed_over, now)
        if chosen is not taken:
            self._put_back((ranked for ranked in taken if ranked not in chosen), now)
        return chosen or None

    def _put_back(self, several: Iterable[Ranked], now: float) -> None:
        for ranked in several:
            self._ranking.put_back(ranked)
            # The policy may have told of its fall while it was out.
            self._ranking.renew(ranked.model.model_id, now)

    def _queue(self, model: ModelProfile, now: float) -> Wait | Reject:
        if len(self._waiting) >= self._max_waiting:
            return Reject(RejectReason.QUEUE_FULL, f"{len(self._waiting)} requests already wait for memory", 1.0)
        self._tickets += 1
        self._waiting[self._tickets] = model
        if len(self._waiting) == 1:
            self._make_way(model, now)
        return Wait(self._tickets)

    def _make_way(self, model: ModelProfile, now: float) -> None:
        """Let no new request onto the models that ``model``, first in line, will displace, but onto all others."""
        if self._loading >= self._max_loads:
            # It would have to wait with every byte free: nothing is gained by turning hits away meanwhile.
            return
        chosen = self._choose_victims(model, now, _evictable) or []
        self._put_back(chosen, now)
        self._drain([self._entries[ranked.model.model_id] for ranked in chosen])

    def _drain(self, entries: list[_Entry]) -> None:
        for entry in self._draining:
            entry.draining = False
        for entry in entries:
            entry.draining = True
        self._draining = entries

    def _advance(self, now: float) -> tuple[Grant, ...]:
        """Answer everyone in line who can be answered now, in order of arrival."""
        if not self._waiting:
            return ()
        grants: list[Grant] = []
        while self._waiting:
            ticket, model = next(iter(self._waiting.items()))
            answer = self._present(model.model_id) or self._refusal(model, now) or self._place(model, now)
            if answer is None:
                self._make_way(model, now)
                grants.extend(self._grant_present())
                break
            self._leave(ticket)
            grants.append(Grant(ticket, model.model_id, answer))
        return tuple(grants)

    def _grant_present(self) -> list[Grant]:
        """Those further back need not wait for the first if their own model is there and stays."""
        grants = []
        for ticket, model in list(self._waiting.items()):
            answer = self._present(model.model_id)
            if answer is not None:
                self._leave(ticket)
                grants.append(Grant(ticket, model.model_id, answer))
        return grants

    def _leave(self, ticket: int) -> None:
        """Take a request out of the line; with the first in line goes what made way for it."""
        if ticket == next(iter(self._waiting)):
            self._drain([])
        del self._waiting[ticket]

    def _load_ended(self, entry: _Entry) -> None:
        if entry.preload:
            self._preloading -= 1
        else:
            self._loading -= 1

    def _remove(self, entry: _Entry) -> None:
        if entry.speculative:
            self.counters.wasted_preloads += 1
        if entry.pinned:
            self._pinned_bytes -= entry.model.size_bytes
        if entry.draining:
            self._draining.remove(entry)
        self._ranking.take(entry.model.model_id)
        del self._entries[entry.model.model_id]
        self._used_bytes -= entry.model.size_bytes

    def _loading_entry(self, model_id: str) -> _Entry:
        entry = self._entries.get(model_id)
        if entry is None or entry.state is not ModelState.LOADING:
            raise ValueError(f"{model_id} is not loading")
        return entry


def _evictable(entry: _Entry) -> bool:
    return entry.state is ModelState.READY or entry.speculative


def _idle(entry: _Entry) -> bool:
    return not entry.uses and _evictable(entry)


def _largest_that_suffice(taken: list[Ranked], missing_bytes: int) -> list[Ranked]:
    kept: list[Ranked] = []
    for ranked in sorted(taken, key=lambda ranked: -ranked.model.size_bytes):
        if missing_bytes <= 0:
            break
        kept.append(ranked)
        missing_bytes -= ranked.model.size_bytes
    return kept
