"""What came out, in numbers; no I/O."""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from loadtests.compare.drive import Sample


@dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    """One side, one kind of load, one repeat; latencies are of requests that were answered.

    ``load_delay_s`` is the mean over all answered requests of what they waited for loads, see ``load_delay_s``;
    ``reported_wait_s`` the part of it that the side itself calls waiting for a model. None: nothing was answered.
    """

    requests: int
    failures: int
    failed_latency_s: float | None
    throughput_per_s: float
    miss_ratio: float | None
    p50_s: float | None
    p99_s: float | None
    p999_s: float | None
    mean_s: float | None
    exec_s: float | None
    queue_s: float | None
    load_delay_s: float | None
    reported_wait_s: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Spread:
    """Least, median and most over the repeats, and of how many."""

    least: float
    median: float
    most: float
    count: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Hits:
    """What a hit takes at one side: seconds of execution by model, and seconds in the queue."""

    exec_s: Mapping[str, float]
    queue_s: float


def percentile(values: Iterable[float], share: float) -> float | None:
    """The smallest value that at least ``share`` of all do not exceed; None of none."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)] if ordered else None


def spread(values: Iterable[float | None]) -> Spread | None:
    """Over what there is; None of nothing."""
    known = [value for value in values if value is not None]
    if not known:
        return None
    return Spread(least=min(known), median=statistics.median(known), most=max(known), count=len(known))


def hits_of(samples: Iterable[Sample], fallback: Iterable[Sample]) -> Hits:
    """What hits of these take; for models that were never hit, those of the fallback."""
    mine, other = [sample for sample in samples if sample.outcome == "hit"], list(fallback)
    exec_s = {**_mean_exec(sample for sample in other if sample.outcome == "hit"), **_mean_exec(mine)}
    return Hits(exec_s=exec_s, queue_s=statistics.fmean([sample.queue_s for sample in mine or other] or [0.0]))


def load_delay_s(samples: Sequence[Sample], hits: Hits) -> float | None:
    """Mean over all answered requests of what they waited for loads; None if none was answered.

    A request that found its model waited for none. Of one that did not, it is the wait that the side reports, and
    what its execution and its queue took longer than those of hits: a load that puts work off until the first
    execution does not get it for nothing. It is never taken to be less than what the side reports.
    """
    answered = [sample for sample in samples if not sample.is_failed]
    if not answered:
        return None
    misses = [sample for sample in answered if sample.is_miss]
    reported_s = sum(sample.wait_s for sample in misses)
    more_s = sum(
        sample.exec_s - hits.exec_s.get(sample.model, sample.exec_s) + sample.queue_s - hits.queue_s
        for sample in misses
    )
    return max(reported_s, reported_s + more_s) / len(answered)


def figures(samples: Sequence[Sample], hits: Hits) -> Figures:
    """The figures of one slice."""
    answered = [sample for sample in samples if not sample.is_failed]
    latencies_s = [sample.latency_s for sample in answered]
    lasted_s = max((sample.done_s for sample in samples), default=0.0)
    return Figures(
        requests=len(samples),
        failures=len(samples) - len(answered),
        failed_latency_s=_mean(sample.latency_s for sample in samples if sample.is_failed),
        throughput_per_s=len(answered) / lasted_s if lasted_s else 0.0,
        miss_ratio=_mean(float(sample.is_miss) for sample in answered),
        p50_s=percentile(latencies_s, 0.5),
        p99_s=percentile(latencies_s, 0.99),
        p999_s=percentile(latencies_s, 0.999),
        mean_s=_mean(latencies_s),
        exec_s=_mean(sample.exec_s for sample in answered),
        queue_s=_mean(sample.queue_s for sample in answered),
        load_delay_s=load_delay_s(samples, hits),
        reported_wait_s=_mean(sample.wait_s for sample in answered),
    )


def how_many_times(ours: float | None, theirs: float | None, *, more_is_better: bool = False) -> float | None:
    """How many times better we are than they; None where one of them is unknown, or nothing."""
    if not ours or not theirs:
        return None
    return ours / theirs if more_is_better else theirs / ours


def models_at_once(models: int, share: float) -> int:
    """How many models a server that counts them may hold with memory for a share of their bytes: never fewer.

    Memory over mean size is ``share * models``; it is rounded up, in favor of the server.
    """
    if not 0 < share <= 1 or models < 1:
        raise ValueError(f"share must be above 0 and at most 1, and there must be models, not {share} and {models}")
    return max(1, math.ceil(round(share * models, 9)))


@dataclass(frozen=True, slots=True, kw_only=True)
class Aim:
    """How many times better EdgeServe should be than a side, in which figure, under which load."""

    side: str
    figure: str
    kind: str
    least: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """An aim and what came out. ``reached`` is the median over the aim, None if the side is missing."""

    aim: Aim
    came_out: Spread | None

    @property
    def reached(self) -> float | None:
        """1 or more: met."""
        return None if self.came_out is None else self.came_out.median / self.aim.least

    def __str__(self) -> str:
        """In words."""
        if self.reached is None or self.came_out is None:
            return "not measured"
        if self.reached >= 1:
            return f"met, {self.reached:.2g} times over"
        return f"missed: {self.came_out.median:.3g} of {self.aim.least:g}, {self.reached:.0%} of the aim"


def _mean_exec(samples: Iterable[Sample]) -> dict[str, float]:
    by_model: defaultdict[str, list[float]] = defaultdict(list)
    for sample in samples:
        by_model[sample.model].append(sample.exec_s)
    return {model: statistics.fmean(seconds) for model, seconds in by_model.items()}


def _mean(values: Iterable[float]) -> float | None:
    known = list(values)
    return statistics.fmean(known) if known else None
