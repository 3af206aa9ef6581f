"""Memory of this process: what the kernel accounts to it, and how free heap returns to the kernel; without torch."""

from __future__ import annotations

import contextlib
import ctypes
import os
import queue
import threading
from collections.abc import Iterator
from pathlib import Path

from serve_app.core.memory_budget import ProcessMemory

_STATM = Path("/proc/self/statm")
_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")

# mallopt(3)
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_EXACT_BYTES = 64 * 2**10
#: Where glibc's own threshold ends up by itself, once a block of that size has been freed.
_USUAL_BYTES = 32 * 2**20

#: Of glibc, beside the size of a block: it is not of the main arena.
_NON_MAIN_ARENA = 4
#: Workers have two arenas, see ``MALLOC_ARENA_MAX`` in ``serving/app.py``.
_MOST_THREADS = 8
#: The C library looks at the end of an arena when so much is freed at once, or more.
_LOOKED_AT_BYTES = 128 * 2**10

_trimming = threading.Lock()
#: The threshold of this process; before it is set, glibc's own.
_trim_bytes = 128 * 2**10


def process_memory() -> ProcessMemory:
    """Read what this process has in memory, as the kernel accounts for it; takes microseconds."""
    _, resident, of_files, *_ = map(int, _STATM.read_text().split())
    return ProcessMemory(anonymous_bytes=(resident - of_files) * _PAGE_BYTES, file_bytes=of_files * _PAGE_BYTES)


def give_back_free_memory() -> None:
    """Give free heap back to the kernel; takes milliseconds, and does nothing where the C library cannot.

    The allocator keeps what executions have freed, which makes the next ones faster, and never returns it by itself.
    """
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        libc.malloc_trim(0)
        _trim_tops(libc)


def _trim_tops(libc: ctypes.CDLL) -> None:
    """Give back the free end of the main arena and of another one: ``malloc_trim`` reaches the main one only.

    The C library looks at the end of an arena when a larger block of it is freed. Threads get the arenas in turns, more
    or less, and a block says whether it is of the main one: so threads are started until both kinds were seen.
    """
    libc.malloc.restype = ctypes.c_void_p
    libc.free.argtypes = [ctypes.c_void_p]
    seen: queue.SimpleQueue[bool] = queue.SimpleQueue()
    ended = threading.Event()

    def free_a_block() -> None:
        block = libc.malloc(_LOOKED_AT_BYTES)
        if block:
            size_and_flags = ctypes.c_size_t.from_address(block - ctypes.sizeof(ctypes.c_size_t)).value
            libc.free(block)
            seen.put(bool(size_and_flags & _NON_MAIN_ARENA))
        else:
            seen.put(False)
        # A thread that ends leaves its arena to the next one.
        ended.wait()

    threads: list[threading.Thread] = []
    kinds: set[bool] = set()
    with _trimming:
        libc.mallopt(_M_TRIM_THRESHOLD, 0)
        try:
            while len(kinds) < 2 and len(threads) < _MOST_THREADS:
                thread = threading.Thread(target=free_a_block, name="trim")
                thread.start()
                threads.append(thread)
                kinds.add(seen.get())
        except RuntimeError:
            # The machine has no thread left.
            pass
        finally:
            ended.set()
            libc.mallopt(_M_TRIM_THRESHOLD, _trim_bytes)
    for thread in threads:
        thread.join()


def keep_freed_memory() -> None:
    """Have the allocator keep up to 64 MiB that are freed, for the next request: to fault pages in takes long.

    glibc comes to this by itself, but only when something large has been freed. Until then it takes the memory of each
    request of some hundred kilobytes from the kernel, and gives it back.
    """
    _set_thresholds(mmap=_USUAL_BYTES, trim=2 * _USUAL_BYTES)


@contextlib.contextmanager
def exact_heap() -> Iterator[None]:
    """Take larger blocks from the kernel and give them back at once: slower, but resident memory is what is in use."""
    # Trimming to 0, or a heap keeps its top, and the next thread that gets this heap takes from there.
    _set_thresholds(mmap=_EXACT_BYTES, trim=0)
    try:
        yield
    finally:
        # There is no way back to thresholds that adapt.
        keep_freed_memory()


def _set_thresholds(*, mmap: int, trim: int) -> None:
    global _trim_bytes
    with contextlib.suppress(OSError, AttributeError), _trimming:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
        mallopt(_M_MMAP_THRESHOLD, mmap)
        mallopt(_M_TRIM_THRESHOLD, trim)
        _trim_bytes = trim
