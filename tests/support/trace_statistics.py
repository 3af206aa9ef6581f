"""Figures by which the tests compare generated request streams with recorded ones: pure functions of a trace."""

from __future__ import annotations

from collections import OrderedDict

import numpy as np
from numpy.typing import NDArray

from serve_app.workload.trace import Trace, column

Numbers = NDArray[np.float64]

#: No popularity is steeper than this: nearly all requests go to one model.
_STEEPEST = 50.0


def counts(trace: Trace) -> NDArray[np.intp]:
    """Requests of every model, in the order of ``trace.models``."""
    return np.bincount(column(trace.model), minlength=len(trace.models))


def zipf_mle(trace: Trace) -> float:
    """The exponent of the Zipf law over as many ranks as there are models that makes the counts most likely.

    0 if all models are equally popular. The likeliest exponent is the one whose mean log rank is that of the requests.

    Raises:
        ValueError: fewer than two models.
    """
    ranked = np.sort(counts(trace))[::-1]
    if len(ranked) < 2:
        raise ValueError("a Zipf law needs at least two models")
    logs = np.log(np.arange(1, len(ranked) + 1))
    wanted = float(ranked @ logs / ranked.sum())
    low, high = 0.0, _STEEPEST
    for _ in range(60):
        middle = (low + high) / 2
        weights = np.exp(-middle * logs)
        if weights @ logs / weights.sum() > wanted:
            low = middle
        else:
            high = middle
    return low


def top_share(trace: Trace, *, share: float) -> float:
    """What share of the requests goes to the most popular ``share`` of the models (at least one)."""
    ranked = np.sort(counts(trace))[::-1]
    return float(ranked[: _models_in(trace, share)].sum() / len(trace))


def log10_count_deviation(trace: Trace) -> float:
    """Standard deviation of the decimal logarithms of the models' requests."""
    return float(np.log10(counts(trace)).std())


def iat_cvs(trace: Trace) -> Numbers:
    """For every model with at least three requests: standard deviation over mean of the times between them.

    0 is a clock, 1 a Poisson process, more is bursty. Models that are asked for at one instant only are left out.
    """
    order = np.argsort(column(trace.model), kind="stable")
    model, arrival_s = column(trace.model)[order], column(trace.arrival_s)[order]
    same = model[1:] == model[:-1]
    owner, gaps = model[1:][same], np.diff(arrival_s)[same]
    number = np.bincount(owner, minlength=len(trace.models))
    mean = np.bincount(owner, gaps, len(trace.models)) / np.maximum(number, 1)
    variance = np.bincount(owner, (gaps - mean[owner]) ** 2, len(trace.models)) / np.maximum(number, 1)
    enough = (number >= 2) & (mean > 0)
    return np.asarray(np.sqrt(variance[enough]) / mean[enough])


def reuse_distances(trace: Trace) -> NDArray[np.intp]:
    """For every request but the first of each model: how many models were asked for since that model's last request.

    The model itself counts, so 1 is a request for the same model as the one before, and LRU over models of one size
    hits if and only if the distance is no greater than what fits. Takes time in proportion to requests x distance.
    """
    recent: list[int] = []
    seen: set[int] = set()
    distances: list[int] = []
    for model in trace.model:
        if model in seen:
            place = recent.index(model)
            distances.append(place + 1)
            del recent[place]
        seen.add(model)
        recent.insert(0, model)
    return np.array(distances, dtype=np.intp)


def lru_hit_ratio(trace: Trace, *, share: float) -> float:
    """Hits per request of one LRU cache that holds ``share`` of the models (at least one), all of the same size."""
    capacity, hits = _models_in(trace, share), 0
    cache: OrderedDict[int, None] = OrderedDict()
    for model in trace.model:
        if model in cache:
            hits += 1
            cache.move_to_end(model)
            continue
        cache[model] = None
        if len(cache) > capacity:
            cache.popitem(last=False)
    return hits / len(trace)


def repeat_share(trace: Trace) -> float:
    """How many requests ask for the same model as the one before, as a share of all but the first."""
    model = column(trace.model)
    return float(np.mean(model[1:] == model[:-1]))


def source_repeat_share(trace: Trace) -> float:
    """How many requests ask for the same model as the one before of the same source, as a share of those with one.

    Raises:
        ValueError: no source asks twice.
    """
    order = np.argsort(column(trace.source), kind="stable")
    source, model = column(trace.source)[order], column(trace.model)[order]
    follows = source[1:] == source[:-1]
    if not follows.any():
        raise ValueError("no source asks twice")
    return float(np.mean((model[1:] == model[:-1])[follows]))


def _models_in(trace: Trace, share: float) -> int:
    if not 0 < share <= 1:
        raise ValueError(f"share must be above 0 and at most 1, not {share}")
    return max(1, round(share * len(trace.models)))
