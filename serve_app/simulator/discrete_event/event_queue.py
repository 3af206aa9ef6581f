"""The events of a simulation, in the order of their time."""

from __future__ import annotations

import heapq
from collections.abc import Callable
from typing import Any, TypeVar

_Subject = TypeVar("_Subject")


class EventQueue:
    """Events in virtual time; events at the same moment happen in the order in which they were added."""

    __slots__ = ("_heap", "_order")

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, Callable[[Any, float], None], Any]] = []
        self._order = 0

    def at(self, at_s: float, act: Callable[[_Subject, float], None], subject: _Subject) -> None:
        """Add an event: a call of ``act(subject, at_s)`` at ``at_s``."""
        self._order += 1
        heapq.heappush(self._heap, (at_s, self._order, act, subject))

    def run_until(self, now: float) -> None:
        """Run the events that are due by ``now``."""
        heap, pop = self._heap, heapq.heappop
        while heap and heap[0][0] <= now:
            at_s, _, act, subject = pop(heap)
            act(subject, at_s)

    def step(self) -> bool:
        """Run the next event; returns False if there is none."""
        if not self._heap:
            return False
        at_s, _, act, subject = heapq.heappop(self._heap)
        act(subject, at_s)
        return True
