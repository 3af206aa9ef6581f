"""Measure each part of the ``edgeserve`` policy: variants without one part, beside the full policy and the oracle.

python -m serve_app.simulator.studies.ablation [--data DIR] [--seeds N]
"""

from __future__ import annotations

import itertools
import os
import random
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from statistics import geometric_mean
from typing import ClassVar

import click
from rich.console import Console

from serve_app.core.cache.model_cache import ModelCache
from serve_app.core.catalog import ModelProfile
from serve_app.core.policies.base import EvictionPolicy
from serve_app.core.policies.edgeserve import EdgeServe
from serve_app.core.policies.rate_forecast import RateForecast, RequestHistory
from serve_app.simulator.load_delay import replay
from serve_app.simulator.oracles import BeladyAm, next_uses
from serve_app.simulator.result_table import figures_table
from serve_app.simulator.runner import MAX_PRELOADS
from serve_app.simulator.scenario import make_workload
from serve_app.simulator.studies.reference_workload import find_reference

SHARES = (0.1, 0.25, 0.5)


class _FixedMemories(RateForecast):
    """The rates have these weights whatever happens."""

    weights: ClassVar[tuple[float, float, float]]

    def request(self, known: RequestHistory, now: float) -> None:
        super().request(known, now)
        self._weights = self.weights


class _ShortMemory(_FixedMemories):
    weights = (1.0, 0.0, 1e-3)


class _EndlessMemory(_FixedMemories):
    weights = (0.0, 0.0, 1.0)


class _Variant(EdgeServe):
    """The full policy, of which subclasses leave out one part."""

    predictor: ClassVar[type[RateForecast]] = RateForecast

    def _make_forecast(self, now: float) -> RateForecast:
        if self._forecast is None:
            self._forecast = self.predictor(short_s=self._short_s, long_s=self._long_s, now=now)
        return self._forecast


class _Trusting(_Variant):
    """Relies on preloads however busy the background is."""

    def _weigh_ages(self, now: float) -> None:
        pass


class _NoAges(_Trusting):
    def _make_forecast(self, now: float) -> RateForecast:
        predictor = super()._make_forecast(now)
        predictor.age_weight = 0.0
        return predictor


class _OnlyShort(_Variant):
    predictor = _ShortMemory


class _OnlyEndless(_Variant):
    predictor = _EndlessMemory


class _NoCatalog(_Variant):
    def on_catalog(self, models: Iterable[ModelProfile], now: float) -> None:
        pass


class _NoSparing(_Variant):
    trim_victims = False


class _NoLead(_Variant):
    """Predicts for this moment instead of the time at which a load would end."""

    def on_catalog(self, models: Iterable[ModelProfile], now: float) -> None:
        super().on_catalog(models, now)
        for tracked in self._tracked.values():
            tracked.lead_s = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class _AblationCase:
    name: str
    make: Callable[[random.Random], EdgeServe]
    max_preloads: int = MAX_PRELOADS


CASES = (
    _AblationCase(name="full policy", make=_Variant),
    _AblationCase(name="without preloading, hence without ages", make=EdgeServe, max_preloads=0),
    _AblationCase(name="without preloading, but with ages", make=_Trusting, max_preloads=0),
    _AblationCase(name="without preloading models that had no request yet", make=_NoCatalog),
    _AblationCase(name="without ages (step 2)", make=_NoAges),
    _AblationCase(name="short memory only", make=_OnlyShort),
    _AblationCase(name="endless memory only", make=_OnlyEndless),
    _AblationCase(name="without looking ahead", make=_NoLead),
    _AblationCase(name="without sparing small models", make=_NoSparing),
    _AblationCase(name="with margin 1", make=lambda rng: _Variant(rng, margin=1.0)),
    _AblationCase(name="preloading two at a time", make=_Variant, max_preloads=2),
    _AblationCase(name="preloading one at a time", make=_Variant, max_preloads=1),
    _AblationCase(name="one at a time, relying on it all the same", make=_Trusting, max_preloads=1),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class _TraceSource:
    trace: str
    models: Path | None


@dataclass(frozen=True, slots=True)
class _AblationResult:
    """Load over exec of each case at each share of memory, relative to the oracle, and background loads over exec."""

    to_oracle: tuple[tuple[float, ...], ...]
    preload_over_exec: tuple[float, ...]


def _measure(stream: _TraceSource, seed: int) -> _AblationResult:
    workload = make_workload(trace=stream.trace, models=stream.models, seed=seed)
    upcoming = next_uses(workload.trace.model)
    all_bytes = sum(profile.size_bytes for profile in workload.profiles)

    def play(policy: EvictionPolicy, share: float, max_preloads: int) -> tuple[float, float]:
        cache = ModelCache(capacity_bytes=int(share * all_bytes), policy=policy, max_preloads=max_preloads)
        results = replay(workload.trace, workload.profiles, lambda _: cache)
        return results.load_s / results.exec_s, results.preload_s / results.exec_s

    oracle = [play(BeladyAm(upcoming), share, 0)[0] for share in SHARES]
    results = [[play(case.make(random.Random(seed)), share, case.max_preloads) for share in SHARES] for case in CASES]
    return _AblationResult(
        tuple(tuple(ours / best for (ours, _), best in zip(row, oracle, strict=True)) for row in results),
        tuple(sum(preloads for _, preloads in row) / len(row) for row in results),
    )


@click.command()
@click.option("--data", type=click.Path(path_type=Path), help="Folder of the reference trace and its profiles.")
@click.option("--seeds", default=2, show_default=True, type=click.IntRange(1), help="Seeds to average over.")
def main(data: Path | None, seeds: int) -> None:
    """Print what each part of the edgeserve policy buys, as load over exec relative to belady-am (less is better)."""
    console = Console()
    reference = find_reference(data)
    if reference.warning:
        console.print(reference.warning, style="yellow")
    streams = {
        "reference": _TraceSource(trace=reference.trace, models=reference.models),
        "azure-like": _TraceSource(trace="azure-like:", models=reference.models),
        "sessions": _TraceSource(trace="sessions:", models=reference.models),
    }
    jobs = [(stream, seed) for stream in streams.values() for seed in range(seeds)]
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        results = list(pool.map(_measure, *zip(*jobs, strict=True)))
    headers = [f"{name} {share:.0%}" for name, share in itertools.product(streams, SHARES)]
    table = figures_table(
        "load over exec / belady-am, geometric mean over seeds", [*headers, "background loads / exec"]
    )
    for number, case in enumerate(CASES):
        cells = [
            geometric_mean(result.to_oracle[number][column] for result in results[first : first + seeds])
            for first in range(0, len(results), seeds)
            for column in range(len(SHARES))
        ]
        preloads = sum(result.preload_over_exec[number] for result in results) / len(results)
        table.add_row(case.name, *(f"{cell:.2f}" for cell in cells), f"{preloads:.1f}")
    console.width = max(console.width, 200)
    console.print(table)


if __name__ == "__main__":
    main()
