"""Read the weights of a model that is being loaded, in the order of execution, while the model already runs.

The kernel by itself reads a few MiB ahead of the page that is touched. Between two touches a layer computes, and the
disk would idle.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from functools import cache
from pathlib import Path

#: Bytes of one read. Between two reads the reader checks whether it was stopped, which takes the interpreter's lock,
#: and the model that runs meanwhile competes for that lock.
_CHUNK_BYTES = 8 << 20

#: Files read at the same time: of models that run, and of the others. More files wait for a thread; the kernel reads
#: them as their models run. Few readers are as fast as most disks, and each takes processor time from executions.
_URGENT_READERS, _BACKGROUND_READERS = 4, 2

#: While the model does not run, its reader pauses this many times as long as it has read: it takes processor time from
#: the models that run.
_PATIENCE = 3.0

#: Places in a file that are probed for residency: a call of about a microsecond each.
_PROBES = 8


def is_resident(descriptor: int, size_bytes: int) -> bool:
    """Return whether the page cache has a file, judged by samples; true where the file system cannot tell.

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
    """Has the kernel read a file into the page cache from front to back, in a thread of a pool.

    Args:
        path: of the file.
        size_bytes: of the file.
        patience: pauses while the model does not run, in parts of the time of reading.
        background: the pool that reads until ``prioritize``; by default one of the process.
    """

    def __init__(
        self, path: Path, size_bytes: int, *, patience: float = _PATIENCE, background: Executor | None = None
    ) -> None:
        self._path = path
        self._size_bytes = size_bytes
        self._patience = patience
        self._is_wanted = True
        self._is_urgent = threading.Event()
        self._lock = threading.Lock()
        self._job = _submit(background or _background_readers(), self._read)

    def prioritize(self) -> None:
        """Read without pauses, and not after files of models that do not run: an inference waits for this file."""
        if self._is_urgent.is_set():
            return
        with self._lock:
            self._is_urgent.set()
            if self._job is not None and self._job.cancel():
                self._job = _submit(_urgent_readers(), self._read)

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
        # An error is ignored: the inference that touches the page meets the same error and reports it.
        # Not through the descriptor that is mapped: the kernel would take what is read here and what is touched there
        # for one reader that jumps to and fro, and read ahead for neither.
        with contextlib.suppress(OSError), self._path.open("rb", buffering=0) as file:
            offset = 0
            # Sent to /dev/null, the pages are not copied. To touch the mapping instead would hold up every thread of
            # the process that asks the kernel for memory.
            while self._is_wanted and offset < self._size_bytes:
                began_s = time.monotonic()
                sent_bytes = os.sendfile(_dev_null(), file.fileno(), offset, _CHUNK_BYTES)
                if not sent_bytes:
                    return
                offset += sent_bytes
                self._is_urgent.wait(self._patience * (time.monotonic() - began_s))


def _submit(pool: Executor, read: Callable[[], None]) -> Future[None] | None:
    """Return the job, or None where no thread can be started: the load is then only slower."""
    try:
        return pool.submit(read)
    except RuntimeError:
        return None


@cache
def _dev_null() -> int:
    return os.open(os.devnull, os.O_WRONLY)


@cache
def _urgent_readers() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(_URGENT_READERS, thread_name_prefix="read-now")


@cache
def _background_readers() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(_BACKGROUND_READERS, thread_name_prefix="read-ahead")
