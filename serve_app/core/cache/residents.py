"""The models in memory of one cache: how they enter and leave, and which of them must not be loaded."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

from serve_app.core.cache.accounting import CacheAccounting
from serve_app.core.cache.decisions import Displaced, Reject, RejectReason
from serve_app.core.cache.entries import CacheEntry
from serve_app.core.catalog import ModelProfile
from serve_app.core.lazy_heap import HeapEntry
from serve_app.core.policies.base import EvictionPolicy
from serve_app.core.vocabulary import ModelState


@dataclass(slots=True)
class CacheCounters:
    """What has happened since the cache was made."""

    requests: int = 0
    #: Loads that requests have started.
    loads: int = 0
    load_failures: int = 0
    #: Displaced by another model, or by less memory.
    evictions: int = 0
    #: Gone for any other reason: an operator, placement, no use for long, or another catalog.
    unloads: int = 0
    #: Loads that no request has started (not in ``loads``), and those of them that left before any request came.
    preloads: int = 0
    wasted_preloads: int = 0
    #: Exchanges of a model in memory for another of its forms, a faster or a smaller one.
    form_changes: int = 0


#: A background load that keeps failing is tried after up to so many times the memory of a failure.
_MOST_PATIENCE = 128


@dataclass(frozen=True, slots=True)
class _Failure:
    """A load that failed: requests are rejected until ``until_s``, background loads until ``preload_from_s``."""

    detail: str
    until_s: float
    preload_from_s: float


class Residents:
    """Enters models into the accounting and removes them; every change reaches the policy and the counters.

    Args:
        model_capacity_bytes: what all models may take together.
        policy: ranks the models.
        pinned: models that are never victims.
        failure_memory_s: how long a failed load is remembered.
    """

    def __init__(
        self, model_capacity_bytes: int, policy: EvictionPolicy, pinned: Collection[str], failure_memory_s: float
    ) -> None:
        self.counters = CacheCounters()
        self.accounting = CacheAccounting(model_capacity_bytes, policy)
        self.entries = self.accounting.entries
        self.policy = policy
        #: Loads under way that requests have started, and those that no request has.
        self.loading = 0
        self.preloading = 0
        self._pinned = frozenset(pinned)
        self._failure_memory_s = failure_memory_s
        self._failures: dict[str, _Failure] = {}
        #: How often in a row a model could not be loaded.
        self._failed_in_row: dict[str, int] = {}
        #: Only a request brings these back.
        self._unloaded_by_operator: set[str] = set()
        #: Only a request or a required preload brings these back.
        self._withdrawn: set[str] = set()
        #: Models that requests may ask for, and those that they no longer may.
        self.catalog: dict[str, ModelProfile] = {}
        self._not_in_catalog: set[str] = set()
        #: Models in memory whose files have changed since: they take no new requests.
        self.changed: set[str] = set()
        #: The forms that models had when they were displaced, if those were not the ones in which they are loaded.
        self.former_forms: dict[str, ModelProfile] = {}
        #: Versions in whose place another one answers: only a request or a required preload loads them.
        self._superseded: frozenset[str] = frozenset()

    # What may be loaded

    def rejection(self, model: ModelProfile, now: float) -> Reject | None:
        """Why no request for an absent model can be served now."""
        failure = self._failures.get(model.model_id)
        if failure is not None and now < failure.until_s:
            return Reject(RejectReason.LOAD_FAILED, failure.detail, failure.until_s - now)
        accounting = self.accounting
        free_bytes = accounting.model_capacity_bytes - accounting.pinned_bytes
        if model.size_bytes > free_bytes:
            return Reject(
                RejectReason.TOO_LARGE,
                f"model {model.model_id} needs {model.size_bytes} bytes, but only "
                f"{free_bytes} of {accounting.model_capacity_bytes} can be made free",
            )
        return None

    def may_preload(self, model_id: str, *, required: bool, now: float) -> bool:
        """Whether a model may be loaded in the background."""
        if (
            model_id in self.entries
            or model_id in self._unloaded_by_operator
            or model_id in self._not_in_catalog
            or (not required and (model_id in self._withdrawn or model_id in self._superseded))
        ):
            return False
        failure = self._failures.get(model_id)
        return failure is None or now >= failure.preload_from_s

    def is_pinned(self, model_id: str) -> bool:
        """Whether the configuration pins a model, resident or not."""
        return model_id in self._pinned

    def remember_failure(self, model_id: str, detail: str, now: float) -> None:
        """Reject requests for a model for a while, and preload it no more for twice as long after every failure."""
        times = self._failed_in_row.get(model_id, 0)
        self._failed_in_row[model_id] = times + 1
        memory_s = self._failure_memory_s
        self._failures[model_id] = _Failure(detail, now + memory_s, now + memory_s * min(2**times, _MOST_PATIENCE))

    @property
    def failures(self) -> dict[str, str]:
        """Why models could not be loaded of which no load has worked since, by model."""
        return {model_id: failure.detail for model_id, failure in self._failures.items()}

    def forget_failure(self, model_id: str) -> None:
        """Let the next request for a model try to load it."""
        self._failures.pop(model_id, None)
        self._failed_in_row.pop(model_id, None)

    def add_known(self, models: Sequence[ModelProfile]) -> None:
        """Take in that the catalog has these models too."""
        self.catalog |= {model.model_id: model for model in models}
        self._not_in_catalog -= self.catalog.keys()

    def set_catalog(
        self, models: Sequence[ModelProfile], pinned: Collection[str], superseded: Collection[str], now: float
    ) -> dict[str, ModelProfile]:
        """Take in that the catalog has these models and no others, and return it; superseded ones are not preloaded."""
        offered = {model.model_id: model for model in models}
        self._not_in_catalog = (self._not_in_catalog | self.catalog.keys() | self.entries.keys()) - offered.keys()
        self.catalog = offered
        self._pinned, self._superseded = frozenset(pinned), frozenset(superseded)
        # What was published again may be sound now.
        self._failures.clear()
        self._failed_in_row.clear()
        self.former_forms.clear()
        for model_id, entry in self.entries.items():
            self.accounting.pin(entry, model_id in self._pinned, now)
            if entry.smaller is not None and model_id in offered:
                self.accounting.set_smaller(entry, offered[model_id], now)
        return offered

    @property
    def removed(self) -> list[CacheEntry]:
        """Models in memory that the catalog no longer has, and those whose files have changed."""
        if not self._not_in_catalog and not self.changed:
            return []
        leaving = self._not_in_catalog | self.changed
        return [entry for model_id, entry in self.entries.items() if model_id in leaving]

    @property
    def has_due_evictions(self) -> bool:
        """Whether a resident model is to leave as soon as it is idle."""
        return (
            self.accounting.excess_bytes > 0 or bool(self.changed) or not self._not_in_catalog.isdisjoint(self.entries)
        )

    @property
    def may_owe_evictions(self) -> bool:
        """Whether a model that becomes idle may have to leave at once; False is certain."""
        accounting = self.accounting
        return (
            accounting.unaccounted_bytes > 0
            or accounting.excess_bytes > 0
            or bool(self.changed)
            or bool(self._not_in_catalog)
        )

    # Entering and leaving

    def admit(
        self, model: ModelProfile, victims: Sequence[HeapEntry], now: float, *, uses: int, preload: bool
    ) -> Displaced:
        """Begin a load of ``model`` in the place of ``victims``; returns what has become of them."""
        model_id = model.model_id
        displaced = self.displace(victims, now)
        if preload:
            self.preloading += 1
            self.counters.preloads += 1
        else:
            self.loading += 1
            self.counters.loads += 1
        self._unloaded_by_operator.discard(model_id)
        self._withdrawn.discard(model_id)
        self.policy.on_load(model, now)
        entry = CacheEntry(
            model=model,
            state=ModelState.LOADING,
            uses=uses,
            used_s=now,
            pinned=model_id in self._pinned,
            preload=preload,
            speculative=preload,
        )
        self.accounting.add(entry, now)
        return displaced

    def may_exchange(self, model: ModelProfile) -> bool:
        """Whether a model could go over to this form now: it is in memory, on its way to none, and is to stay.

        A pinned model must leave room for the largest of the others.
        """
        entry = self.entries.get(model.model_id)
        if (
            entry is None
            or entry.state is not ModelState.READY
            or entry.incoming is not None
            or model.model_id in self._not_in_catalog
            or model.model_id in self.changed
        ):
            return False
        if not entry.pinned or model.size_bytes <= entry.model.size_bytes:
            return True
        pinned_bytes = self.accounting.pinned_bytes + model.size_bytes - entry.model.size_bytes
        others = (other.size_bytes for model_id, other in self.catalog.items() if model_id not in self._pinned)
        return pinned_bytes + max(others, default=0) <= self.accounting.model_capacity_bytes

    def begin_exchange(self, model: ModelProfile, victims: Sequence[HeapEntry], now: float) -> Displaced:
        """Begin to load another form of a model in the place of ``victims``; returns what has become of them.

        The model stays in use until the exchange ends: neither form can leave meanwhile.
        """
        entry = self.entries[model.model_id]
        entry.uses += 1
        displaced = self.displace(victims, now)
        self.preloading += 1
        self.counters.form_changes += 1
        self.accounting.begin_exchange(entry, model)
        return displaced

    def end_exchange(self, model_id: str, succeeded: bool, now: float) -> None:
        """Make a model ready in its other form, or leave it as it is.

        Raises:
            ValueError: it is not on its way to another form.
        """
        entry = self.entries.get(model_id)
        if entry is None or entry.incoming is None:
            raise ValueError(f"{model_id} is on its way to no other form")
        self.preloading -= 1
        if succeeded:
            self.policy.on_exchange(entry.model, entry.incoming, now)
        smaller = self.catalog.get(model_id) or entry.smaller or entry.model
        self.accounting.end_exchange(entry, succeeded, smaller, now)
        entry.uses -= 1

    def load_ended(self, model_id: str) -> None:
        """Make a loaded model ready.

        Raises:
            ValueError: it is not loading.
        """
        entry = self._loading_entry(model_id)
        self.forget_failure(model_id)
        entry.state = ModelState.READY
        self._free_load_slot(entry)

    def load_failed(self, model_id: str, detail: str, now: float) -> None:
        """Remove a model whose load has failed.

        Raises:
            ValueError: it is not loading.
        """
        entry = self._loading_entry(model_id)
        self._free_load_slot(entry)
        self.counters.load_failures += 1
        self.remember_failure(model_id, detail, now)
        self._remove(entry)
        self.policy.on_unload(entry.model, now)

    def displace(self, victims: Iterable[HeapEntry], now: float) -> Displaced:
        """Remove models that were displaced; one that has lost its surplus alone goes over to its smaller form."""
        # What is taken last of a model is the most of it.
        last = {victim.model.model_id: victim.model for victim in victims}
        shrunk: list[ModelProfile] = []
        evicted: list[str] = []
        for model_id, part in last.items():
            entry = self.entries[model_id]
            if entry.smaller is not None and part is not entry.model and part is not entry.smaller:
                shrunk.append(self._shrink(entry, now))
            else:
                evicted.append(model_id)
                self._evict(entry, now)
        return Displaced(tuple(evicted), tuple(shrunk))

    def _evict(self, entry: CacheEntry, now: float) -> None:
        self.counters.evictions += 1
        if entry.smaller is not None:
            self.former_forms[entry.model.model_id] = entry.model
        if entry.state is ModelState.LOADING:
            self._free_load_slot(entry)
        self._remove(entry)
        self.policy.on_evict(entry.model, now)

    def _shrink(self, entry: CacheEntry, now: float) -> ModelProfile:
        """Begin to load the smaller form of an idle model in the place of the larger one; returns that form."""
        self.counters.form_changes += 1
        former = entry.model
        self.accounting.shrink(entry, now)
        entry.state, entry.shrinking = ModelState.LOADING, True
        self.policy.on_exchange(former, entry.model, now)
        return entry.model

    def unload(self, entry: CacheEntry, now: float) -> None:
        """Remove a model for any other reason."""
        self.counters.unloads += 1
        self._remove(entry)
        self.policy.on_unload(entry.model, now)

    def unload_by_operator(self, entry: CacheEntry, now: float) -> None:
        """Remove a model that only a request brings back."""
        self._unloaded_by_operator.add(entry.model.model_id)
        self.unload(entry, now)

    def withdraw(self, entry: CacheEntry, now: float) -> None:
        """Remove a model that only a request or a required preload brings back."""
        self._withdrawn.add(entry.model.model_id)
        self.unload(entry, now)

    def _free_load_slot(self, entry: CacheEntry) -> None:
        if entry.shrinking:
            entry.shrinking = False
        elif entry.preload:
            self.preloading -= 1
        else:
            self.loading -= 1

    def _remove(self, entry: CacheEntry) -> None:
        self.changed.discard(entry.model.model_id)
        if entry.speculative:
            self.counters.wasted_preloads += 1
        self.accounting.remove(entry)

    def _loading_entry(self, model_id: str) -> CacheEntry:
        entry = self.entries.get(model_id)
        if entry is None or entry.state is not ModelState.LOADING:
            raise ValueError(f"{model_id} is not loading")
        return entry
