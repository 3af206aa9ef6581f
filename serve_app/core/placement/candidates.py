"""What a round of placement is worked out from: who asks for what, and where a copy might go."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Rows = NDArray[np.intp]
Flags = NDArray[np.bool_]


class Candidates:
    """The sites where a copy of one model might be placed, the most worthwhile per byte first."""

    __slots__ = ("_numbers", "_sorted", "_worth", "lead")

    def __init__(self, numbers: Rows, worth: Floats) -> None:
        self._numbers, self._worth = numbers, worth
        self._sorted = False
        self._look()

    def __bool__(self) -> bool:
        return len(self._numbers) > 0

    def drop(self, able: Flags) -> None:
        """Forget the first, and those that are not able any more, as told by site."""
        self._sort()
        left = able[self._numbers]
        left[0] = False
        self._numbers, self._worth = self._numbers[left], self._worth[left]
        self._look()

    def sink(self, worth: Floats, least: float) -> None:
        """A copy more has made them worth less, as told by site; forget those that are worth too little now."""
        now = np.minimum(self._worth, worth[self._numbers])
        left = (now > 0) & (now >= least)
        self._numbers, self._worth, self._sorted = self._numbers[left], now[left], False
        self._look()

    def _sort(self) -> None:
        if not self._sorted:
            order = np.lexsort((self._numbers, -self._worth))
            self._numbers, self._worth, self._sorted = self._numbers[order], self._worth[order], True

    def _look(self) -> None:
        """Find the first; most are never asked for a second."""
        if not len(self._numbers):
            return
        best = 0 if self._sorted else int(np.flatnonzero(self._worth == self._worth.max())[0])
        self.lead: tuple[float, int] = (-float(self._worth[best]), int(self._numbers[best]))


def asked(
    row: Mapping[str, int], locations: Sequence[str], rates: Mapping[str, Mapping[str, float]]
) -> tuple[Rows, Floats, list[int]]:
    """Who asks how often, sorted by model; and where each model begins."""
    rows: list[int] = []
    per_s: list[float] = []
    counts: list[int] = []
    for location in locations:
        rate = rates.get(location, {})
        rows += [row.get(name, -1) for name in rate]
        per_s += rate.values()
        counts.append(len(rate))
    models, rated = np.array(rows, dtype=np.intp), np.array(per_s)
    asking = np.repeat(np.arange(len(locations)), counts)
    # Numbers of models are sorted by one byte after the other where they are short: that takes a tenth of the time.
    order = np.flatnonzero((models >= 0) & (rated > 0))
    models = models[order]
    order = order[np.argsort(models.astype(np.uint16) if len(row) < 1 << 16 else models, kind="stable")]
    starts = np.concatenate(([0], np.cumsum(np.bincount(models, minlength=len(row)))))
    return asking[order], rated[order], starts.tolist()


def numbered(names: Sequence[str]) -> Rows:
    """A number for each name, the same for the same."""
    number = {name: place for place, name in enumerate(dict.fromkeys(names))}
    return np.array([number[name] for name in names], dtype=np.intp)
