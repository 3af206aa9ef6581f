"""How many threads one inference uses, in whatever runtime, and how many inferences run at the same time."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

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
