"""How many threads one inference uses, in whatever runtime, and how many inferences run at the same time."""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import torch

#: Of MKL: as many threads as in threads of which nothing else is said.
_AS_OTHERS = 0

_parallel = 2


def use_threads(count: int, parallel: int | None = None) -> None:
    """Let one inference use ``count`` threads, in the whole process; parallel inferences bring their own.

    Args:
        count: threads of one inference.
        parallel: inferences at the same time, see ``expect_parallel``; None: as before.
    """
    torch.set_num_threads(count)
    if parallel is not None:
        expect_parallel(parallel)


def inference_threads() -> int:
    """Return the threads of one inference."""
    return torch.get_num_threads()


def expect_parallel(count: int) -> None:
    """Let runtimes that must know it expect so many inferences at the same time; before that, the usual two.

    What such a runtime takes in memory depends on it, so a publisher must expect as many as the workers.
    """
    global _parallel
    _parallel = count


def parallel_inferences() -> int:
    """Return how many inferences may run at the same time."""
    return _parallel


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Let one inference use one thread meanwhile."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextlib.contextmanager
def threads_of_one(count: int) -> Iterator[None]:
    """Let executions of torch in the calling thread use ``count`` threads meanwhile; 0, or no way to: as before.

    ``torch.set_num_threads`` is for all threads. What OpenMP and MKL have below it is for the calling one.
    """
    libraries = _libraries() if count else None
    if libraries is None:
        yield
        return
    set_openmp, set_mkl = libraries
    # torch sets up every thread at its first use, which would undo this.
    before = torch.get_num_threads()
    set_openmp(count)
    set_mkl(count)
    try:
        yield
    finally:
        set_openmp(before)
        set_mkl(_AS_OTHERS)


@cache
def _libraries() -> tuple[Callable[[int], object], Callable[[int], object]] | None:
    """Return what sets the threads of the calling thread in OpenMP and in MKL, of the libraries that torch has loaded.

    None where it was built on others.
    """
    library = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    try:
        openmp = ctypes.CDLL("libgomp.so.1", os.RTLD_NOLOAD)
        return openmp.omp_set_num_threads, ctypes.CDLL(str(library), os.RTLD_NOLOAD).MKL_Set_Num_Threads_Local
    except (OSError, AttributeError):
        return None
