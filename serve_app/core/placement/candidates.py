"""The workers where a copy of one model might be placed."""

from __future__ import annotations

import numpy as np

from serve_app.core.placement.tables import Flags, Floats, Rows


class CandidateWorkers:
    """The workers where a copy of one model might be placed, the most worthwhile per byte first.

    Args:
        workers: their numbers.
        worth: of a copy at each, per byte.

    Attributes:
        lead: the negative worth of the first, and its number.
    """

    __slots__ = ("_sorted", "_workers", "_worth", "lead")

    def __init__(self, workers: Rows, worth: Floats) -> None:
        self._workers, self._worth = workers, worth
        self._sorted = False
        self._find_lead()

    def __bool__(self) -> bool:
        return len(self._workers) > 0

    def drop(self, able: Flags) -> None:
        """Remove the first, and those that are not able any more (``able`` is by worker)."""
        self._sort()
        left = able[self._workers]
        left[0] = False
        self._workers, self._worth = self._workers[left], self._worth[left]
        self._find_lead()

    def lower(self, worth: Floats, least: float) -> None:
        """Lower worths after another copy was placed (``worth`` is by worker); remove those now below ``least``."""
        now = np.minimum(self._worth, worth[self._workers])
        left = (now > 0) & (now >= least)
        self._workers, self._worth, self._sorted = self._workers[left], now[left], False
        self._find_lead()

    def _sort(self) -> None:
        if not self._sorted:
            order = np.lexsort((self._workers, -self._worth))
            self._workers, self._worth, self._sorted = self._workers[order], self._worth[order], True

    def _find_lead(self) -> None:
        """Find the first without sorting: for most models the second is never needed."""
        if not len(self._workers):
            return
        best = 0 if self._sorted else int(np.flatnonzero(self._worth == self._worth.max())[0])
        self.lead: tuple[float, int] = (-float(self._worth[best]), int(self._workers[best]))
