"""Drop functions that say nothing about caching; the same rule for recorded and generated traces."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray


def worth_keeping(counts: NDArray[Any], *, max_quantile: float, drop_one_hit: bool) -> NDArray[np.bool_]:
    """Select the functions that are neither among the most popular nor called once or never.

    The most popular models stay in every cache, the others are never requested again: neither distinguishes two
    policies, and one function can be most of a trace.

    Args:
        counts: calls of every function.
        max_quantile: functions with more calls than this quantile of the counts are dropped; functions without calls do
            not count. 1 keeps all.
        drop_one_hit: whether functions that are called once are dropped. Functions without calls always are.

    Returns:
        A mask over the functions.
    """
    called = counts > 0
    if not called.any():
        return called
    highest = np.quantile(counts[called], max_quantile)
    return np.asarray(called & (counts <= highest) & (counts > drop_one_hit))
