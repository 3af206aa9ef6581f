"""Whether two ways to run a model answer alike."""

from __future__ import annotations

from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

#: How many times what a type can tell from 1 answers may differ in any case: near 0, a sigmoid is all rounding.
_ROUNDING: Final = 16


def agree(actual: NDArray[Any], expected: NDArray[Any], tolerance: float) -> bool:
    """Return whether an answer is the expected one, but for ``tolerance`` in parts of its largest number."""
    if expected.dtype.kind in "OSU":
        texts = [item if isinstance(item, bytes) else str(item).encode() for item in expected.flat]
        return actual.shape == expected.shape and list(actual.flat) == texts
    if expected.dtype.kind != "f":
        return bool(np.array_equal(actual, expected))
    finite = expected[np.isfinite(expected)]
    largest = float(np.max(np.abs(finite), initial=0.0))
    close = max(tolerance * largest, _ROUNDING * float(np.finfo(expected.dtype).eps) * max(largest, 1.0))
    return actual.shape == expected.shape and bool(np.allclose(actual, expected, rtol=0, atol=close, equal_nan=True))
