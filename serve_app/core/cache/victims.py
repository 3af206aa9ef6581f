"""Chooses victims: the models that leave so that a load fits, or that go over to a smaller form for it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import groupby

from serve_app.core.cache.entries import CacheEntry
from serve_app.core.catalog import ModelProfile
from serve_app.core.forms import Surplus, surplus
from serve_app.core.lazy_heap import HeapEntry, LazyHeap
from serve_app.core.policies.base import EvictionPolicy


class VictimRanking:
    """The evictable models of one cache by their utility. Unevictable ones are not on the heap, hence never chosen.

    A model in a larger form than that in which it was loaded is ranked in two parts, if the first is worth no more per
    byte than the second: the ``Surplus`` of its form, and the model in the smaller form. Otherwise both would leave
    together anyway, and it is ranked whole. So victims are parts of models: a surplus alone means that the model goes
    over to its smaller form; with the rest, or where there is none, that the model leaves. A model that is ranked whole
    also keeps its smaller form if its surplus makes room enough.

    Args:
        entries: of the cache, by model.
        policy: ranks them.
    """

    def __init__(self, entries: Mapping[str, CacheEntry], policy: EvictionPolicy) -> None:
        self._entries = entries
        self._draining: list[CacheEntry] = []
        self._policy = policy
        self._heap = LazyHeap(policy.utility)

    def add(self, entry: CacheEntry, now: float) -> None:
        """Rank a model from now on."""
        self._heap.push(self._first_part(entry, now) if entry.smaller else entry.model, now)

    def remove(self, entry: CacheEntry) -> None:
        """Rank a model no more; it is unevictable now, or has left."""
        self._heap.remove(entry.model.model_id)

    def forget(self, entry: CacheEntry) -> None:
        """The model has left, or is another one now for whoever would displace it."""
        if entry.draining:
            self._draining.remove(entry)
            entry.draining = False
        self._heap.remove(entry.model.model_id)

    def set_policy(self, policy: EvictionPolicy, now: float) -> None:
        """Rank by another policy; models of equal utility in the order of their last use."""
        self._policy = policy
        self._heap = LazyHeap(policy.utility)
        for entry in sorted(self._entries.values(), key=lambda entry: entry.used_s):
            if not entry.unevictable:
                self.add(entry, now)

    def choose(self, missing_bytes: int, now: float, eligible: Callable[[CacheEntry], bool]) -> list[HeapEntry] | None:
        """Remove from the heap what to evict for ``missing_bytes``; None if all eligible models are not enough.

        Takes the lowest utilities until enough bytes are free. If the policy says so, only the largest victims that
        suffice remain: a small model is spared when its bytes are not needed.
        """
        if missing_bytes <= 0:
            return []
        taken = self.take_least_useful(missing_bytes, now, eligible)
        freed_bytes = 0
        for victim in taken:
            freed_bytes += victim.model.size_bytes
        chosen = taken if freed_bytes >= missing_bytes else []
        if len(chosen) > 1 and self._policy.trim_victims:
            chosen = _largest_that_suffice(taken, missing_bytes)
        if chosen is not taken:
            self.spare((victim for victim in taken if victim not in chosen), now)
        return self.without_rest(chosen, missing_bytes) or None

    def take_least_useful(
        self, missing_bytes: int, now: float, eligible: Callable[[CacheEntry], bool]
    ) -> list[HeapEntry]:
        """Remove the lowest utilities from the heap until they make so many bytes or no eligible model is left."""
        heap, entries = self._heap, self._entries
        for model_id in self._policy.lowered(now):
            heap.decrease_key(model_id, now)
        # A draining model goes first: it was ranked lowest a moment ago and has been emptied since.
        taken: list[HeapEntry] = []
        freed_bytes = 0
        for entry in self._draining:
            if freed_bytes < missing_bytes and eligible(entry):
                victim = heap.remove(entry.model.model_id)
                if victim is not None:
                    taken.append(victim)
                    freed_bytes += victim.model.size_bytes
                    self._rank_rest(entry, victim, now)
        passed_over: list[HeapEntry] = []
        while freed_bytes < missing_bytes and (victim := heap.pop(now)) is not None:
            entry = entries[victim.model.model_id]
            if eligible(entry):
                taken.append(victim)
                freed_bytes += victim.model.size_bytes
                if entry.smaller is not None:
                    self._rank_rest(entry, victim, now)
            else:
                passed_over.append(victim)
        if passed_over:
            self.spare(passed_over, now)
        return taken

    def without_rest(self, victims: list[HeapEntry], missing_bytes: int) -> list[HeapEntry]:
        """Return the victims, of each model that would leave whole only its surplus where that suffices as well."""
        freed_bytes = sum(victim.model.size_bytes for victim in victims)
        for position, victim in enumerate(victims):
            entry = self._entries[victim.model.model_id]
            if entry.smaller is None or victim.model is not entry.model:
                continue
            part = surplus(entry.model, entry.smaller)
            if part is not None and freed_bytes - entry.smaller.size_bytes >= missing_bytes:
                freed_bytes -= entry.smaller.size_bytes
                victims[position] = HeapEntry(victim.key, victim.order, part)
        return victims

    def spare(self, victims: Iterable[HeapEntry], now: float) -> None:
        """Put victims back on the heap: they are not evicted after all."""
        for victim in victims:
            model = victim.model
            if model is self._entries[model.model_id].smaller:
                # A model without its surplus, which stands for it.
                continue
            if isinstance(model, Surplus) and (first := self._first_part(self._entries[model.model_id], now)) != model:
                # It was to leave whole.
                victim = HeapEntry(victim.key, victim.order, first)
            self._heap.push_back(victim)
            # The policy may have announced a lower utility while the model was off the heap.
            self._heap.decrease_key(model.model_id, now)

    def drain(self, victims: Iterable[HeapEntry]) -> None:
        """Drain these models from now on, and no others."""
        for entry in self._draining:
            entry.draining = False
        self._draining = [
            self._entries[model_id] for model_id in dict.fromkeys(each.model.model_id for each in victims)
        ]
        for entry in self._draining:
            entry.draining = True

    def _first_part(self, entry: CacheEntry, now: float) -> ModelProfile:
        """Return what of a model would leave first: the surplus of its form, or the whole of it."""
        first, smaller = surplus(entry.model, entry.smaller), entry.smaller
        if first is None or smaller is None:
            return entry.model
        utility = self._policy.utility
        return first if utility(first, now) <= utility(smaller, now) else entry.model

    def _rank_rest(self, entry: CacheEntry, victim: HeapEntry, now: float) -> None:
        """Rank a model without the surplus that was taken off the heap, as its next victim."""
        if entry.smaller is not None and victim.model is not entry.model and victim.model is not entry.smaller:
            self._heap.push_behind(victim, entry.smaller, now)


def _largest_that_suffice(victims: Sequence[HeapEntry], missing_bytes: int) -> list[HeapEntry]:
    """Return the fewest victims that suffice, the largest first; of none more than its surplus if that will do."""
    if len({victim.model.model_id for victim in victims}) < len(victims):
        models = [list(parts) for _, parts in groupby(sorted(victims, key=_model_id), key=_model_id)]
        return _largest_models_that_suffice(models, missing_bytes)
    largest: list[HeapEntry] = []
    for victim in sorted(victims, key=lambda victim: -victim.model.size_bytes):
        if missing_bytes <= 0:
            break
        largest.append(victim)
        missing_bytes -= victim.model.size_bytes
    return largest


def _largest_models_that_suffice(models: list[list[HeapEntry]], missing_bytes: int) -> list[HeapEntry]:
    largest: list[list[HeapEntry]] = []
    for parts in sorted(models, key=lambda parts: -_size_bytes(parts)):
        if missing_bytes <= 0:
            break
        largest.append(parts)
        missing_bytes -= _size_bytes(parts)
    for parts in largest:
        if len(parts) > 1 and missing_bytes + parts[-1].model.size_bytes <= 0:
            missing_bytes += parts.pop().model.size_bytes
    return [part for parts in largest for part in parts]


def _model_id(victim: HeapEntry) -> str:
    return victim.model.model_id


def _size_bytes(parts: Sequence[HeapEntry]) -> int:
    return sum(part.model.size_bytes for part in parts)
