"""Measure what decisions are made from: time to load, time to run, and bytes of workspace."""

from __future__ import annotations

import contextlib
import gc
import itertools
import math
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

from serve_app.core.contract import Axis, Contract, SizeCost
from serve_app.models.process_memory import exact_heap, give_back_free_memory, process_memory
from serve_app.models.readahead import ReadAhead
from serve_app.models.runtimes.base import LoadedModel, PreparedModel
from serve_app.tasks.tensors import Tensors, probe

REPEATS = 3

#: Executions that took so long together are enough of them.
_LONG_S = 2.0

#: Between two looks at the memory of the process.
_SAMPLE_S = 0.001

#: What the kernel says about this process.
PROC = Path("/proc/self")


#: Sizes of a free axis that are measured: its least, its most, and one between where there are few axes.
_MAX_SIZES = 9


@dataclass(frozen=True, slots=True, kw_only=True)
class Measurement:
    """One model on this machine: one thread, weights in the page cache.

    Attributes:
        costs: what an execution takes at every one of ``grid``; ``exec_s`` and ``workspace_bytes`` are of these.
        prepared_bytes: what a process keeps of the model while it is not in memory, once it has run.
        resident_bytes: by how much resident memory falls with an unload.
        kept_bytes: by how much it is larger after a load and an unload than before.
    """

    load_s: float
    costs: tuple[SizeCost, ...]
    prepared_bytes: int
    resident_bytes: int
    kept_bytes: int

    @property
    def exec_s(self) -> float:
        """Seconds of an execution at the least sizes."""
        return self.costs[0].exec_s

    @property
    def workspace_bytes(self) -> int:
        """Bytes of an execution at the sizes that take most."""
        return max(cost.workspace_bytes for cost in self.costs)


def grid(axes: Sequence[Axis]) -> tuple[tuple[int, ...], ...]:
    """Return the sizes at which a model is measured, the least ones first, the largest last."""
    few = len(axes) <= 2
    steps = [_steps(axis, middle=few) for axis in axes]
    sizes = tuple(itertools.product(*steps))
    if len(sizes) <= _MAX_SIZES:
        return sizes
    return tuple(tuple(step[position] for step in steps) for position in (0, -1))


def _steps(axis: Axis, *, middle: bool) -> tuple[int, ...]:
    def allowed(size: float) -> int:
        return min(axis.most // axis.multiple, math.ceil(size / axis.multiple)) * axis.multiple

    sizes = [allowed(axis.least), allowed(math.sqrt(axis.least * axis.most)), allowed(axis.most)]
    return tuple(dict.fromkeys(sizes if middle else (sizes[0], sizes[-1])))


def measure(prepare: Callable[[], PreparedModel], contract: Contract, sizes: Sequence[tuple[int, ...]]) -> Measurement:
    """Prepare, load and run a model ``REPEATS`` times each, and take medians.

    Memory is that of the model alone only in a process that has had no other one, see ``measure_published``.

    Args:
        prepare: prepares the model; it is called twice. What imports and hidden weights take can be told apart only
            if it prepares it anew then; it may return the same again where nothing is hidden.
        contract: of the model.
        sizes: of the free axes, at which executions are measured; the least first.
    """
    with _one_thread():
        started = process_memory().anonymous_bytes
        first = prepare()
        # Files that are mapped here for the first time are code of libraries.
        first_bytes = process_memory().anonymous_bytes - started
        inputs = probe(contract, sizes[0])
        # Once without measuring: libraries set themselves up, which no unload gives back and no further model takes.
        _load_and_run(first, inputs)
        before = _resident_bytes()
        prepared = prepare()
        cycles = [_load_and_run(prepared, inputs) for _ in range(REPEATS)]
        prepared_bytes = _resident_bytes() - before + (first_bytes if prepared is first else 0)
        model = prepared.load(ReadAhead, None)
        try:
            costs = tuple(_cost(model, probe(contract, each), each) for each in sizes)
        finally:
            model.unload()
    return Measurement(
        load_s=statistics.median(cycle.load_s for cycle in cycles),
        costs=costs,
        prepared_bytes=max(0, prepared_bytes),
        resident_bytes=max(0, int(statistics.median(cycle.resident_bytes for cycle in cycles))),
        kept_bytes=max(0, int(statistics.median(cycle.kept_bytes for cycle in cycles))),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Cycle:
    """A load, an execution and an unload."""

    load_s: float
    resident_bytes: int
    kept_bytes: int


def _load_and_run(prepared: PreparedModel, inputs: Tensors) -> _Cycle:
    before = _resident_bytes()
    started = time.perf_counter()
    model = prepared.load(ReadAhead, None)
    load_s = time.perf_counter() - started
    try:
        model.run(inputs)
        loaded = _resident_bytes()
    finally:
        model.unload()
    after = _resident_bytes()
    return _Cycle(load_s=load_s, resident_bytes=loaded - after, kept_bytes=after - before)


def _resident_bytes() -> int:
    gc.collect()
    give_back_free_memory()
    return process_memory().rss_bytes


def _cost(model: LoadedModel, inputs: Tensors, sizes: tuple[int, ...]) -> SizeCost:
    model.run(inputs)
    seconds: list[float] = []
    while len(seconds) < REPEATS and sum(seconds) < _LONG_S:
        started = time.perf_counter()
        model.run(inputs)
        seconds.append(time.perf_counter() - started)
    repeats = REPEATS if sum(seconds) < _LONG_S else 1
    return SizeCost(
        sizes=sizes,
        workspace_bytes=workspace_bytes(lambda: model.run(inputs), repeats=repeats),
        exec_s=statistics.median(seconds),
    )


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


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
