"""Measure what decisions are made from: time to load, time to run, and bytes of workspace."""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from serve_app.models.loader import LoadedModel
from serve_app.models.process_memory import exact_heap, give_back_free_memory

REPEATS = 3

#: What the kernel says about this process.
PROC = Path("/proc/self")


@dataclass(frozen=True, slots=True, kw_only=True)
class Measurement:
    """One model on this machine: batch 1, one thread, weights in the page cache."""

    load_s: float
    exec_s: float
    workspace_bytes: int


def measure(load: Callable[[], LoadedModel], batch: NDArray[np.float32], module: nn.Module) -> Measurement:
    """Load and run a model ``REPEATS`` times each, and take medians.

    Args:
        load: loads the model; it is loaded and unloaded several times, and unloaded at the end.
        batch: the input, of batch size 1.
        module: the module that ``load`` binds weights to, for an estimate of the workspace where the kernel cannot
            tell.
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
            model.infer(batch)
            exec_times = []
            for _ in range(REPEATS):
                started = time.perf_counter()
                model.infer(batch)
                exec_times.append(time.perf_counter() - started)
            workspace = workspace_bytes(module, lambda: model.infer(batch))
    finally:
        model.unload()
    return Measurement(
        load_s=statistics.median(load_times),
        exec_s=statistics.median(exec_times),
        workspace_bytes=workspace,
    )


def workspace_bytes(module: nn.Module, run: Callable[[], object], *, proc: Path = PROC) -> int:
    """Measure the bytes that one call of ``run`` takes in addition to what is resident; ``module`` is what runs."""
    # With the usual heap the result would depend on what the allocator has kept, or takes in advance. A thread has a
    # heap of its own, without free room of earlier models.
    with exact_heap(), ThreadPoolExecutor(1) as thread:
        measured = [thread.submit(peak_growth_bytes, run, proc=proc).result() for _ in range(REPEATS)]
        growths = [growth for growth in measured if growth is not None]
    return int(statistics.median(growths)) if growths else _activation_bytes(module, run)


def peak_growth_bytes(run: Callable[[], object], *, proc: Path = PROC) -> int | None:
    """Measure by how many bytes the resident memory of this process grows at its peak while ``run`` runs.

    Returns None where the kernel cannot reset its record of the peak.
    """
    # Free heap that is used again must count as growth.
    give_back_free_memory()
    try:
        (proc / "clear_refs").write_text("5")  # forget the peak so far, see proc_pid_clear_refs(5)
        before = _status_bytes(proc, "VmRSS")
        run()
        return max(0, _status_bytes(proc, "VmHWM") - before)
    except (OSError, KeyError):
        return None


def _status_bytes(proc: Path, key: str) -> int:
    fields = dict(line.split(":", 1) for line in (proc / "status").read_text().splitlines())
    return int(fields[key].split()[0]) * 1024


def _activation_bytes(module: nn.Module, run: Callable[[], object]) -> int:
    """Estimate the workspace as twice the largest input and output of one layer."""
    largest = 0

    def keep_largest(_: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        nonlocal largest
        tensors = [value for value in (*inputs, output) if isinstance(value, torch.Tensor)]
        largest = max(largest, sum(tensor.nbytes for tensor in tensors))

    leaves = [child for child in module.modules() if not any(child.children())]
    hooks = [leaf.register_forward_hook(keep_largest) for leaf in leaves]
    try:
        run()
    finally:
        for hook in hooks:
            hook.remove()
    return 2 * largest


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
