"""The memory-bounded model cache of one worker: which models are resident, which load, which go.

``ModelCache`` decides and counts; it loads and unloads nothing. Its caller acts on the answers: it drops the victims
of a ``Load`` first, then loads, then says ``loaded`` or ``failed``.
"""

from __future__ import annotations

import enum
from collections import OrderedDict
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

from serve_app.core.catalog import ModelProfile
from serve_app.core.policies import EvictionPolicy
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

    A request whose victims are all in use waits in line. The first in line makes way for itself: the models that it
    will displace take no new requests until it has its place, so that a large model cannot starve.

    Args:
        capacity_bytes: what all models, resident and loading, may take together.
        policy: ranks the models; see ``policies.py``.
        max_loads: loads under way at the same time.
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
        max_waiting: int = 256,
        failure_memory_s: float = 5.0,
        pinned: Collection[str] = (),
    ) -> None:
        if capacity_bytes <= 0:
            raise ValueError(f"capacity_bytes must be positive, not {capacity_bytes}")
        if max_loads < 1:
            raise ValueError(f"max_loads must be at least 1, not {max_loads}")
        self.capacity_bytes = capacity_bytes
        self.counters = CacheCounters()
        self._policy = policy
        self._max_loads = max_loads
        self._max_waiting = max_waiting
        self._failure_memory_s = failure_memory_s
        self._pinned = frozenset(pinned)
        self._entries: dict[str, _Entry] = {}
        self._used_bytes = 0
        self._loading = 0
        self._failures: dict[str, _Failure] = {}
        self._waiting: OrderedDict[int, ModelProfile] = OrderedDict()
        self._tickets = 0

    # Events

    def request(self, model: ModelProfile, now: float) -> Answer | Wait:
        """A user asks for ``model``. ``Hit``, ``Join`` and ``Load`` pin it until ``finish``."""
        self.counters.requests += 1
        self._policy.on_request(model, now)
        return self._enter(model, now)

    def preload(self, model: ModelProfile, now: float) -> Answer | Wait:
        """Like ``request``, for a load that nobody is waiting for: the policy does not count it as demand."""
        return self._enter(model, now)

    def loaded(self, model_id: str, now: float) -> tuple[Grant, ...]:
        """The load of ``model_id`` has ended well."""
        entry = self._loading_entry(model_id)
        entry.state = ModelState.READY
        self._loading -= 1
        return self._advance(now)

    def failed(self, model_id: str, detail: str, now: float) -> tuple[Grant, ...]:
        """The load of ``model_id`` has failed: its bytes are free and all who waited for it have lost their pin."""
        entry = self._loading_entry(model_id)
        self._loading -= 1
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
        """Take a resident model out by hand.

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
        answer: Answer | None = self._present(model.model_id) or self._refusal(model, now)
        if answer is None and not self._waiting:
            answer = self._place(model, now)
        return answer or self._queue(model, now)

    def _present(self, model_id: str) -> Hit | Join | None:
        entry = self._entries.get(model_id)
        if entry is None or entry.draining:
            return None
        entry.uses += 1
        return Hit() if entry.state is ModelState.READY else Join()

    def _refusal(self, model: ModelProfile, now: float) -> Reject | None:
        failure = self._failures.get(model.model_id)
        if failure is not None and now < failure.until_s:
            return Reject(RejectReason.LOAD_FAILED, failure.detail, failure.until_s - now)
        pinned_bytes = sum(entry.model.size_bytes for entry in self._entries.values() if entry.pinned)
        if model.size_bytes > self.capacity_bytes - pinned_bytes:
            return Reject(
                RejectReason.TOO_LARGE,
                f"model {model.model_id} needs {model.size_bytes} bytes, but only "
                f"{self.capacity_bytes - pinned_bytes} of {self.capacity_bytes} can be made free",
            )
        return None

    def _place(self, model: ModelProfile, now: float) -> Load | None:
        """Reserve room for ``model`` if there is, or can be, enough of it now."""
        if self._loading >= self._max_loads or model.model_id in self._entries:
            return None
        idle = (entry for entry in self._entries.values() if self._evictable(entry) and not entry.uses)
        victims = self._victims(idle, model, now)
        if victims is None:
            return None
        for victim in victims:
            self.counters.evictions += 1
            self._remove(victim)
            self._policy.on_evict(victim.model, now)
        self._entries[model.model_id] = _Entry(
            model=model,
            state=ModelState.LOADING,
            uses=1,
            pinned=model.model_id in self._pinned,
        )
        self._used_bytes += model.size_bytes
        self._loading += 1
        self.counters.loads += 1
        self._failures.pop(model.model_id, None)
        self._policy.on_load(model, now)
        return Load(tuple(victim.model.model_id for victim in victims))

    def _victims(self, candidates: Iterable[_Entry], model: ModelProfile, now: float) -> list[_Entry] | None:
        """The models to unload so that ``model`` fits; None if all candidates together are not enough.

        Takes the lowest utilities until enough bytes are free, then keeps only the largest of those that suffice: a
        small model is spared when its bytes are not needed.
        """
        missing_bytes = self._used_bytes + model.size_bytes - self.capacity_bytes
        if missing_bytes <= 0:
            return []
        # A model that already makes way goes first: it was ranked lowest a moment ago and has been emptied since.
        ranked = sorted(candidates, key=lambda entry: (not entry.draining, self._policy.utility(entry.model, now)))
        taken: list[_Entry] = []
        freed_bytes = 0
        for entry in ranked:
            if freed_bytes >= missing_bytes:
                break
            taken.append(entry)
            freed_bytes += entry.model.size_bytes
        if freed_bytes < missing_bytes:
            return None
        return _largest_that_suffice(taken, missing_bytes)

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
        candidates = (entry for entry in self._entries.values() if self._evictable(entry))
        makes_way = {entry.model.model_id for entry in self._victims(candidates, model, now) or ()}
        for model_id, entry in self._entries.items():
            entry.draining = model_id in makes_way

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
            for entry in self._entries.values():
                entry.draining = False
        del self._waiting[ticket]

    def _evictable(self, entry: _Entry) -> bool:
        return entry.state is ModelState.READY and not entry.pinned

    def _remove(self, entry: _Entry) -> None:
        del self._entries[entry.model.model_id]
        self._used_bytes -= entry.model.size_bytes

    def _loading_entry(self, model_id: str) -> _Entry:
        entry = self._entries.get(model_id)
        if entry is None or entry.state is not ModelState.LOADING:
            raise ValueError(f"{model_id} is not loading")
        return entry


def _largest_that_suffice(taken: list[_Entry], missing_bytes: int) -> list[_Entry]:
    kept: list[_Entry] = []
    for entry in sorted(taken, key=lambda entry: -entry.model.size_bytes):
        if missing_bytes <= 0:
            break
        kept.append(entry)
        missing_bytes -= entry.model.size_bytes
    return kept
