"""Counts bytes: what takes memory, and what of it is pinned, protected or unaccounted."""

from __future__ import annotations

from collections.abc import Sequence

from serve_app.core.cache.entries import CacheEntry
from serve_app.core.cache.victims import VictimRanking
from serve_app.core.catalog import ModelProfile
from serve_app.core.policies.base import EvictionPolicy


class CacheAccounting:
    """Entries and their sums, kept exact.

    Args:
        model_capacity_bytes: what all models may take together.
        policy: ranks them.

    Attributes:
        victims: those that may be evicted, ranked.
    """

    def __init__(self, model_capacity_bytes: int, policy: EvictionPolicy) -> None:
        self.model_capacity_bytes = model_capacity_bytes
        #: Of that, what is taken by something that is no model.
        self.unaccounted_bytes = 0
        self.entries: dict[str, CacheEntry] = {}
        self.used_bytes = 0
        self.pinned_bytes = 0
        self.protected_bytes = 0
        self.victims = VictimRanking(self.entries, policy)

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
            self.victims.add(entry, now)

    def remove(self, entry: CacheEntry) -> None:
        """Count a model no more."""
        size_bytes = entry.model.size_bytes
        self.pinned_bytes -= entry.pinned * size_bytes
        self.protected_bytes -= entry.protected * size_bytes
        self.victims.forget(entry)
        del self.entries[entry.model.model_id]
        self.used_bytes -= size_bytes

    def begin_exchange(self, entry: CacheEntry, incoming: ModelProfile) -> None:
        """Count another form of a model as well."""
        entry.incoming = incoming
        self.used_bytes += incoming.size_bytes

    def end_exchange(self, entry: CacheEntry, succeeded: bool, smaller: ModelProfile, now: float) -> None:
        """Count one form of a model again: the other one if the exchange has succeeded.

        ``smaller`` is the form in which a request loads the model.
        """
        incoming, entry.incoming = entry.incoming, None
        assert incoming is not None
        former = entry.model if succeeded else incoming
        self.used_bytes -= former.size_bytes
        if succeeded:
            grown_bytes = incoming.size_bytes - former.size_bytes
            self.pinned_bytes += entry.pinned * grown_bytes
            self.protected_bytes += entry.protected * grown_bytes
            entry.smaller = smaller if incoming.tier else None
            entry.model = incoming
            if not entry.unevictable:
                self.victims.remove(entry)
                self.victims.add(entry, now)

    def set_smaller(self, entry: CacheEntry, smaller: ModelProfile, now: float) -> None:
        """Take in that a request would load the model of a larger form in this smaller one now."""
        entry.smaller = smaller
        if not entry.unevictable:
            self.victims.remove(entry)
            self.victims.add(entry, now)

    def shrink(self, entry: CacheEntry, now: float) -> None:
        """Count an evictable model in its smaller form."""
        assert entry.smaller is not None
        self.victims.forget(entry)
        self.used_bytes += entry.smaller.size_bytes - entry.model.size_bytes
        entry.model, entry.smaller = entry.smaller, None
        self.victims.add(entry, now)

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
            self.victims.remove(entry)
        else:
            self.victims.add(entry, now)
