"""Measure what coordination between locations is worth: ``python -m serve_app.simulator.studies.cooperation``.

Each row is one policy in three runs of the full model of time: independent locations, locations that forward to each
other, and locations with placement as well. The default number of requests gives steady figures within minutes;
``--trace`` and ``--requests`` take more.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import get_args

import click

from serve_app.core.cache.model_cache import ModelCache
from serve_app.core.catalog import ModelProfile
from serve_app.core.policies.registry import POLICIES, make_policy
from serve_app.errors import EdgeServeError
from serve_app.simulator.discrete_event.results import DiscreteEventResults
from serve_app.simulator.discrete_event.settings import Coordination, DiscreteEventOptions, geographic_links
from serve_app.simulator.discrete_event.simulation import simulate_discrete_event
from serve_app.workload.locations import jensen_shannon_bits, split
from serve_app.workload.profiles import DEFAULT_PROFILES, assign, read_profiles
from serve_app.workload.spec import parse_trace
from serve_app.workload.trace import Trace

#: With the skew of their split. Every function is a source of its own: with skew 1 locations would share no model.
_DEFAULT_TRACES = (("azure-like:functions=200&minutes=120", 0.5), ("sessions:days=8", 1.0))
_BITS_PER_GBIT = 1e9
_MODES: tuple[Coordination, ...] = get_args(Coordination)


@dataclass(frozen=True, slots=True, kw_only=True)
class CooperationCase:
    """One row of the table: the same requests, policy and memory under every mode of coordination."""

    trace: Trace
    profiles: tuple[ModelProfile, ...]
    share: float
    policy: str
    seed: int
    exec_slots: int = 2

    @property
    def capacity_bytes(self) -> int:
        """Return the memory of one location."""
        return int(self.share * sum(profile.size_bytes for profile in self.profiles))

    def run(self, mode: Coordination) -> DiscreteEventResults:
        """Simulate one mode."""
        options = DiscreteEventOptions(
            make_cache=self._cache,
            coordination=mode,
            exec_slots=self.exec_slots,
            links=geographic_links(self.trace.locations, seed=self.seed),
        )
        return simulate_discrete_event(self.trace, self.profiles, options)

    def _cache(self, number: int) -> ModelCache:
        rng = random.Random(f"{self.seed}: policy of {number}")
        return ModelCache(capacity_bytes=self.capacity_bytes, policy=make_policy(self.policy, rng))


def profiles_of(
    trace: Trace, rows: Sequence[ModelProfile], *, seed: int, fetch_gbit: float | None
) -> tuple[ModelProfile, ...]:
    """Assign profiles to ``trace.models``; a load fetches the model over ``fetch_gbit`` first, unless that is None."""
    per_s = None if fetch_gbit is None else fetch_gbit * _BITS_PER_GBIT / 8
    assigned = assign(trace.models, rows, seed=seed)
    return tuple(
        profile if per_s is None else replace(profile, load_s=profile.load_s + profile.size_bytes / per_s)
        for profile in (assigned[model] for model in trace.models)
    )


def first_requests(trace: Trace, count: int) -> Trace:
    """Return the first ``count`` requests of a trace."""
    return replace(
        trace,
        arrival_s=trace.arrival_s[:count],
        model=trace.model[:count],
        source=trace.source[:count],
        location=None if trace.location is None else trace.location[:count],
    ).only_used()


@click.command()
@click.option("--trace", "traces", multiple=True, help="As edgeserve simulate takes it; two generated ones by default.")
@click.option(
    "--skew", type=click.FloatRange(0, 1), default=1.0, show_default=True, help="Of --trace: with 1 no source moves."
)
@click.option("--models", type=click.Path(path_type=Path, dir_okay=False), help="Table of models; ours by default.")
@click.option(
    "--fetch-gbit",
    type=click.FloatRange(0, min_open=True),
    default=1.0,
    show_default=True,
    help="Bandwidth over which models are fetched, in Gbit/s; ignored with --models.",
)
@click.option("--locations", type=click.IntRange(1, 1000), multiple=True, default=(4, 16), show_default=True)
@click.option(
    "--share", type=click.FloatRange(0, min_open=True), multiple=True, default=(0.10, 0.25), show_default=True
)
@click.option("--policy", type=click.Choice(list(POLICIES)), multiple=True, default=("lru", "gdsf", "edgeserve"))
@click.option("--exec-slots", type=click.IntRange(1), default=2, show_default=True, help="Executions at a time.")
@click.option("--requests", type=click.IntRange(1), default=8_000, show_default=True, help="At most, of each trace.")
@click.option("--seed", type=click.IntRange(0, 2**63), default=0, show_default=True)
def main(
    traces: Sequence[str],
    skew: float,
    models: Path | None,
    fetch_gbit: float,
    locations: Sequence[int],
    share: Sequence[float],
    policy: Sequence[str],
    exec_slots: int,
    requests: int,
    seed: int,
) -> None:
    """Print load over exec and latency with independent, forwarding and fully coordinated locations.

    A location has --share of the memory in which all models fit. "fwd/ind" and "full/ind" are ratios to independent
    locations; below 1 is better.
    """
    try:
        rows = read_profiles(models) if models is not None else DEFAULT_PROFILES
        for spec, trace_skew in [(spec, skew) for spec in traces] or _DEFAULT_TRACES:
            stream = first_requests(parse_trace(spec, seed=seed), requests)
            profiles = profiles_of(stream, rows, seed=seed, fetch_gbit=None if models is not None else fetch_gbit)
            if models is None:
                click.echo(f"\nmodels are fetched at {fetch_gbit:g} Gbit/s, then loaded")
            for count in locations:
                trace = split(stream, count, seed=seed, skew=trace_skew)
                click.echo(_heading(spec, trace, trace_skew))
                for case in _cases(trace, profiles, share, policy, seed, exec_slots):
                    click.echo(_table_row(case, {mode: case.run(mode) for mode in _MODES}))
    except (EdgeServeError, ValueError) as error:
        raise click.ClickException(str(error)) from None


def _cases(
    trace: Trace,
    profiles: tuple[ModelProfile, ...],
    shares: Sequence[float],
    policies: Sequence[str],
    seed: int,
    exec_slots: int,
) -> Iterator[CooperationCase]:
    for share in shares:
        for policy in policies:
            yield CooperationCase(
                trace=trace, profiles=profiles, share=share, policy=policy, seed=seed, exec_slots=exec_slots
            )


def _heading(spec: str, trace: Trace, skew: float) -> str:
    try:
        divergence = f"{jensen_shannon_bits(trace):.3f} bit of divergence"
    except ValueError:
        divergence = "one location with requests"
    return (
        f"\n{spec}: {len(trace):,} requests for {len(trace.models)} models in {trace.arrival_s[-1] / 3600:.1f} h, "
        f"{len(trace.locations)} locations, skew {skew:g}, {divergence}\n"
        f"{'':16}{'load over exec':^42}{'mean latency (ms)':^42}{'p99 (ms)':^26}\n"
        + f"{'memory policy':16}"
        + 2 * f"{'ind':>8}{'fwd':>8}{'full':>8}{'fwd/ind':>9}{'full/ind':>9}"
        + f"{'ind':>10}{'fwd':>8}{'full':>8}"
    )


def _table_row(case: CooperationCase, results: dict[Coordination, DiscreteEventResults]) -> str:
    loads = [results[mode].load_over_exec for mode in _MODES]
    means = [results[mode].mean_latency_s * 1e3 for mode in _MODES]
    highs = [results[mode].latency_s(0.99) * 1e3 for mode in _MODES]
    return (
        f"{case.share:>5.0%} {case.policy:10}"
        + "".join(f"{load:8.1%}" for load in loads)
        + _ratios(loads)
        + "".join(f"{mean:8.0f}" for mean in means)
        + _ratios(means)
        + "  "
        + "".join(f"{high:8.0f}" for high in highs)
    )


def _ratios(values: Sequence[float]) -> str:
    return "".join(f"{value / values[0]:9.2f}" if values[0] else f"{'-':>9}" for value in values[1:])


if __name__ == "__main__":
    main()
