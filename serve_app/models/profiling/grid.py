"""The sizes of a model's free axes at which it is measured."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

from serve_app.core.contract import BATCH, Axis

#: Measured are all combinations of so many sizes of each axis, by the number of axes that can vary.
_STEPS = {1: 4, 2: 3, 3: 2}

#: Where there are more axes they grow together, in so many steps.
_DIAGONAL = 4

#: Batches that are measured with the largest sizes of the other axes: how large one may be is found there.
_BATCHES = 4


def grid(axes: Sequence[Axis]) -> tuple[tuple[int, ...], ...]:
    """Return the sizes at which a model is measured, the least first, and each after those that it exceeds.

    The costs at any size are bounded by those at a size of the grid that is nowhere less, so the largest sizes are
    among them. An axis whose least size is its largest does not count.
    """
    varying = [axis for axis in axes if axis.smallest < axis.largest]
    if len(varying) in _STEPS:
        chosen = set(itertools.product(*(_steps(axis, _STEPS[len(varying)]) for axis in axes)))
    else:
        chosen = set(zip(*(_spread(axis, _DIAGONAL) for axis in axes), strict=True)) if axes else {()}
    batch = next((axis for axis in varying if axis.name == BATCH), None)
    if batch is not None:
        chosen |= {tuple(size if axis is batch else axis.largest for axis in axes) for size in _steps(batch, _BATCHES)}
    if len(varying) > 1:
        chosen.add(tuple(_spread(axis, 3)[1] for axis in axes))
    return tuple(sorted(chosen, key=lambda sizes: (math.prod(sizes), sizes)))


def trial_sizes(axes: Sequence[Axis]) -> list[tuple[int, ...]]:
    """Return two sizes of every free axis: the least ones, and larger ones that differ from each other."""
    least = tuple(axis.smallest for axis in axes)
    larger = tuple(_larger(axis, position) for position, axis in enumerate(axes))
    return list(dict.fromkeys((least, larger)))


def _larger(axis: Axis, position: int) -> int:
    """Return a size that differs from that of other axes, so that the outputs show which axis they follow.

    One more is enough of a batch; an output may be much shorter than the axis that it follows otherwise.
    """
    middle = math.isqrt(axis.smallest * axis.largest) // axis.multiple * axis.multiple
    start = axis.smallest if axis.name == BATCH else max(axis.smallest, middle)
    return min(axis.largest, start + (position + 1) * axis.multiple)


def _steps(axis: Axis, count: int) -> tuple[int, ...]:
    return tuple(dict.fromkeys(_spread(axis, count)))


def _spread(axis: Axis, count: int) -> tuple[int, ...]:
    """Return so many sizes from the smallest to the largest, each about as many times the one before."""
    ratio = axis.largest / axis.smallest
    sizes = [axis.smallest * ratio ** (step / (count - 1)) for step in range(count)]
    return tuple(min(axis.largest, math.ceil(size / axis.multiple - 1e-9) * axis.multiple) for size in sizes)
