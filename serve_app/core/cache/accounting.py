"""Chooses victims, and counts bytes.

The accounting of one cache: what takes memory, what may be evicted, and in which order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from serve_app.core.catalog import ModelProfile
from serve_app.core.lazy_heap import HeapEntry, LazyHeap
from serve_app.core.policies.base import EvictionPolicy
from serve_app.core.vocabulary import ModelState


@dataclass(slots=True)
class CacheEntry:
    """One model that takes memory."""

    model: ModelProfile
    state: ModelState
    uses: int
    #: When a request last asked for it, or its last use ended.
    used_s: float
    #: Never a victim: the configuration says so.
    pinned: bool
    #: One of few copies that must exist; never a victim as long as all requests can be served beside it.
    protected: bool = False
    #: Takes no new requests: it is to be evicted as soon as it is idle.
    draining: bool = False
    #: Its load was started by no request.
    preload: bool = False
    #: And no request has asked for it since.
    speculative: bool = False

    @property
    def unevictable(self) -> bool:
        """Whether it is no victim now."""
        return self.pinned or self.protected


def evictable(entry: CacheEntry) -> bool:
    """Whether a model could be evicted, were it not in use."""
    return entry.state is ModelState.READY or entry.speculative


def idle(entry: CacheEntry) -> bool:
    """Whether a model could be evicted now."""
    return not entry.uses and evictable(entry)


class CacheAccounting:
    """Entries and their sums, kept exact. Unevictable entries are not on the heap, hence never chosen.

    Args:
        model_capacity_bytes: what all models may take together.
        policy: ranks them.
    """

    def __init__(self, model_capacity_bytes: int, policy: EvictionPolicy) -> None:
        self.model_capacity_bytes = model_capacity_bytes
        #: Of that, what is taken by something that is no model.
        self.unaccounted_bytes = 0
        self.entries: dict[str, CacheEntry] = {}
        self.used_bytes = 0
        self.pinned_bytes = 0
        self.protected_bytes = 0
        self._draining: list[CacheEntry] = []
        self._policy = policy
        self._heap = LazyHeap(policy.utility)

    @property
    def excess_bytes(self) -> int:
        """Bytes in memory beyond the capacity, which may have been lowered; negative: free bytes."""
        return self.missing_bytes(0)

    def missing_bytes(self, size_bytes: int) -> int:
        """Bytes to evict so that a request's model of that size fits; negative: bytes that would still be free.

        Unaccounted bytes yield to unevictable models, and to a model that could not be served beside them otherwise.
        """
        most_bytes = self.model_capacity_bytes - self.pinned_bytes - self.protected_bytes - size_bytes
        unaccounted_bytes = max(0, min(self.unaccounted_bytes, most_bytes))
        return self.used_bytes + size_bytes + unaccounted_bytes - self.model_capacity_bytes

    def add(self, entry: CacheEntry, now: float) -> None:
        """Count a model that takes memory from now on."""
        self.entries[entry.model.model_id] = entry
        self.used_bytes += entry.model.size_bytes
        if entry.pinned:
            self.pinned_bytes += entry.model.size_bytes
        else:
            self._heap.push(entry.model, now)

    def remove(self, entry: CacheEntry) -> None:
        """Count a model no more."""
        size_bytes = entry.model.size_bytes
        self.pinned_bytes -= entry.pinned * size_bytes
        self.protected_bytes -= entry.protected * size_bytes
        if entry.draining:
            self._draining.remove(entry)
        self._heap.remove(entry.model.model_id)
        del self.entries[entry.model.model_id]
        self.used_bytes -= size_bytes

    def set_policy(self, policy: EvictionPolicy, now: float) -> None:
        """Rank by another policy; models of equal utility in the order of their last use."""
        self._policy = policy
        self._heap = LazyHeap(policy.utility)
        for entry in sorted(self.entries.values(), key=lambda entry: entry.used_s):
            if not entry.unevictable:
                self._heap.push(entry.model, now)

    # Pinned and protected models

    def pin(self, entry: CacheEntry, pinned: bool, now: float) -> None:
        """Pin a model by configuration, or unpin it."""
        if entry.pinned is not pinned:
            self._set_protected(entry, False, now)
            self._set_unevictable(entry, pinned, now)
            entry.pinned = pinned
            self.pinned_bytes += entry.model.size_bytes if pinned else -entry.model.size_bytes

    def protect(self, model_ids: Sequence[str], enough_bytes: int, most_bytes: int, now: float) -> None:
        """Protect these models, in this order, until they take ``enough_bytes``, but never more than ``most_bytes``.

        No other model stays protected, and a draining model is not.
        """
        protected: set[str] = set()
        taken_bytes = 0
        for model_id in model_ids:
            entry = self.entries.get(model_id)
            if entry is None or entry.pinned or entry.draining:
                continue
            if taken_bytes < enough_bytes and taken_bytes + entry.model.size_bytes <= most_bytes:
                taken_bytes += entry.model.size_bytes
                protected.add(model_id)
        if protected or self.protected_bytes:
            for model_id, entry in self.entries.items():
                self._set_protected(entry, model_id in protected, now)

    def limit_protected(self, bytes_wanted: int, now: float) -> None:
        """Protect no more than leaves room for a model of that size; the largest models lose their protection first."""
        most_bytes = self.model_capacity_bytes - self.pinned_bytes - bytes_wanted
        if self.protected_bytes > most_bytes:
            protected = [entry for entry in self.entries.values() if entry.protected]
            for entry in sorted(protected, key=lambda entry: -entry.model.size_bytes):
                if self.protected_bytes > most_bytes:
                    self._set_protected(entry, False, now)

    def _set_protected(self, entry: CacheEntry, protected: bool, now: float) -> None:
        if entry.protected is not protected:
            entry.protected = protected
            self.protected_bytes += entry.model.size_bytes if protected else -entry.model.size_bytes
            self._set_unevictable(entry, protected, now)

    def _set_unevictable(self, entry: CacheEntry, unevictable: bool, now: float) -> None:
        if unevictable:
            self._heap.remove(entry.model.model_id)
        else:
            self._heap.push(entry.model, now)

    # Victims

    def choose_victims(
        self, missing_bytes: int, now: float, eligible: Callable[[CacheEntry], bool]
    ) -> list[HeapEntry] | None:
        """Remove from the heap what to evict for ``missing_bytes``; None if all eligible models are not enough.

        Takes the lowest utilities until enough bytes are free. If the policy says so, only the largest victims that
        suffice remain: a small model is spared when its bytes are not needed.
        """
        if missing_bytes <= 0:
            return []
        taken = self.take_least_useful(missing_bytes, now, eligible)
        freed_bytes = sum(victim.model.size_bytes for victim in taken)
        chosen = taken if freed_bytes >= missing_bytes else []
        if len(chosen) > 1 and self._policy.trim_victims:
            chosen = _largest_that_suffice(taken, missing_bytes)
        if chosen is not taken:
            self.spare((victim for victim in taken if victim not in chosen), now)
        return chosen or None

    def take_least_useful(
        self, missing_bytes: int, now: float, eligible: Callable[[CacheEntry], bool]
    ) -> list[HeapEntry]:
        """Remove the lowest utilities from the heap until they make so many bytes or no eligible model is left."""
        for model_id in self._policy.lowered(now):
            self._heap.decrease_key(model_id, now)
        # A draining model goes first: it was ranked lowest a moment ago and has been emptied since.
        taken: list[HeapEntry] = []
        freed_bytes = 0
        for entry in self._draining:
            if freed_bytes < missing_bytes and eligible(entry):
                victim = self._heap.remove(entry.model.model_id)
                if victim is not None:
                    taken.append(victim)
                    freed_bytes += entry.model.size_bytes
        passed_over: list[HeapEntry] = []
        while freed_bytes < missing_bytes and (victim := self._heap.pop(now)) is not None:
            if eligible(self.entries[victim.model.model_id]):
                taken.append(victim)
                freed_bytes += victim.model.size_bytes
            else:
                passed_over.append(victim)
        self.spare(passed_over, now)
        return taken

    def spare(self, victims: Iterable[HeapEntry], now: float) -> None:
        """Put victims back on the heap: they are not evicted after all."""
        for victim in victims:
            self._heap.push_back(victim)
            # The policy may have announced a lower utility while the model was off the heap.
            self._heap.decrease_key(victim.model.model_id, now)

    def drain(self, victims: Iterable[HeapEntry]) -> None:
        """Drain these models from now on, and no others."""
        for entry in self._draining:
            entry.draining = False
        self._draining = [self.entries[victim.model.model_id] for victim in victims]
        for entry in self._draining:
            entry.draining = True


def _largest_that_suffice(victims: list[HeapEntry], missing_bytes: int) -> list[HeapEntry]:
    largest: list[HeapEntry] = []
    for victim in sorted(victims, key=lambda victim: -victim.model.size_bytes):
        if missing_bytes <= 0:
            break
        largest.append(victim)
        missing_bytes -= victim.model.size_bytes
    return largest
