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
class ResultRow:
    """One policy with one capacity on one workload.

    Ratios to the execution time are ``None`` where executions take no time. ``hits``, ``misses``, ``joins`` and
    ``forwards`` add up to ``requests``.

    Attributes:
        capacity_bytes: memory of each location.
        capacity_share: the same as a share of the summed sizes of all models.
        rejected: the misses for a model larger than the memory.
        wasted_preloads: the preloads whose model was evicted before a request for it.
        load_s_per_request: mean seconds that a request waited for loads.
        load_over_exec: the same over the mean execution time.
        compulsory_load_over_exec: the same if each model were loaded once, by every location with requests for it, or
            in the full model of time by one of them.
        preload_s_per_request: seconds of background loads per request; no request waited for them.
        preload_over_exec: the same over the mean execution time.
        coordination: between locations, as in ``DiscreteEventOptions``.
        forms: how the forms of models were chosen; empty where models have but one.
        form_changes: models that went over to another form, while in memory.
        background_load_over_exec: the seconds of all loads that no request started, preloads and changes of form, over
            those of executions.
        wall_s: duration of the replay.
        requests_per_s: requests that the simulator replayed in a second.
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
    forms: str
    form_changes: int
    background_load_over_exec: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Latency:
    """Mean and percentiles of the seconds that requests took."""

    mean_s: float
    p50_s: float
    p99_s: float

    @classmethod
    def of(cls, each_s: Iterable[float], counted_s: Counter[float]) -> Latency:
        """Compute them over single latencies and counted latencies, together at least one.

        A percentile is the least latency that at least this share of the requests does not exceed.
        """
        values = np.concatenate([np.fromiter(each_s, np.float64), np.fromiter(counted_s, np.float64)])
        counts = np.concatenate(
            [np.ones(len(values) - len(counted_s), np.int64), np.fromiter(counted_s.values(), np.int64)]
        )
        order = np.argsort(values)
        values, up_to = values[order], np.cumsum(counts[order])
        p50_s, p99_s = (float(values[np.searchsorted(up_to, share * up_to[-1])]) for share in (0.50, 0.99))
        return cls(mean_s=float(values @ counts[order] / up_to[-1]), p50_s=p50_s, p99_s=p99_s)


class ReplayCounts(Protocol):
    """The counters of every model of time; names as in ``ResultRow``, seconds summed over all requests."""

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
    form_changes: int
    form_change_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplayResult:
    """The counters and measurements of one replay."""

    counts: ReplayCounts
    forwards: int
    wall_s: float
    latency: Latency
    compulsory_load_s: float
    coordination: str = "none"


def make_row(
    workload: Workload, result: ReplayResult, *, policy: str, capacity_bytes: int, capacity_share: float, time: str
) -> ResultRow:
    """Make the row of one replay."""
    counts, latency = result.counts, result.latency
    requests = counts.requests
    return ResultRow(
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
        forwards=result.forwards,
        preloads=counts.preloads,
        evictions=counts.evictions,
        load_s_per_request=counts.load_s / requests,
        load_over_exec=_ratio(counts.load_s, counts.exec_s),
        compulsory_load_over_exec=_ratio(result.compulsory_load_s, counts.exec_s),
        mean_latency_s=latency.mean_s,
        p50_s=latency.p50_s,
        p99_s=latency.p99_s,
        wall_s=result.wall_s,
        requests_per_s=requests / result.wall_s,
        time=time,
        seed=workload.seed,
        rejected=counts.rejected,
        wasted_preloads=counts.wasted_preloads,
        preload_s_per_request=counts.preload_s / requests,
        preload_over_exec=_ratio(counts.preload_s, counts.exec_s),
        coordination=result.coordination,
        forms=workload.forms,
        form_changes=counts.form_changes,
        background_load_over_exec=_ratio(counts.preload_s + counts.form_change_s, counts.exec_s),
    )


def compulsory_load_s(workload: Workload, *, shared: bool) -> float:
    """Sum the seconds of loading every model once.

    Args:
        workload: the models and the requests for them.
        shared: one location loads a model for all; otherwise every location with requests for it does.
    """
    trace = workload.trace
    pairs = column(trace.model).astype(np.int64)
    if trace.location is not None and not shared:
        pairs += len(trace.models) * column(trace.location).astype(np.int64)
    models: list[int] = (np.unique(pairs) % len(trace.models)).tolist()
    return sum(workload.profiles[model].load_s for model in models)


def _ratio(load_s: float, exec_s: float) -> float | None:
    return load_s / exec_s if exec_s else None
