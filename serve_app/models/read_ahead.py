"""Reads the weights of a model that is being loaded, in the order of execution, while it already runs.

Left to itself the kernel reads a few MiB ahead of the page that is touched; between two touches lies a layer's time of
computing, in which the disk would idle.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import mmap
import os
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache

#: Linux 5.14 and newer; older ones say EINVAL, and read ahead as they always do.
_MADV_POPULATE_READ = 22

#: How much is read before it is asked again whether it is still wanted; asking takes the interpreter's lock, for which
#: the model that runs meanwhile competes.
_CHUNK_BYTES = 8 << 20

#: Models read at the same time; more wait their turn, and are read by the kernel as they run.
_READERS = 4

#: Places in a file at which to look whether it is in memory: a call of about a microsecond each.
_PROBES = 8

_libc = ctypes.CDLL(None, use_errno=True)
_libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)


def is_resident(descriptor: int, size_bytes: int) -> bool:
    """Whether the page cache has a file, going by samples; true where the file system cannot tell.

    A wrong answer costs time and nothing else.
    """
    byte = [bytearray(1)]
    try:
        for probe in range(_PROBES):
            os.preadv(descriptor, byte, (size_bytes - 1) * probe // (_PROBES - 1), os.RWF_NOWAIT)
    except BlockingIOError:
        return False
    except OSError:
        return True
    return True


class ReadAhead:
    """Reads a mapped file into memory from front to back, in a thread that waits for such work.

    Args:
        file: mapped whole; its owner calls ``stop`` before it goes.
        address: where it is mapped.
    """

    def __init__(self, file: mmap.mmap, address: int) -> None:
        self._size_bytes = len(file)
        self._address = address
        self._is_wanted = True
        self._job: Future[None] | None = None
        with contextlib.suppress(RuntimeError):  # without a thread it is only slower
            self._job = _readers().submit(self._read)

    def stop(self) -> None:
        """Returns once the file is not touched any more, after one chunk at most. Twice is harmless."""
        self._is_wanted = False
        if self._job is not None and not self._job.cancel():
            self._job.result()

    def _read(self) -> None:
        for offset in range(0, self._size_bytes, _CHUNK_BYTES):
            if not self._is_wanted:
                return
            length = min(_CHUNK_BYTES, self._size_bytes - offset)
            # Called by ctypes, because mmap.madvise would keep the interpreter's lock while it waits for the disk.
            if _libc.madvise(self._address + offset, length, _MADV_POPULATE_READ) and ctypes.get_errno() != errno.EINTR:
                return


@cache
def _readers() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(_READERS, thread_name_prefix="read-ahead")
