"""A priority queue of models whose keys move all the time; the smallest key is found in logarithmic time."""

from __future__ import annotations

import heapq
from collections.abc import Callable
from typing import NamedTuple

from serve_app.core.catalog import ModelProfile


class HeapEntry(NamedTuple):
    """A model under the key that it was last seen to have; of equal keys, the one pushed first goes first."""

    key: float
    order: float
    model: ModelProfile


class LazyHeap:
    """Models on a heap, the smallest key on top.

    A key that grows costs nothing: the model surfaces with its old key and sinks again. The keys of most eviction
    policies grow with every request. Only a key that shrinks must be announced, by ``decrease_key``.

    Args:
        key: of a model now, ``key(model, now)`` with ``now`` in seconds.
    """

    #: The heap is rebuilt when it has this many entries more than twice those that count.
    SLACK = 64

    def __init__(self, key: Callable[[ModelProfile, float], float]) -> None:
        self._key = key
        self._heap: list[HeapEntry] = []
        self._live: dict[str, HeapEntry] = {}
        self._order = 0

    def __len__(self) -> int:
        return len(self._live)

    def __contains__(self, model_id: str) -> bool:
        return model_id in self._live

    def push(self, model: ModelProfile, now: float) -> None:
        """Add a model under its key as of ``now``."""
        self._order += 1
        self.push_back(HeapEntry(self._key(model, now), self._order, model))

    def push_behind(self, former: HeapEntry, model: ModelProfile, now: float) -> None:
        """Add a model under its key as of ``now``; of equal keys it goes right after ``former``, which was taken."""
        self.push_back(HeapEntry(self._key(model, now), former.order + 0.5, model))

    def decrease_key(self, model_id: str, now: float) -> None:
        """Take in that the key of a model may have shrunk; unknown models are ignored."""
        known = self._live.get(model_id)
        if known is not None:
            key = self._key(known.model, now)
            if key < known.key:
                self.push_back(HeapEntry(key, known.order, known.model))

    def remove(self, model_id: str) -> HeapEntry | None:
        """Remove a model by name; None if it is not on the heap."""
        return self._live.pop(model_id, None)

    def pop(self, now: float) -> HeapEntry | None:
        """Remove the model with the smallest key as of ``now``; None if there is none."""
        heap, live = self._heap, self._live
        while heap:
            top = heap[0]
            model = top.model
            if live.get(model.model_id) is not top:
                heapq.heappop(heap)
                continue
            key = self._key(model, now)
            if key <= top.key:
                heapq.heappop(heap)
                del live[model.model_id]
                return top
            sunk = HeapEntry(key, top.order, model)
            live[model.model_id] = sunk
            heapq.heapreplace(heap, sunk)
        return None

    def push_back(self, entry: HeapEntry) -> None:
        """Undo ``remove`` or ``pop``."""
        self._live[entry.model.model_id] = entry
        if len(self._heap) > 2 * len(self._live) + self.SLACK:
            self._heap[:] = self._live.values()
            heapq.heapify(self._heap)
        else:
            heapq.heappush(self._heap, entry)
