"""Reads the weights of a model that is being loaded, in the order of execution, while it already runs.

Left to itself the kernel reads a few MiB ahead of the page that is touched; between two touches lies a layer's time of
computing, in which the disk would idle.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache
from pathlib import Path

#: How much is read before it is asked again whether it is still wanted; asking takes the interpreter's lock, for which
#: the model that runs meanwhile competes.
_CHUNK_BYTES = 8 << 20

#: Models read at the same time: of those that somebody runs, and of the others. More wait their turn, and are read by
#: the kernel as they run. Few are as fast as most disks, and each takes a part of a processor from those that execute.
_URGENT_READERS, _PATIENT_READERS = 4, 2

#: As long as nobody runs the model, its reader pauses so many times as long as it has read: it takes a processor from
#: those that run others.
_PATIENCE = 3.0

#: Places in a file at which to look whether it is in memory: a call of about a microsecond each.
_PROBES = 8


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
    """Has the kernel read a file into memory from front to back, in a thread that waits for such work.

    Args:
        path: of the file.
        size_bytes: of the file.
    """

    def __init__(self, path: Path, size_bytes: int) -> None:
        self._path = path
        self._size_bytes = size_bytes
        self._is_wanted = True
        self._is_urgent = threading.Event()
        self._lock = threading.Lock()
        self._job = _submit(_patient_readers, self._read)

    def hurry(self) -> None:
        """Somebody waits for what is read: pause no more, and wait for nobody that does."""
        if self._is_urgent.is_set():
            return
        with self._lock:
            self._is_urgent.set()
            if self._job is not None and self._job.cancel():
                self._job = _submit(_urgent_readers, self._read)

    def stop(self) -> None:
        """Read no more than the chunk that is being read. Twice is harmless."""
        self._is_wanted = False
        with self._lock:
            self._is_urgent.set()
            if self._job is not None and self._job.cancel():
                self._job = None

    def wait(self) -> None:
        """Return once nothing more is read; after ``stop`` that is soon."""
        if self._job is not None:
            self._job.result()

    def _read(self) -> None:
        # It is read as it is touched anyway, and whoever touches it finds out what is wrong.
        # Not through the descriptor that is mapped: the kernel would take what is read here and what is touched there
        # for one reader, who jumps to and fro, and read ahead for neither.
        with contextlib.suppress(OSError), self._path.open("rb", buffering=0) as file:
            offset = 0
            # The pages are handed on to nobody, so nothing is copied. To touch the mapping instead would hold up every
            # thread of the process that asks the kernel for memory.
            while self._is_wanted and offset < self._size_bytes:
                began_s = time.monotonic()
                sent_bytes = os.sendfile(_nowhere(), file.fileno(), offset, _CHUNK_BYTES)
                if not sent_bytes:
                    return
                offset += sent_bytes
                self._is_urgent.wait(_PATIENCE * (time.monotonic() - began_s))


def _submit(readers: Callable[[], ThreadPoolExecutor], read: Callable[[], None]) -> Future[None] | None:
    """The job, or None where there is no thread for it: then it is only slower."""
    try:
        return readers().submit(read)
    except RuntimeError:
        return None


@cache
def _nowhere() -> int:
    return os.open(os.devnull, os.O_WRONLY)


@cache
def _urgent_readers() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(_URGENT_READERS, thread_name_prefix="read-now")


@cache
def _patient_readers() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(_PATIENT_READERS, thread_name_prefix="read-ahead")
