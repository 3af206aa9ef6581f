"""What a process of its own measures of its heap; it imports no torch, which would take seconds."""

from __future__ import annotations

import ctypes
import resource
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from serve_app.models.process_memory import exact_heap, give_back_free_memory, keep_freed_memory, process_memory

_BLOCK_BYTES = 30 * 2**20


def freed_while_exact_bytes() -> int:
    """Fall of the memory of this process when half of the blocks of a full heap are freed."""
    with exact_heap():
        kept = [np.ones(2**18, np.uint8) for _ in range(256)]
        full = process_memory()
        del kept[::2]
        return full.anonymous_bytes - process_memory().anonymous_bytes


def faults_of_the_second_burst() -> int:
    """Page faults of this process when it takes the memory of sixteen requests once more, and has freed the first."""
    keep_freed_memory()
    faults = 0
    for _ in range(2):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        burst = [np.ones(600_000, np.uint8) for _ in range(16)]
        del burst
        faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
    return faults


def kept_by_a_thread_bytes() -> int:
    """Have a thread that lives on free what it took; return what of that the process has after giving back."""
    keep_freed_memory()

    def take() -> None:
        # One block, which is the end of the arena of the thread, and no wrapped one, whose objects would come after it.
        libc = ctypes.CDLL("libc.so.6")
        libc.malloc.restype, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
        block = libc.malloc(ctypes.c_size_t(_BLOCK_BYTES))
        ctypes.memset(block, 1, _BLOCK_BYTES)
        libc.free(block)

    before = process_memory()
    with ThreadPoolExecutor(2) as threads:
        together = threading.Barrier(2)
        for ended in [threads.submit(lambda: (together.wait(), take())) for _ in range(2)]:
            ended.result()
        give_back_free_memory()
        return process_memory().anonymous_bytes - before.anonymous_bytes
