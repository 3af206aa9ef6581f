"""Seeded random columns.

They come from ``random.Random`` and arithmetic. The streams of numpy's generators may change from one version of numpy
to the next, but a seed in a report must always mean the same requests.
"""

from __future__ import annotations

import math
import random

import numpy as np
from numpy.typing import NDArray

Column = NDArray[np.float64]


class SeededRandom:
    """Independent draws, the same for a seed and a purpose whatever is drawn for other purposes."""

    def __init__(self, seed: int, purpose: str) -> None:
        self._rng = random.Random(f"{seed}: {purpose}")

    def uniform(self, count: int) -> Column:
        """Draw numbers in [0, 1)."""
        if not count:
            return np.empty(0)
        bits = np.frombuffer(self._rng.randbytes(8 * count), dtype="<u8") >> np.uint64(11)
        return np.asarray(bits * 2.0**-53, dtype=np.float64)

    def exponential(self, count: int) -> Column:
        """Draw gaps of a Poisson process, with mean 1."""
        return np.asarray(-np.log1p(-self.uniform(count)))

    def normal(self, count: int) -> Column:
        """Draw standard normal numbers (Box and Muller 1958)."""
        radius = np.sqrt(2 * self.exponential(count))
        return np.asarray(radius * np.cos(2 * math.pi * self.uniform(count)))

    def gamma_gaps(self, cv: float, count: int) -> Column:
        """Draw gaps of a gamma renewal process, with mean 1 and coefficient of variation ``cv`` > 0."""
        shape = cv**-2
        return self._gamma(shape, count) / shape

    def order(self, count: int) -> NDArray[np.intp]:
        """Shuffle the numbers below ``count``."""
        return np.asarray(np.argsort(self.uniform(count), kind="stable"))

    def pick(self, weights: Column, count: int) -> NDArray[np.intp]:
        """Draw indices into ``weights``, each in proportion to its weight."""
        cumulative = np.cumsum(weights)
        found = np.searchsorted(cumulative, self.uniform(count) * cumulative[-1], side="right")
        # Rounding may carry a draw beyond the last sum.
        return np.asarray(np.minimum(found, len(weights) - 1))

    def _gamma(self, shape: float, count: int) -> Column:
        """Draw gamma variates with scale 1 (Marsaglia and Tsang 2000)."""
        if shape < 1:
            boost = (1 - self.uniform(count)) ** (1 / shape)
            return np.asarray(self._gamma(shape + 1, count) * boost)
        d = shape - 1 / 3
        accepted = np.empty(0)
        while len(accepted) < count:
            missing = count - len(accepted)
            x = self.normal(missing + missing // 16 + 4)
            v = (1 + x / math.sqrt(9 * d)) ** 3
            log_u = -self.exponential(len(x))
            x, v, log_u = x[v > 0], v[v > 0], log_u[v > 0]
            accepted = np.append(accepted, d * v[log_u < x * x / 2 + d * (1 - v + np.log(v))])
        return accepted[:count]
