"""Run the replays of an experiment, in this process or spread over several."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, MutableSequence
from concurrent.futures import FIRST_EXCEPTION, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import wait as wait_for_sentinels
from typing import TYPE_CHECKING, Literal

from serve_app.errors import EdgeServeError
from serve_app.simulator.load_delay import replay
from serve_app.simulator.result_row import Latency, ReplayResult, ResultRow, compulsory_load_s, make_row
from serve_app.simulator.scenario import Capacity, PolicyChoice, Workload, cache_maker, forms_maker

if TYPE_CHECKING:
    from serve_app.simulator.discrete_event.settings import Coordination

TimeModel = Literal["load-delay", "full"]
#: Preloads in progress at a location at the same time: in the load-delay model, and in a live worker by default.
MAX_PRELOADS, LIVE_PRELOADS = 64, 2

_POLL_S = 0.1


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplaySpec:
    """One replay: the index of a workload, a policy, and a memory; ``max_preloads`` overrides that of the plan."""

    workload: int = 0
    policy: PolicyChoice
    capacity: Capacity
    max_preloads: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ExperimentPlan:
    """The replays of an experiment, and their model of time.

    ``coordination`` applies to the full model of time, ``max_preloads`` to the load-delay model.
    """

    workloads: tuple[Workload, ...]
    replays: tuple[ReplaySpec, ...]
    time: TimeModel = "load-delay"
    coordination: Coordination = "full"
    max_preloads: int = MAX_PRELOADS

    @property
    def requests(self) -> int:
        """Count the requests of all replays together."""
        return sum(len(self.workloads[spec.workload].trace) for spec in self.replays)


def run(
    plan: ExperimentPlan, *, jobs: int, on_progress: Callable[[int], None] = lambda _: None
) -> tuple[ResultRow, ...]:
    """Run all replays; the rows are in their order.

    Args:
        plan: the replays.
        jobs: processes that work at the same time; 1 is this process alone.
        on_progress: called from time to time with the number of requests that are done.

    Raises:
        EdgeServeError: a process died, most likely for lack of memory.
    """
    jobs = min(jobs, len(plan.replays))
    try:
        if jobs > 1:
            return _run_side_by_side(plan, jobs, on_progress)
        return _run_here(plan, on_progress)
    except (BrokenProcessPool, MemoryError):
        hint = "try fewer at a time (--jobs) or a shorter trace" if jobs > 1 else "try a shorter trace"
        raise EdgeServeError(f"a replay died, most likely for lack of memory; {hint}") from None


def _run_here(plan: ExperimentPlan, on_progress: Callable[[int], None]) -> tuple[ResultRow, ...]:
    done = 0

    def add_done(requests: int) -> None:
        nonlocal done
        done += requests
        on_progress(done)

    return tuple(run_replay(plan, number, add_done) for number in range(len(plan.replays)))


def run_replay(plan: ExperimentPlan, number: int, on_progress: Callable[[int], None] = lambda _: None) -> ResultRow:
    """Run one replay, given by its index; ``on_progress`` is called with the number of further requests done."""
    spec = plan.replays[number]
    workload = plan.workloads[spec.workload]
    capacity_bytes = spec.capacity.size_bytes(workload.total_bytes)
    match plan.time:
        case "load-delay":
            max_preloads = plan.max_preloads if spec.max_preloads is None else spec.max_preloads
            result = _replay_load_delay(workload, spec.policy, capacity_bytes, max_preloads, on_progress)
        case "full":
            result = _replay_full(workload, spec.policy, capacity_bytes, plan.coordination, on_progress)
    return make_row(
        workload,
        result,
        policy=spec.policy.label,
        capacity_bytes=capacity_bytes,
        capacity_share=spec.capacity.share(workload.total_bytes),
        time=plan.time,
    )


def _replay_load_delay(
    workload: Workload,
    policy: PolicyChoice,
    capacity_bytes: int,
    max_preloads: int,
    on_progress: Callable[[int], None],
) -> ReplayResult:
    make_cache = cache_maker(workload, policy, capacity_bytes=capacity_bytes, max_preloads=max_preloads)
    began_s = time.perf_counter()
    results = replay(workload.trace, workload.profiles, make_cache, on_progress, forms_maker(workload))
    return ReplayResult(
        counts=results,
        forwards=0,
        wall_s=time.perf_counter() - began_s,
        latency=Latency.of(results.waited_latency_s, results.at_once),
        compulsory_load_s=compulsory_load_s(workload, shared=False),
    )


def _replay_full(
    workload: Workload,
    policy: PolicyChoice,
    capacity_bytes: int,
    coordination: Coordination,
    on_progress: Callable[[int], None],
) -> ReplayResult:
    from serve_app.simulator.discrete_event.settings import DiscreteEventOptions, geographic_links
    from serve_app.simulator.discrete_event.simulation import simulate_discrete_event

    if len(workload.trace.locations) == 1:
        # There is no location to forward to, and no choice of placement.
        coordination = "none"
    options = DiscreteEventOptions(
        make_cache=cache_maker(workload, policy, capacity_bytes=capacity_bytes, max_preloads=LIVE_PRELOADS),
        make_forms=forms_maker(workload),
        coordination=coordination,
        links=geographic_links(workload.trace.locations, seed=workload.seed),
    )
    began_s = time.perf_counter()
    results = simulate_discrete_event(workload.trace, workload.profiles, options, on_progress)
    return ReplayResult(
        counts=results,
        forwards=results.forwards,
        wall_s=time.perf_counter() - began_s,
        latency=Latency.of(results.latencies, Counter()),
        compulsory_load_s=compulsory_load_s(workload, shared=coordination != "none"),
        coordination=coordination,
    )


def _run_side_by_side(plan: ExperimentPlan, jobs: int, on_progress: Callable[[int], None]) -> tuple[ResultRow, ...]:
    # Not forked: the caller may have threads.
    context = multiprocessing.get_context("spawn")
    # Every replay has a counter of its own: a lock could be kept by a process that dies.
    done = context.RawArray("q", len(plan.replays))
    others = set(multiprocessing.active_children())
    pool = ProcessPoolExecutor(jobs, mp_context=context, initializer=_begin_process, initargs=(plan, done))
    try:
        with _interrupts_held_back():
            futures = [pool.submit(_run_in_process, number) for number in range(len(plan.replays))]
        pending = set(futures)
        while pending:
            finished, pending = wait(pending, timeout=_POLL_S, return_when=FIRST_EXCEPTION)
            on_progress(sum(done))
            for future in finished:
                future.result()
        return tuple(future.result() for future in futures)
    except BaseException:
        # The rest is not needed, and a replay cannot be asked to stop.
        for process in set(multiprocessing.active_children()) - others:
            process.terminate()
        raise
    finally:
        pool.shutdown(cancel_futures=True)


@contextmanager
def _interrupts_held_back() -> Iterator[None]:
    """Deliver Ctrl-C afterwards; processes started meanwhile ignore it, and this process ends them."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@dataclass(frozen=True, slots=True)
class _ProcessState:
    plan: ExperimentPlan
    done: MutableSequence[int]


#: In a process of the pool: what it received at its start.
_process_state: list[_ProcessState] = []


def _begin_process(plan: ExperimentPlan, done: MutableSequence[int]) -> None:
    _process_state[:] = [_ProcessState(plan, done)]
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """End this process when its parent has ended: a killed parent cannot end it."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait_for_sentinels([parent.sentinel])
        os._exit(1)


def _run_in_process(number: int) -> ResultRow:
    (state,) = _process_state

    def add_done(requests: int) -> None:
        state.done[number] += requests

    return run_replay(state.plan, number, add_done)
