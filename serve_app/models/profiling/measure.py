"""Measure what decisions are made from: time to load, time to run, and bytes of workspace."""

from __future__ import annotations

import gc
import statistics
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import MappingProxyType

import numpy as np
import psutil

from serve_app.core.contract import Contract, SizeCost, non_decreasing
from serve_app.core.memory_budget import ProcessMemory
from serve_app.models.process_memory import exact_heap, give_back_free_memory, process_memory
from serve_app.models.profiling.joined import joined_elements
from serve_app.models.readahead import ReadAhead
from serve_app.models.runtimes.base import LoadedModel, PreparedModel
from serve_app.models.threads import one_thread, parallel_inferences
from serve_app.tasks.tensors import Tensors, probe

REPEATS = 3

#: What more a process has after an unload is looked at again, in up to so many cycles.
_HEAP_BYTES, _MOST_CYCLES = 2**20, 12

#: An execution that takes longer is too long to be measured, unless it is at the least sizes.
LONGEST_S = 5.0

#: The kernel maps 16 pages around one that is read; rows are rarely longer than two.
_ROWS_APART = 8
#: A table of fewer rows is read by any execution, and no table by more executions than this.
_SMALL_TABLE, _MOST_FEEDS = 1024, 64

#: An execution that takes so long is measured once.
_ONCE_S = 0.3

#: What one execution may take of the memory that is free while it is measured.
_MEMORY_SHARE = 0.5

#: So many sizes of the free axes are executed before what a model takes is read: libraries keep memory for those that
#: they saw last.
_SIZES_HELD = 4

#: Between two looks at the memory of the process.
_SAMPLE_S = 0.001

#: What the kernel says about this process.
PROC = Path("/proc/self")


@dataclass(frozen=True, slots=True, kw_only=True)
class Repetitions:
    """How often a model is loaded and run to see its memory; less where less can happen.

    Attributes:
        settling: loads after which libraries, and the heaps of threads, have mostly come to their size.
        cycles: loads and unloads whose memory is looked at.
        rounds: executions of every thread in each of them, all threads at the same time.
    """

    settling: int = 3
    cycles: int = REPEATS
    rounds: int = REPEATS


#: Of a module: it keeps nothing for the threads that run it.
MODULE = Repetitions(rounds=1)

#: Of a module that has no memory but its weights, and whose library is known.
KNOWN_MODULE = Repetitions(settling=1, cycles=1, rounds=1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Skipped:
    """Sizes of the free axes at which a model was not measured, and what an execution would take there."""

    sizes: tuple[int, ...]
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Measurement:
    """One model on this machine: one thread, weights in the page cache.

    Attributes:
        costs: what an execution takes at every one of the sizes that were measured, the least first; they never fall
            where a size grows. ``exec_s`` and ``workspace_bytes`` are of these.
        prepared_bytes: what a process keeps of the model while it is not in memory, once it has run.
        resident_bytes: by how much resident memory falls with an unload at most, once every thread that executes models
            has executed it at several sizes.
        private_bytes: what of that is no page of a file.
        kept_bytes: by how much it is larger after a load and an unload than before, every time; heaps that grow to
            their size keep something now and then.
        skipped: sizes at which it was not measured.
        joined_elements: see ``PublishedModel.joined_elements``.
    """

    load_s: float
    costs: tuple[SizeCost, ...]
    prepared_bytes: int
    resident_bytes: int
    private_bytes: int
    kept_bytes: int
    skipped: tuple[Skipped, ...] = ()
    joined_elements: int = 0

    @property
    def exec_s(self) -> float:
        """Seconds of an execution at the least sizes."""
        return self.costs[0].exec_s

    @property
    def workspace_bytes(self) -> int:
        """Bytes of an execution at the sizes that take most."""
        return max(cost.workspace_bytes for cost in self.costs)


def measure(
    prepare: Callable[[], PreparedModel],
    contract: Contract,
    sizes: Sequence[tuple[int, ...]],
    highest: Mapping[str, int] = MappingProxyType({}),
    repetitions: Repetitions = Repetitions(),
) -> Measurement:
    """Prepare, load and run a model ``REPEATS`` times each, and take medians.

    Memory is that of the model alone only in a process that has had no other one, see ``measure_published``. Sizes at
    which an execution would take too long, or too much of the memory of this machine, are skipped.

    Args:
        prepare: prepares the model; it is called twice. What imports and hidden weights take can be told apart only
            if it prepares it anew then; it may return the same again where nothing is hidden.
        contract: of the model.
        sizes: of the free axes, at which executions are measured; the least first, see ``grid.grid``.
        highest: the largest whole number of an input, by its name, where it is known.
        repetitions: of loads; costs are medians of ``REPEATS`` executions in any case.
    """
    rounds = repetitions.rounds
    inputs = partial(probe, contract, highest=highest)
    with one_thread(), ThreadPoolExecutor(parallel_inferences()) as threads:
        started = process_memory().anonymous_bytes
        first = prepare()
        # Files that are mapped here for the first time are code of libraries.
        first_bytes = process_memory().anonymous_bytes - started
        # First without measuring: libraries set themselves up, which no unload gives back and no further model takes.
        for _ in range(repetitions.settling):
            _load_and_run(first, [inputs(sizes[0])], threads, rounds)
        before = _resident().rss_bytes
        prepared, prepared_bytes = prepare(), first_bytes
        if prepared is not first:
            _load_and_run(prepared, [inputs(sizes[0])], threads, rounds)
            prepared_bytes = _resident().rss_bytes - before
        model = prepared.load(ReadAhead, None)
        try:
            costs, skipped = _costs(model, contract, sizes, inputs)
            # What is measured at the least sizes only runs its rows one by one.
            joined = joined_elements(model, contract, highest) if len(sizes) > 1 else 0
        finally:
            model.unload()
        held = _held_sizes(costs, contract) or [sizes[0]]
        feeds = [*_over_tables(contract, held[-1], highest), *(inputs(each) for each in held)]
        if held != [sizes[0]]:
            # This also brings the heaps of the threads to their size.
            _load_and_run(prepared, feeds, threads, rounds)
        cycles = [_load_and_run(prepared, feeds, threads, rounds) for _ in range(repetitions.cycles)]
        # Heaps keep a block now and then; what a model keeps, it keeps every time.
        while min(cycle.kept_bytes for cycle in cycles) > _HEAP_BYTES and len(cycles) < _MOST_CYCLES:
            cycles.append(_load_and_run(prepared, feeds, threads, rounds))
        load_s = [cycle.load_s for cycle in cycles]
        while len(load_s) < REPEATS:
            load_s.append(_load_seconds(prepared))
    return Measurement(
        load_s=statistics.median(load_s),
        costs=non_decreasing(costs),
        prepared_bytes=max(0, prepared_bytes),
        resident_bytes=max(0, *(cycle.resident_bytes for cycle in cycles)),
        private_bytes=max(0, *(cycle.private_bytes for cycle in cycles)),
        kept_bytes=max(0, min(cycle.kept_bytes for cycle in cycles)),
        skipped=tuple(skipped),
        joined_elements=joined,
    )


def _over_tables(contract: Contract, sizes: tuple[int, ...], highest: Mapping[str, int]) -> list[Tensors]:
    """Return inputs that read all over the tables of a model, such as the vectors of all words.

    What is mapped takes memory where it was read, and one execution reads a few rows.
    """
    feeds: list[Tensors] = []
    for name, most in highest.items():
        given = probe(contract, sizes, highest=highest)
        count = given[name].size
        rows = np.arange(0, most + 1, _ROWS_APART)
        if most < _SMALL_TABLE or count == 0:
            continue
        for begin in range(0, min(len(rows), _MOST_FEEDS * count), count):
            chunk = np.resize(rows[begin : begin + count], given[name].shape).astype(given[name].dtype)
            feeds.append({**given, name: chunk})
    return feeds


def _held_sizes(costs: Sequence[SizeCost], contract: Contract) -> list[tuple[int, ...]]:
    """Return the largest sizes that do not take long, the largest one last."""
    quick = sorted((cost.sizes for cost in costs if cost.exec_s <= _ONCE_S), key=contract.elements)
    return quick[-_SIZES_HELD:]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Cycle:
    """A load, an execution and an unload."""

    load_s: float
    resident_bytes: int
    private_bytes: int
    kept_bytes: int


def _load_seconds(prepared: PreparedModel) -> float:
    started = time.perf_counter()
    model = prepared.load(ReadAhead, None)
    load_s = time.perf_counter() - started
    model.unload()
    return load_s


def _load_and_run(
    prepared: PreparedModel, inputs: Sequence[Tensors], threads: ThreadPoolExecutor, rounds: int
) -> _Cycle:
    before = _resident()
    started = time.perf_counter()
    model = prepared.load(ReadAhead, None)
    load_s = time.perf_counter() - started
    try:
        *others, last = inputs
        for each in others:
            run_in_every_thread(model, each, threads, repeats=1)
        run_in_every_thread(model, last, threads, repeats=rounds)
        loaded = _resident()
    finally:
        model.unload()
    after = _resident()
    return _Cycle(
        load_s=load_s,
        resident_bytes=loaded.rss_bytes - after.rss_bytes,
        private_bytes=loaded.anonymous_bytes - after.anonymous_bytes,
        kept_bytes=after.rss_bytes - before.rss_bytes,
    )


def _resident() -> ProcessMemory:
    gc.collect()
    give_back_free_memory()
    return process_memory()


def _costs(
    model: LoadedModel,
    contract: Contract,
    sizes: Sequence[tuple[int, ...]],
    inputs: Callable[[tuple[int, ...]], Tensors],
) -> tuple[list[SizeCost], list[Skipped]]:
    costs: list[SizeCost] = []
    skipped: list[Skipped] = []
    for each in sizes:
        reason = _too_much(each, costs, skipped, contract)
        if reason is None:
            costs.append(_cost(model, inputs(each), each))
        else:
            skipped.append(Skipped(sizes=each, reason=reason))
    return costs, skipped


def _too_much(
    sizes: tuple[int, ...], costs: Sequence[SizeCost], skipped: Sequence[Skipped], contract: Contract
) -> str | None:
    """Return why an execution at these sizes is not to be measured, estimated from smaller ones; None if it is.

    Time and memory grow with the elements of the inputs at least.
    """
    for other in skipped:
        if _covers(sizes, other.sizes):
            return other.reason
    smaller = [cost for cost in costs if _covers(sizes, cost.sizes)]
    elements = contract.elements(sizes)
    growth = [(cost, elements / max(1, contract.elements(cost.sizes))) for cost in smaller]
    seconds = max((cost.exec_s * times for cost, times in growth), default=0.0)
    if seconds > LONGEST_S:
        return f"takes about {seconds:.0f} s, and at most {LONGEST_S:.0f} s are allowed"
    # Only of the largest: what small executions take hardly grows.
    needed_bytes = max((cost.workspace_bytes * times for cost, times in growth[-1:]), default=0.0)
    if needed_bytes > _MEMORY_SHARE * psutil.virtual_memory().available:
        return f"takes about {needed_bytes / 2**20:.0f} MiB, which this machine does not have free"
    return None


def _covers(sizes: tuple[int, ...], others: tuple[int, ...]) -> bool:
    return all(size >= other for size, other in zip(sizes, others, strict=True))


def _cost(model: LoadedModel, inputs: Tensors, sizes: tuple[int, ...]) -> SizeCost:
    seconds = [_seconds(model, inputs)]
    repeats = 1 if seconds[0] > _ONCE_S else REPEATS
    if repeats > 1:
        seconds = [_seconds(model, inputs) for _ in range(repeats)]
    return SizeCost(
        sizes=sizes,
        workspace_bytes=workspace_bytes(lambda: model.run(inputs), repeats=repeats),
        exec_s=statistics.median(seconds),
    )


def _seconds(model: LoadedModel, inputs: Tensors) -> float:
    started = time.perf_counter()
    model.run(inputs)
    return time.perf_counter() - started


def run_in_every_thread(
    model: LoadedModel, inputs: Tensors, threads: ThreadPoolExecutor, *, repeats: int = REPEATS
) -> None:
    """Execute a model in as many threads as a worker has, at the same time: some libraries keep memory for each."""
    count = parallel_inferences()
    together = threading.Barrier(count)

    def run() -> None:
        try:
            for _ in range(repeats):
                together.wait()
                model.run(inputs)
        except BaseException:
            together.abort()
            raise

    for ended in [threads.submit(run) for _ in range(count)]:
        ended.result()


def workspace_bytes(run: Callable[[], object], *, proc: Path = PROC, repeats: int = REPEATS) -> int:
    """Measure the bytes that one call of ``run`` takes in addition to what is resident; the median of ``repeats``."""
    # With the usual heap the result would depend on what the allocator has kept, or takes in advance. A thread has a
    # heap of its own, without free room of earlier models.
    with exact_heap(), ThreadPoolExecutor(1) as thread:
        measured = [thread.submit(peak_growth_bytes, run, proc=proc).result() for _ in range(repeats)]
    return int(statistics.median(measured))


def peak_growth_bytes(run: Callable[[], object], *, proc: Path = PROC) -> int:
    """Measure by how many bytes the resident memory of this process grows at its peak while ``run`` runs."""
    # Free heap that is used again must count as growth.
    give_back_free_memory()
    try:
        (proc / "clear_refs").write_text("5")  # forget the peak so far, see proc_pid_clear_refs(5)
        before = _status_bytes(proc, "VmRSS")
        run()
        return max(0, _status_bytes(proc, "VmHWM") - before)
    except (OSError, KeyError):
        return _sampled_growth_bytes(run)


def _sampled_growth_bytes(run: Callable[[], object]) -> int:
    """Measure growth where the kernel cannot reset its record of the peak: look every millisecond."""
    before = peak = process_memory().rss_bytes
    ended = threading.Event()

    def watch() -> None:
        nonlocal peak
        while not ended.wait(_SAMPLE_S):
            peak = max(peak, process_memory().rss_bytes)

    watcher = threading.Thread(target=watch, name="watch-memory")
    watcher.start()
    try:
        run()
    finally:
        ended.set()
        watcher.join()
    return peak - before


def _status_bytes(proc: Path, key: str) -> int:
    fields = dict(line.split(":", 1) for line in (proc / "status").read_text().splitlines())
    return int(fields[key].split()[0]) * 1024
