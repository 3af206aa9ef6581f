"""Memory of this process: what the kernel accounts to it, and how free heap returns to the kernel; without torch."""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections.abc import Iterator
from pathlib import Path

from serve_app.core.memory_budget import ProcessMemory

_STATM = Path("/proc/self/statm")
_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")

# mallopt(3)
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_EXACT_BYTES = 64 * 2**10
#: Where glibc's own, which grows with what is freed, ends up in a process that runs models.
_USUAL_BYTES = 32 * 2**20


def process_memory() -> ProcessMemory:
    """Read what this process has in memory, as the kernel accounts for it; takes microseconds."""
    _, resident, of_files, *_ = map(int, _STATM.read_text().split())
    return ProcessMemory(anonymous_bytes=(resident - of_files) * _PAGE_BYTES, file_bytes=of_files * _PAGE_BYTES)


def give_back_free_memory() -> None:
    """Give free heap back to the kernel; takes milliseconds, and does nothing where the C library cannot.

    The allocator keeps what executions have freed, which makes the next ones faster, and never returns it by itself.
    """
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)


@contextlib.contextmanager
def exact_heap() -> Iterator[None]:
    """Take larger blocks from the kernel and give them back at once: slower, but resident memory is what is in use."""
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        yield
        return
    mallopt(_M_MMAP_THRESHOLD, _EXACT_BYTES)
    # Otherwise a heap keeps its top, and the next thread that gets this heap takes from there.
    mallopt(_M_TRIM_THRESHOLD, 0)
    try:
        yield
    finally:
        # There is no way back to the thresholds that adapt.
        mallopt(_M_MMAP_THRESHOLD, _USUAL_BYTES)
        mallopt(_M_TRIM_THRESHOLD, 2 * _USUAL_BYTES)
