"""What each part of the ``edgeserve`` policy buys: the policy with one part taken out, beside the whole and the oracle.

python -m serve_app.simulator.studies.ablation [--data DIR] [--seeds N]
"""

from __future__ import annotations

import itertools
import math
import os
import random
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import click
from rich.console import Console
from rich.table import Table

from serve_app.core.cache.model_cache import ModelCache
from serve_app.core.catalog import ModelProfile
from serve_app.core.policies.base import EvictionPolicy
from serve_app.core.policies.edgeserve import EdgeServe
from serve_app.core.policies.rate_forecast import RateForecast, RequestHistory
from serve_app.simulator.load_delay import replay
from serve_app.simulator.oracles import BeladyAm, next_uses
from serve_app.simulator.runner import MAX_PRELOADS
from serve_app.simulator.scenario import make_workload
from serve_app.simulator.studies.reference_workload import find_reference

SHARES = (0.1, 0.25, 0.5)


class _FixedMemories(RateForecast):
    """The memories have these weights whatever happens."""

    weights: ClassVar[tuple[float, float, float]]

    def request(self, known: RequestHistory, now: float) -> None:
        super().request(known, now)
        self._weights = self.weights


class _ShortMemory(_FixedMemories):
    weights = (1.0, 0.0, 1e-3)


class _EndlessMemory(_FixedMemories):
    weights = (0.0, 0.0, 1.0)


class _Variant(EdgeServe):
    """The whole policy, with room to take a part out."""

    predictor: ClassVar[type[RateForecast]] = RateForecast

    def _make_forecast(self, now: float) -> RateForecast:
        if self._forecast is None:
            self._forecast = self.predictor(short_s=self._short_s, long_s=self._long_s, now=now)
        return self._forecast


class _Trusting(_Variant):
    """Relies on fetching models again however busy the background is."""

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


class _NoCatalogue(_Variant):
    def on_catalog(self, models: Iterable[ModelProfile], now: float) -> None:
        pass


class _NoSparing(_Variant):
    trim_victims = False


class _NoLead(_Variant):
    """Looks at this very moment instead of the time that it takes to bring a model in."""

    def on_catalog(self, models: Iterable[ModelProfile], now: float) -> None:
        super().on_catalog(models, now)
        for known in self._known.values():
            known.lead_s = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class _Part:
    name: str
    make: Callable[[random.Random], EdgeServe]
    max_preloads: int = MAX_PRELOADS


PARTS = (
    _Part(name="whole", make=_Variant),
    _Part(name="without preloading, hence without ages", make=EdgeServe, max_preloads=0),
    _Part(name="without preloading, but with ages", make=_Trusting, max_preloads=0),
    _Part(name="without preloading what nobody has asked for yet", make=_NoCatalogue),
    _Part(name="without ages (step 2)", make=_NoAges),
    _Part(name="short memory only", make=_OnlyShort),
    _Part(name="endless memory only", make=_OnlyEndless),
    _Part(name="without looking ahead", make=_NoLead),
    _Part(name="without sparing small models", make=_NoSparing),
    _Part(name="with margin 1", make=lambda rng: _Variant(rng, margin=1.0)),
    _Part(name="preloading two at a time", make=_Variant, max_preloads=2),
    _Part(name="preloading one at a time", make=_Variant, max_preloads=1),
    _Part(name="one at a time, relying on it all the same", make=_Trusting, max_preloads=1),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Stream:
    trace: str
    models: Path | None


@dataclass(frozen=True, slots=True)
class _Result:
    """Load over exec of each part at each share of memory, relative to the oracle, and background loads over exec."""

    to_oracle: tuple[tuple[float, ...], ...]
    preload_over_exec: tuple[float, ...]


def _measure(stream: _Stream, seed: int) -> _Result:
    workload = make_workload(trace=stream.trace, models=stream.models, seed=seed)
    upcoming = next_uses(workload.trace.model)
    all_bytes = sum(profile.size_bytes for profile in workload.profiles)

    def play(policy: EvictionPolicy, share: float, max_preloads: int) -> tuple[float, float]:
        cache = ModelCache(capacity_bytes=int(share * all_bytes), policy=policy, max_preloads=max_preloads)
        tally = replay(workload.trace, workload.profiles, lambda _: cache)
        return tally.load_s / tally.exec_s, tally.preload_s / tally.exec_s

    oracle = [play(BeladyAm(upcoming), share, 0)[0] for share in SHARES]
    results = [[play(part.make(random.Random(seed)), share, part.max_preloads) for share in SHARES] for part in PARTS]
    return _Result(
        tuple(tuple(ours / best for (ours, _), best in zip(row, oracle, strict=True)) for row in results),
        tuple(sum(preloads for _, preloads in row) / len(row) for row in results),
    )


def _mean(values: Iterable[float]) -> float:
    """Geometric."""
    logs = [math.log(value) for value in values]
    return math.exp(sum(logs) / len(logs))


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
        "reference": _Stream(trace=reference.trace, models=reference.models),
        "azure-like": _Stream(trace="azure-like:", models=reference.models),
        "sessions": _Stream(trace="sessions:", models=reference.models),
    }
    jobs = [(stream, seed) for stream in streams.values() for seed in range(seeds)]
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        results = list(pool.map(_measure, *zip(*jobs, strict=True)))
    table = Table(box=None, header_style="bold")
    table.add_column("load over exec / belady-am, geometric mean over seeds")
    for name, share in itertools.product(streams, SHARES):
        table.add_column(f"{name} {share:.0%}", justify="right")
    table.add_column("background loads / exec", justify="right")
    for number, part in enumerate(PARTS):
        cells = [
            _mean(result.to_oracle[number][column] for result in results[first : first + seeds])
            for first in range(0, len(results), seeds)
            for column in range(len(SHARES))
        ]
        preloads = sum(result.preload_over_exec[number] for result in results) / len(results)
        table.add_row(part.name, *(f"{cell:.2f}" for cell in cells), f"{preloads:.1f}")
    console.width = max(console.width, 200)
    console.print(table)


if __name__ == "__main__":
    main()
