"""Measure decision speed: ``edgeserve simulate --benchmark`` or ``python -m serve_app.simulator.studies.speed``.

Two tables. The first has the requests per second of every policy in a replay of the reference workload. The second
shows how the costs of a request and of an eviction grow with the number of resident models. Everything runs on one core
and is measured three times. The best run counts, because a disturbance of the machine only slows a run.
"""

from __future__ import annotations

import gc
import time
from array import array
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import click
from rich.console import Console
from rich.table import Table

from serve_app.core.cache.decisions import Hit, Load, StartLoad
from serve_app.core.cache.events import TICK, LoadEnded
from serve_app.core.cache.model_cache import ModelCache
from serve_app.core.catalog import ModelProfile
from serve_app.simulator.result_table import figures_table
from serve_app.simulator.runner import MAX_PRELOADS, ExperimentPlan, ReplaySpec, run_replay
from serve_app.simulator.scenario import ALL_POLICIES, Capacity, PolicyChoice, Workload, cache_maker
from serve_app.simulator.studies.reference_workload import Reference, find_reference
from serve_app.workload.trace import Trace
from serve_app.workload.zipf import ZipfWorkload

_RUNS = 3
_SHARES = (0.10, 0.25, 0.50)

#: Models that fit into the memory, and models of the workload for each of these. With an exponent below 1, Zipf's law
#: is the same at every scale: the share of requests for the more popular half is 2^(exponent - 1) for any number of
#: models, and so the miss ratio is about the same as well.
_RESIDENT = (100, 1_000, 10_000)
_MODELS_PER_RESIDENT = 2
_EXPONENT = 0.8
_RATE_PER_S = 10.0
_MODEL_BYTES = 100 * 10**6
#: Requests of each run, and seconds after which the run ends early.
_REQUESTS = 20_000
_LONGEST_S = 5.0


def benchmark(
    reference: Reference, *, seed: int, out: Console, err: Console, policies: Sequence[str] = ALL_POLICIES
) -> None:
    """Measure and print the tables to ``out``, and warnings to ``err``."""
    if reference.warning:
        err.print(reference.warning, style="bold yellow", markup=False)
    workload = reference.workload(seed)
    out.print(f"{reference.label}: {len(workload.trace):,} requests, one core, best of {_RUNS}\n", markup=False)
    out.print(_rates(workload, policies))
    out.print(
        f"\nmicroseconds per request and per load that evicts, and times those with {_RESIDENT[0]} resident models; "
        f"Zipf {_EXPONENT}, {_MODELS_PER_RESIDENT} models for each resident one, best of {_RUNS}\n",
        markup=False,
    )
    out.print(_growth(policies, seed))


def _rates(workload: Workload, policies: Sequence[str]) -> Table:
    table = figures_table("requests/s with memory for", [f"{share:.0%}" for share in _SHARES])
    for name in policies:
        policy = PolicyChoice(label=name, name=name)
        replays = tuple(ReplaySpec(policy=policy, capacity=Capacity(given_share=share)) for share in _SHARES)
        plan = ExperimentPlan(workloads=(workload,), replays=replays)
        best = [max(run_replay(plan, number).requests_per_s for _ in range(_RUNS)) for number in range(len(replays))]
        table.add_row(name, *(f"{rate:,.0f}" for rate in best))
    return table


def _growth(policies: Sequence[str], seed: int) -> Table:
    kinds = ("request", "eviction")
    columns = [f"{kind} {resident:,}" for kind in kinds for resident in _RESIDENT]
    table = figures_table("policy", [*columns, "misses"])
    workloads = [_equal_models(resident, seed) for resident in _RESIDENT]
    for name in policies:
        costs = [_cost(name, workload, resident) for workload, resident in zip(workloads, _RESIDENT, strict=True)]
        cells = []
        for kind in kinds:
            values_us = [cost.request_us if kind == "request" else cost.eviction_us for cost in costs]
            cells += [f"{value_us:.1f}  x{value_us / values_us[0]:.1f}" for value_us in values_us]
        misses = [cost.miss_ratio for cost in costs]
        table.add_row(name, *cells, f"{min(misses):.0%} .. {max(misses):.0%}")
    return table


@dataclass(frozen=True, slots=True, kw_only=True)
class _Cost:
    request_us: float
    eviction_us: float
    miss_ratio: float


def _cost(name: str, workload: Workload, resident: int) -> _Cost:
    """Measure the best of several runs, which follow each other in one cache that is full when the first begins."""
    make_cache = cache_maker(
        workload,
        PolicyChoice(label=name, name=name),
        capacity_bytes=resident * _MODEL_BYTES,
        max_preloads=MAX_PRELOADS,
    )
    cache, position = make_cache(0), resident
    _play(cache, workload, range(resident))
    costs = []
    with _no_garbage_collection():
        for _ in range(_RUNS):
            cost, position = _timed(cache, workload, range(position, position + _REQUESTS))
            costs.append(cost)
    return _Cost(
        request_us=min(cost.request_us for cost in costs),
        eviction_us=min(cost.eviction_us for cost in costs),
        miss_ratio=sum(cost.miss_ratio for cost in costs) / _RUNS,
    )


def _timed(cache: ModelCache, workload: Workload, positions: range) -> tuple[_Cost, int]:
    clock, trace, profiles = time.perf_counter, workload.trace, workload.profiles
    request_s = load_s = clock_s = 0.0
    loads = done = 0
    ends_s = clock() + _LONGEST_S
    for position in positions:
        now, profile = trace.arrival_s[position], profiles[trace.model[position]]
        before_s = clock()
        is_load = _request(cache, profile, now)
        after_s = clock()
        # A reading of the clock takes a good part of the time of a hit.
        clock_s += clock() - after_s
        request_s += after_s - before_s
        if is_load:
            load_s += after_s - before_s
            loads += 1
        done += 1
        if after_s > ends_s:
            break
    tick_s = clock_s / done
    cost = _Cost(
        request_us=1e6 * (request_s / done - tick_s),
        eviction_us=1e6 * (load_s / max(1, loads) - tick_s),
        miss_ratio=loads / done,
    )
    return cost, positions.start + done


def _play(cache: ModelCache, workload: Workload, positions: range) -> None:
    for position in positions:
        _request(cache, workload.profiles[workload.trace.model[position]], workload.trace.arrival_s[position])


def _request(cache: ModelCache, profile: ModelProfile, now: float) -> bool:
    """Serve one request, after the preloads that are due; return whether it was a load."""
    while now >= cache.next_tick_s:
        for action in cache.handle(TICK, now):
            if isinstance(action, StartLoad):
                cache.handle(LoadEnded(action.model.model_id), now)
    answer = cache.request(profile, now)
    match answer:
        case Hit():
            cache.finish(profile.model_id, now)
            return False
        case Load():
            cache.handle(LoadEnded(profile.model_id), now)
            cache.finish(profile.model_id, now)
            return True
        case _:
            raise AssertionError("models are loaded at once, and all of them fit")


def _equal_models(resident: int, seed: int) -> Workload:
    """Make a workload that begins with one request for each model that fits, the most popular ones."""
    models = tuple(f"m{number}" for number in range(_MODELS_PER_RESIDENT * resident))
    zipf = ZipfWorkload(
        models=models, locations=("local",), exponent=_EXPONENT, rate_per_s=_RATE_PER_S, arrivals="even", seed=seed
    )
    stream = zipf.trace(_RUNS * _REQUESTS)
    number_of = {model: number for number, model in enumerate(models)}
    asked = array("I", (number_of[stream.models[model]] for model in stream.model))
    requests = resident + len(asked)
    trace = Trace(
        name="zipf",
        models=models,
        arrival_s=array("d", (position / _RATE_PER_S for position in range(requests))),
        model=array("I", range(resident)) + asked,
        source=array("I", range(requests)),
    )
    # Load times differ a little, so that no policy ranks all models the same.
    profiles = tuple(
        ModelProfile(model_id=model, size_bytes=_MODEL_BYTES, load_s=1.0 + number % 7 / 10, exec_s=0.1)
        for number, model in enumerate(models)
    )
    return Workload(trace=trace, profiles=profiles, seed=seed)


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


@click.command()
@click.option("--policy", "policies", multiple=True, type=click.Choice(ALL_POLICIES), help="Repeat; default: all.")
@click.option("--data", type=click.Path(path_type=Path), metavar="DIR", help="Where the reference workload lies.")
@click.option("--seed", type=click.IntRange(0, 2**63), default=0, show_default=True)
def main(policies: tuple[str, ...], data: Path | None, seed: int) -> None:
    """Measure how fast the decisions are."""
    out, err = (Console(stderr=stderr, highlight=False, soft_wrap=True, width=200) for stderr in (False, True))
    benchmark(find_reference(data), seed=seed, out=out, err=err, policies=policies or ALL_POLICIES)


if __name__ == "__main__":
    main()
