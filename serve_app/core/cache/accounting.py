"""The books of one cache: what takes up memory, what of it may go, and in which order."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from serve_app.core.catalog import ModelProfile
from serve_app.core.lazy_heap import HeapEntry, LazyHeap
from serve_app.core.policies.base import EvictionPolicy
from serve_app.core.vocabulary import ModelState


@dataclass(slots=True)
class CacheEntry:
    """One model that takes up memory."""

    model: ModelProfile
    state: ModelState
    uses: int
    #: When it was last asked for, or its last use ended.
    used_s: float
    #: Never a victim: the configuration says so.
    pinned: bool
    #: Never a victim as long as everything else can be served beside it: it is one of few copies that must exist.
    protected: bool = False
    draining: bool = False
    #: Its load is, or was, on nobody's request.
    preload: bool = False
    #: And nobody has asked for it since.
    speculative: bool = False

    @property
    def unevictable(self) -> bool:
        """Whether it is no victim now."""
        return self.pinned or self.protected


def evictable(entry: CacheEntry) -> bool:
    """Whether it could go, were it not in use."""
    return entry.state is ModelState.READY or entry.speculative


def idle(entry: CacheEntry) -> bool:
    """Whether it could go now."""
    return not entry.uses and evictable(entry)


class CacheAccounting:
    """Entries and their sums, kept exact. Pinned entries are not ranked, hence never chosen.

    Args:
        capacity_bytes: what all models may take together.
        policy: ranks them.
    """

    def __init__(self, capacity_bytes: int, policy: EvictionPolicy) -> None:
        self.capacity_bytes = capacity_bytes
        #: Of the capacity, what is taken by something that is no model.
        self.reserved_bytes = 0
        self.entries: dict[str, CacheEntry] = {}
        self.used_bytes = 0
        self.pinned_bytes = 0
        self.protected_bytes = 0
        self._draining: list[CacheEntry] = []
        self._policy = policy
        self._ranking = LazyHeap(policy.utility)

    @property
    def excess_bytes(self) -> int:
        """What is in memory beyond its capacity, which may have been reduced; negative: what is free."""
        return self.missing_bytes(0)

    def missing_bytes(self, size_bytes: int) -> int:
        """What would have to go so that a request's model of that size fits; negative: what would still be free.

        The reserve yields to what is unevictable or kept, and to a model that could not be served beside it otherwise.
        """
        most_bytes = self.capacity_bytes - self.pinned_bytes - self.protected_bytes - size_bytes
        held_back_bytes = max(0, min(self.reserved_bytes, most_bytes))
        return self.used_bytes + size_bytes + held_back_bytes - self.capacity_bytes

    def enter(self, entry: CacheEntry, now: float) -> None:
        """A model takes up memory from now on."""
        self.entries[entry.model.model_id] = entry
        self.used_bytes += entry.model.size_bytes
        if entry.pinned:
            self.pinned_bytes += entry.model.size_bytes
        else:
            self._ranking.add(entry.model, now)

    def remove(self, entry: CacheEntry) -> None:
        """It takes up no memory any more."""
        size_bytes = entry.model.size_bytes
        self.pinned_bytes -= entry.pinned * size_bytes
        self.protected_bytes -= entry.protected * size_bytes
        if entry.draining:
            self._draining.remove(entry)
        self._ranking.take(entry.model.model_id)
        del self.entries[entry.model.model_id]
        self.used_bytes -= size_bytes

    def use(self, policy: EvictionPolicy, now: float) -> None:
        """Rank by another policy; equals in the order of their last use."""
        self._policy = policy
        self._ranking = LazyHeap(policy.utility)
        for entry in sorted(self.entries.values(), key=lambda entry: entry.used_s):
            if not entry.unevictable:
                self._ranking.add(entry.model, now)

    # Pins

    def pin(self, entry: CacheEntry, pinned: bool, now: float) -> None:
        """Pin a model by configuration, or no longer."""
        if entry.pinned is not pinned:
            self._set_protected(entry, False, now)
            self._set_unevictable(entry, pinned, now)
            entry.pinned = pinned
            self.pinned_bytes += entry.model.size_bytes if pinned else -entry.model.size_bytes

    def protect(self, model_ids: Sequence[str], enough_bytes: int, most_bytes: int, now: float) -> None:
        """Keep these, the first ones first, until they take ``enough_bytes``, but never more than ``most_bytes``.

        No others are kept, nor is a model that makes way for a request.
        """
        kept: set[str] = set()
        taken_bytes = 0
        for model_id in model_ids:
            entry = self.entries.get(model_id)
            if entry is None or entry.pinned or entry.draining:
                continue
            if taken_bytes < enough_bytes and taken_bytes + entry.model.size_bytes <= most_bytes:
                taken_bytes += entry.model.size_bytes
                kept.add(model_id)
        if kept or self.protected_bytes:
            for model_id, entry in self.entries.items():
                self._set_protected(entry, model_id in kept, now)

    def release(self, bytes_wanted: int, now: float) -> None:
        """Keep no more than leaves room for a model of that size; the largest are let go first."""
        most_bytes = self.capacity_bytes - self.pinned_bytes - bytes_wanted
        if self.protected_bytes > most_bytes:
            kept = [entry for entry in self.entries.values() if entry.protected]
            for entry in sorted(kept, key=lambda entry: -entry.model.size_bytes):
                if self.protected_bytes > most_bytes:
                    self._set_protected(entry, False, now)

    def _set_protected(self, entry: CacheEntry, protected: bool, now: float) -> None:
        if entry.protected is not protected:
            entry.protected = protected
            self.protected_bytes += entry.model.size_bytes if protected else -entry.model.size_bytes
            self._set_unevictable(entry, protected, now)

    def _set_unevictable(self, entry: CacheEntry, unevictable: bool, now: float) -> None:
        if unevictable:
            self._ranking.take(entry.model.model_id)
        else:
            self._ranking.add(entry.model, now)

    # Who goes

    def choose_victims(
        self, missing_bytes: int, now: float, eligible: Callable[[CacheEntry], bool]
    ) -> list[HeapEntry] | None:
        """What to unload for ``missing_bytes``, out of the ranking; None if all together are not enough.

        Takes the lowest utilities until enough bytes are free. If the policy says so, it then keeps only the largest of
        those that suffice: a small model is spared when its bytes are not needed.
        """
        if missing_bytes <= 0:
            return []
        taken = self.take_least_useful(missing_bytes, now, eligible)
        freed_bytes = sum(ranked.model.size_bytes for ranked in taken)
        chosen = taken if freed_bytes >= missing_bytes else []
        if len(chosen) > 1 and self._policy.spares_small:
            chosen = _largest_that_suffice(taken, missing_bytes)
        if chosen is not taken:
            self.put_back((ranked for ranked in taken if ranked not in chosen), now)
        return chosen or None

    def take_least_useful(
        self, missing_bytes: int, now: float, eligible: Callable[[CacheEntry], bool]
    ) -> list[HeapEntry]:
        """The lowest utilities, out of the ranking, until they make so many bytes or there are no more."""
        for model_id in self._policy.fallen(now):
            self._ranking.renew(model_id, now)
        # A model that already makes way goes first: it was ranked lowest a moment ago and has been emptied since.
        taken: list[HeapEntry] = []
        freed_bytes = 0
        for entry in self._draining:
            if freed_bytes < missing_bytes and eligible(entry):
                ranked = self._ranking.take(entry.model.model_id)
                if ranked is not None:
                    taken.append(ranked)
                    freed_bytes += entry.model.size_bytes
        passed_over: list[HeapEntry] = []
        while freed_bytes < missing_bytes and (ranked := self._ranking.pop(now)) is not None:
            if eligible(self.entries[ranked.model.model_id]):
                taken.append(ranked)
                freed_bytes += ranked.model.size_bytes
            else:
                passed_over.append(ranked)
        self.put_back(passed_over, now)
        return taken

    def put_back(self, several: Iterable[HeapEntry], now: float) -> None:
        """They do not go after all."""
        for ranked in several:
            self._ranking.put_back(ranked)
            # The policy may have told of its fall while it was out.
            self._ranking.renew(ranked.model.model_id, now)

    def drain(self, several: Iterable[HeapEntry]) -> None:
        """These take no new requests from now on, and no others."""
        for entry in self._draining:
            entry.draining = False
        self._draining = [self.entries[ranked.model.model_id] for ranked in several]
        for entry in self._draining:
            entry.draining = True


def _largest_that_suffice(taken: list[HeapEntry], missing_bytes: int) -> list[HeapEntry]:
    kept: list[HeapEntry] = []
    for ranked in sorted(taken, key=lambda ranked: -ranked.model.size_bytes):
        if missing_bytes <= 0:
            break
        kept.append(ranked)
        missing_bytes -= ranked.model.size_bytes
    return kept
