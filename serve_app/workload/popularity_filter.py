"""Which functions of a trace are worth caching models for; the same rule for traces that are read and made."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray


def worth_keeping(counts: NDArray[Any], *, max_quantile: float, drop_one_hit: bool) -> NDArray[np.bool_]:
    """Functions that are neither among the most popular nor called once or never.

    The most popular are always there, the others never again: neither tells two policies apart, and one function may
    well be most of a trace.

    Args:
        counts: calls of every function.
        max_quantile: functions with more calls than this quantile of the counts go; functions that are never called
            do not count. 1 keeps all.
        drop_one_hit: whether functions that are called once go. Those that are never called always do.

    Returns:
        A mask over the functions.
    """
    called = counts > 0
    if not called.any():
        return called
    highest = np.quantile(counts[called], max_quantile)
    return np.asarray(called & (counts <= highest) & (counts > drop_one_hit))
