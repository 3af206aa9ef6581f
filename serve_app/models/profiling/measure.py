"""Measure what decisions are made from: time to load, time to run, and bytes of workspace."""

from __future__ import annotations

import contextlib
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
from serve_app.models.runtimes.base import LoadedModel
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

    ``costs`` has what an execution takes at every one of ``grid``; ``exec_s`` and ``workspace_bytes`` are those at the
    first. ``resident_bytes`` is by how much resident memory falls with an unload.
    """

    load_s: float
    costs: tuple[SizeCost, ...]
    resident_bytes: int

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


def measure(load: Callable[[], LoadedModel], contract: Contract, sizes: Sequence[tuple[int, ...]]) -> Measurement:
    """Load and run a model ``REPEATS`` times each, and take medians.

    Args:
        load: loads the model; it is loaded and unloaded several times, and unloaded at the end.
        contract: of the model.
        sizes: of the free axes, at which executions are measured; the least first.
    """
    load_times = []
    for _ in range(REPEATS):
        started = time.perf_counter()
        model = load()
        load_times.append(time.perf_counter() - started)
        model.unload()
    model = load()
    try:
        with _one_thread():
            costs = tuple(_cost(model, probe(contract, each), each) for each in sizes)
            give_back_free_memory()
            loaded_bytes = process_memory().rss_bytes
    finally:
        model.unload()
    give_back_free_memory()
    return Measurement(
        load_s=statistics.median(load_times),
        costs=costs,
        resident_bytes=max(0, loaded_bytes - process_memory().rss_bytes),
    )


def _cost(model: LoadedModel, inputs: Tensors, sizes: tuple[int, ...]) -> SizeCost:
    model.run(inputs)
    seconds: list[float] = []
    while len(seconds) < REPEATS and sum(seconds) < _LONG_S:
        started = time.perf_counter()
        model.run(inputs)
        seconds.append(time.perf_counter() - started)
    return SizeCost(
        sizes=sizes, workspace_bytes=workspace_bytes(lambda: model.run(inputs)), exec_s=statistics.median(seconds)
    )


def workspace_bytes(run: Callable[[], object], *, proc: Path = PROC) -> int:
    """Measure the bytes that one call of ``run`` takes in addition to what is resident."""
    # With the usual heap the result would depend on what the allocator has kept, or takes in advance. A thread has a
    # heap of its own, without free room of earlier models.
    with exact_heap(), ThreadPoolExecutor(1) as thread:
        measured = [thread.submit(peak_growth_bytes, run, proc=proc).result() for _ in range(REPEATS)]
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
