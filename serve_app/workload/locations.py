"""A trace split over locations by the source of each request, and how much the locations of a trace differ."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import combinations
from typing import Any

import numpy as np
from numpy.typing import NDArray

from serve_app.workload.seeded_random import SeededRandom
from serve_app.workload.trace import Trace, column, indices


def split(
    trace: Trace,
    locations: int | None,
    *,
    seed: int,
    skew: float = 1.0,
    weights: tuple[float, ...] = (1.0,),
) -> Trace:
    """Spread the same requests over the locations ``loc0``, ``loc1`` and so on.

    Args:
        trace: its own locations are replaced, unless ``locations`` is None.
        locations: their number; None leaves the trace as it is.
        seed: the same seed gives the same split.
        skew: difference of the locations, 0..1: the share of requests that come from the home of their source. The
            others come from a random location: 0 is a random split, with 1 a source never moves.
        weights: relative load of the locations, repeated when there are fewer than locations, e.g. (23, 7, 1, 5, 3).

    Raises:
        ValueError: an argument is out of its range.
    """
    if locations is None:
        return trace
    if locations < 1:
        raise ValueError(f"locations must be at least 1, not {locations}")
    if not 0 <= skew <= 1:
        raise ValueError(f"skew must be from 0 to 1, not {skew}")
    if not weights or not all(0 < weight < math.inf for weight in weights):
        raise ValueError(f"weights must be positive and finite, not {weights}")
    load = np.resize(np.array(weights, dtype=np.float64), locations)
    # Sources are numbered, but their numbers may be far apart.
    sources, source = np.unique(column(trace.source), return_inverse=True)
    home = SeededRandom(seed, "homes").pick(load, len(sources))[source]
    anywhere = SeededRandom(seed, "elsewhere").pick(load, len(trace))
    at_home = SeededRandom(seed, "away").uniform(len(trace)) < skew
    names = tuple(f"loc{number}" for number in range(locations))
    return replace(trace, locations=names, location=indices(np.where(at_home, home, anywhere)))


def jensen_shannon_bits(trace: Trace) -> float:
    """Return the mean Jensen-Shannon divergence (Lin 1991) between the model popularities of two locations.

    0 bit if the popularity is the same everywhere, 1 bit if no model is requested at two locations. Locations without
    requests are left out. Few requests per model look like differences, so compare with a random split.

    Raises:
        ValueError: fewer than two locations have requests.
    """
    location = column(trace.location) if trace.location is not None else np.zeros(len(trace), dtype=np.uintc)
    cells = location.astype(np.int64) * len(trace.models) + column(trace.model)
    table = np.bincount(cells, minlength=len(trace.locations) * len(trace.models)).reshape(len(trace.locations), -1)
    table = table[table.sum(axis=1) > 0]
    if len(table) < 2:
        raise ValueError("fewer than two locations have requests")
    shares = table / table.sum(axis=1, keepdims=True)
    divergences = [
        _entropy((one + other) / 2) - (_entropy(one) + _entropy(other)) / 2 for one, other in combinations(shares, 2)
    ]
    return float(np.mean(divergences))


def _entropy(shares: NDArray[Any]) -> float:
    positive = shares[shares > 0]
    return float(-(positive * np.log2(positive)).sum())
