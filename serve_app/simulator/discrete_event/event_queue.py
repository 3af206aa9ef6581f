"""What happens when: the events of a simulation in the order of their time."""

from __future__ import annotations

import heapq
from collections.abc import Callable
from typing import Any, TypeVar

_Subject = TypeVar("_Subject")


class EventQueue:
    """Events in virtual time; of those at the same moment, the one that was entered first happens first."""

    __slots__ = ("_heap", "_order")

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, Callable[[Any, float], None], Any]] = []
        self._order = 0

    def at(self, at_s: float, act: Callable[[_Subject, float], None], subject: _Subject) -> None:
        """Let ``act(subject, at_s)`` happen at ``at_s``."""
        self._order += 1
        heapq.heappush(self._heap, (at_s, self._order, act, subject))

    def run_until(self, now: float) -> None:
        """Let everything happen that is due by ``now``."""
        heap, pop = self._heap, heapq.heappop
        while heap and heap[0][0] <= now:
            at_s, _, act, subject = pop(heap)
            act(subject, at_s)

    def step(self) -> bool:
        """Let the next event happen; False if there is none."""
        if not self._heap:
            return False
        at_s, _, act, subject = heapq.heappop(self._heap)
        act(subject, at_s)
        return True
