"""The result of one replay: a row with the columns that every output of the simulator has."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from serve_app.simulator.scenario import Workload
from serve_app.workload.trace import column


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One policy with one capacity on one workload.

    Ratios to the execution time are ``None`` where executions take no time. ``hits``, ``misses``, ``joins`` and
    ``forwards`` add up to ``requests``.

    Attributes:
        capacity_bytes: of each location.
        capacity_share: the same as a share of the summed sizes of all models.
        rejected: those of the misses that asked for a model larger than the memory.
        wasted_preloads: those of the preloads that went again before anybody asked.
        load_s_per_request: seconds that a request waited for loads, in the mean.
        load_over_exec: the same over the mean execution time.
        compulsory_load_over_exec: what it would be if each model were loaded once, by every location that asks for
            it, or in the full model of time by one of them.
        preload_s_per_request: seconds that background loads took, per request; nobody waited for them.
        preload_over_exec: the same over the mean execution time.
        coordination: what locations had to do with each other, as in ``DiscreteEventOptions``.
        wall_s: how long the replay took.
        requests_per_s: how many requests the simulator replayed in a second.
    """

    trace: str
    policy: str
    capacity_bytes: int
    capacity_share: float
    locations: int
    requests: int
    models: int
    hits: int
    misses: int
    joins: int
    forwards: int
    preloads: int
    evictions: int
    load_s_per_request: float
    load_over_exec: float | None
    compulsory_load_over_exec: float | None
    mean_latency_s: float
    p50_s: float
    p99_s: float
    wall_s: float
    requests_per_s: float
    time: str
    seed: int
    rejected: int
    wasted_preloads: int
    preload_s_per_request: float
    preload_over_exec: float | None
    coordination: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Latency:
    """Seconds that requests took."""

    mean_s: float
    p50_s: float
    p99_s: float

    @classmethod
    def of(cls, each_s: Iterable[float], counted_s: Counter[float]) -> Latency:
        """Over latencies one by one and latencies with their numbers, together at least one.

        A percentile is the least latency that no fewer than so many of the requests keep to.
        """
        values = np.concatenate([np.fromiter(each_s, np.float64), np.fromiter(counted_s, np.float64)])
        counts = np.concatenate(
            [np.ones(len(values) - len(counted_s), np.int64), np.fromiter(counted_s.values(), np.int64)]
        )
        order = np.argsort(values)
        values, up_to = values[order], np.cumsum(counts[order])
        p50_s, p99_s = (float(values[np.searchsorted(up_to, share * up_to[-1])]) for share in (0.50, 0.99))
        return cls(mean_s=float(values @ counts[order] / up_to[-1]), p50_s=p50_s, p99_s=p99_s)


class Counts(Protocol):
    """What every replay counts, whatever its model of time; names as in ``Row``, seconds summed over all requests."""

    requests: int
    hits: int
    misses: int
    joins: int
    rejected: int
    preloads: int
    wasted_preloads: int
    evictions: int
    load_s: float
    preload_s: float
    exec_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class CellResult:
    """All that a replay tells."""

    counts: Counts
    forwards: int
    wall_s: float
    latency: Latency
    compulsory_load_s: float
    coordination: str = "none"


def row_of(
    workload: Workload, outcome: CellResult, *, policy: str, capacity_bytes: int, capacity_share: float, time: str
) -> Row:
    """The row of one replay."""
    counts, latency = outcome.counts, outcome.latency
    requests = counts.requests
    return Row(
        trace=workload.trace.name,
        policy=policy,
        capacity_bytes=capacity_bytes,
        capacity_share=capacity_share,
        locations=len(workload.trace.locations),
        requests=requests,
        models=len(workload.trace.models),
        hits=counts.hits,
        misses=counts.misses,
        joins=counts.joins,
        forwards=outcome.forwards,
        preloads=counts.preloads,
        evictions=counts.evictions,
        load_s_per_request=counts.load_s / requests,
        load_over_exec=_ratio(counts.load_s, counts.exec_s),
        compulsory_load_over_exec=_ratio(outcome.compulsory_load_s, counts.exec_s),
        mean_latency_s=latency.mean_s,
        p50_s=latency.p50_s,
        p99_s=latency.p99_s,
        wall_s=outcome.wall_s,
        requests_per_s=requests / outcome.wall_s,
        time=time,
        seed=workload.seed,
        rejected=counts.rejected,
        wasted_preloads=counts.wasted_preloads,
        preload_s_per_request=counts.preload_s / requests,
        preload_over_exec=_ratio(counts.preload_s, counts.exec_s),
        coordination=outcome.coordination,
    )


def compulsory_load_s(workload: Workload, *, shared: bool) -> float:
    """Seconds of loading every model once.

    Args:
        workload: whose models.
        shared: one location that has a model is enough for all; else every location that asks for it has to load it.
    """
    trace = workload.trace
    pairs = column(trace.model).astype(np.int64)
    if trace.location is not None and not shared:
        pairs += len(trace.models) * column(trace.location).astype(np.int64)
    models: list[int] = (np.unique(pairs) % len(trace.models)).tolist()
    return sum(workload.profiles[model].load_s for model in models)


def _ratio(load_s: float, exec_s: float) -> float | None:
    return load_s / exec_s if exec_s else None
