"""Replays side by side: every policy with every capacity, over as many processes as are asked for."""

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
from serve_app.simulator.result_row import CellResult, Latency, Row, compulsory_load_s, row_of
from serve_app.simulator.scenario import Capacity, PolicyChoice, Workload, cache_maker

if TYPE_CHECKING:
    from serve_app.simulator.discrete_event.settings import Coordination

TimeModel = Literal["load-delay", "full"]
#: Preloads that a location has under way at the same time: in the load-delay model, and as in life.
MAX_PRELOADS, LIVE_PRELOADS = 64, 2

_POLL_S = 0.1


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """One replay: a workload by its number, a policy, and a memory; ``max_preloads`` goes before that of the plan."""

    workload: int = 0
    policy: PolicyChoice
    capacity: Capacity
    max_preloads: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ExperimentPlan:
    """What is to be replayed, and in which model of time; ``coordination`` and ``max_preloads`` are for one each."""

    workloads: tuple[Workload, ...]
    cells: tuple[Cell, ...]
    time: TimeModel = "load-delay"
    coordination: Coordination = "full"
    max_preloads: int = MAX_PRELOADS

    @property
    def requests(self) -> int:
        """Requests of all replays together."""
        return sum(len(self.workloads[cell.workload].trace) for cell in self.cells)


def run(plan: ExperimentPlan, *, jobs: int, on_progress: Callable[[int], None] = lambda _: None) -> tuple[Row, ...]:
    """Replay everything; the rows stand in the order of the cells.

    Args:
        plan: what to replay.
        jobs: how many processes work at the same time; with 1 it is this one alone.
        on_progress: is told now and then how many requests are done.

    Raises:
        EdgeServeError: a process died, most likely for lack of memory.
    """
    jobs = min(jobs, len(plan.cells))
    try:
        if jobs > 1:
            return _run_side_by_side(plan, jobs, on_progress)
        return _run_here(plan, on_progress)
    except (BrokenProcessPool, MemoryError):
        hint = "try fewer at a time (--jobs) or a shorter trace" if jobs > 1 else "try a shorter trace"
        raise EdgeServeError(f"a replay died, most likely for lack of memory; {hint}") from None


def _run_here(plan: ExperimentPlan, on_progress: Callable[[int], None]) -> tuple[Row, ...]:
    done = 0

    def tell(requests: int) -> None:
        nonlocal done
        done += requests
        on_progress(done)

    return tuple(play(plan, number, tell) for number in range(len(plan.cells)))


def play(plan: ExperimentPlan, number: int, on_progress: Callable[[int], None] = lambda _: None) -> Row:
    """Replay one cell, given by its number; ``on_progress`` is told how many more requests are done."""
    cell = plan.cells[number]
    workload = plan.workloads[cell.workload]
    capacity_bytes = cell.capacity.size_bytes(workload.total_bytes)
    match plan.time:
        case "load-delay":
            max_preloads = plan.max_preloads if cell.max_preloads is None else cell.max_preloads
            outcome = _replay_load_delay(workload, cell.policy, capacity_bytes, max_preloads, on_progress)
        case "full":
            outcome = _replay_full(workload, cell.policy, capacity_bytes, plan.coordination, on_progress)
    return row_of(
        workload,
        outcome,
        policy=cell.policy.label,
        capacity_bytes=capacity_bytes,
        capacity_share=cell.capacity.share(workload.total_bytes),
        time=plan.time,
    )


def _replay_load_delay(
    workload: Workload,
    policy: PolicyChoice,
    capacity_bytes: int,
    max_preloads: int,
    on_progress: Callable[[int], None],
) -> CellResult:
    make_cache = cache_maker(workload, policy, capacity_bytes=capacity_bytes, max_preloads=max_preloads)
    began_s = time.perf_counter()
    tally = replay(workload.trace, workload.profiles, make_cache, on_progress)
    return CellResult(
        counts=tally,
        forwards=0,
        wall_s=time.perf_counter() - began_s,
        latency=Latency.of(tally.waited_latency_s, tally.at_once),
        compulsory_load_s=compulsory_load_s(workload, shared=False),
    )


def _replay_full(
    workload: Workload,
    policy: PolicyChoice,
    capacity_bytes: int,
    coordination: Coordination,
    on_progress: Callable[[int], None],
) -> CellResult:
    from serve_app.simulator.discrete_event.settings import DiscreteEventOptions, geographic_links
    from serve_app.simulator.discrete_event.simulation import simulate_discrete_event

    if len(workload.trace.locations) == 1:
        # There is nobody to forward to, and where to put a model is no question.
        coordination = "none"
    options = DiscreteEventOptions(
        make_cache=cache_maker(workload, policy, capacity_bytes=capacity_bytes, max_preloads=LIVE_PRELOADS),
        coordination=coordination,
        links=geographic_links(workload.trace.locations, seed=workload.seed),
    )
    began_s = time.perf_counter()
    tally = simulate_discrete_event(workload.trace, workload.profiles, options, on_progress)
    return CellResult(
        counts=tally,
        forwards=tally.forwards,
        wall_s=time.perf_counter() - began_s,
        latency=Latency.of(tally.latencies, Counter()),
        compulsory_load_s=compulsory_load_s(workload, shared=coordination != "none"),
        coordination=coordination,
    )


def _run_side_by_side(plan: ExperimentPlan, jobs: int, on_progress: Callable[[int], None]) -> tuple[Row, ...]:
    # Not forked: whoever calls may have threads.
    context = multiprocessing.get_context("spawn")
    # Every cell has a place of its own, so that nobody needs a lock that a dying process might keep.
    done = context.RawArray("q", len(plan.cells))
    others = set(multiprocessing.active_children())
    pool = ProcessPoolExecutor(jobs, mp_context=context, initializer=_begin_work, initargs=(plan, done))
    try:
        with _interrupts_held_back():
            futures = [pool.submit(_work, number) for number in range(len(plan.cells))]
        pending = set(futures)
        while pending:
            finished, pending = wait(pending, timeout=_POLL_S, return_when=FIRST_EXCEPTION)
            on_progress(sum(done))
            for future in finished:
                future.result()
        return tuple(future.result() for future in futures)
    except BaseException:
        # Nobody wants the rest, and a replay cannot be asked to stop.
        for process in set(multiprocessing.active_children()) - others:
            process.terminate()
        raise
    finally:
        pool.shutdown(cancel_futures=True)


@contextmanager
def _interrupts_held_back() -> Iterator[None]:
    """Ctrl-C comes afterwards; processes started meanwhile never hear of it: it is this one that ends them."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@dataclass(frozen=True, slots=True)
class _Work:
    plan: ExperimentPlan
    done: MutableSequence[int]


#: In the processes that do the work: what every one of them has been given once.
_work_of_process: list[_Work] = []


def _begin_work(plan: ExperimentPlan, done: MutableSequence[int]) -> None:
    _work_of_process[:] = [_Work(plan, done)]
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A parent that was killed can no longer say that nobody waits for the rows."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait_for_sentinels([parent.sentinel])
        os._exit(1)


def _work(number: int) -> Row:
    (work,) = _work_of_process

    def tell(requests: int) -> None:
        work.done[number] += requests

    return play(work.plan, number, tell)
