"""The directory of a store: one publisher at a time, and files that appear whole or not at all."""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

from serve_app.store.durable_files import explain_os_errors


class StoreDirectory:
    """The folders of a store, and the lock of its publishers; an instance may be used by several threads.

    Args:
        root: the directory; it is made by the first write.
    """

    def __init__(self, root: Path) -> None:
        self.root = Path(root)
        self._models = self.root / "models"
        self._blobs = self.root / "blobs"
        self._tmp = self.root / "tmp"
        self._writer = threading.RLock()
        self._depth = 0

    @contextlib.contextmanager
    def exclusive(self, on_wait: Callable[[], None] | None = None) -> Iterator[None]:
        """Make the caller the only publisher on this store, across threads and processes; may be nested.

        Blobs that no manifest names are safe from ``sweep`` only while their publisher holds this.

        Args:
            on_wait: called once if another publisher holds the store and this one has to wait.

        Raises:
            StoreError: the store cannot be written.
        """
        with self._writer:
            if self._depth == 0:
                descriptor = self._lock_file(on_wait)
            self._depth += 1
            try:
                yield
            finally:
                self._depth -= 1
                if self._depth == 0:
                    os.close(descriptor)

    def assume_exclusive(self) -> None:
        """Take the store as held by this instance, as the process that waits for this one holds it meanwhile."""
        with self._writer:
            self._depth += 1

    @contextlib.contextmanager
    def temporary(self, suffix: str) -> Iterator[Path]:
        """Yield a path to write to, and remove a file that is still there at the end."""
        path = self._tmp / f"{os.getpid()}-{secrets.token_hex(8)}{suffix}"
        try:
            yield path
        finally:
            path.unlink(missing_ok=True)

    def _lock_file(self, on_wait: Callable[[], None] | None) -> int:
        """Take the lock of the store; closing the descriptor, or the end of the process, releases it."""
        with explain_os_errors(f"write to {self.root}", self.root):
            for directory in (self._models, self._blobs, self._tmp):
                directory.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(self.root / "lock", os.O_RDWR | os.O_CREAT, 0o666)
            try:
                try:
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    if on_wait is not None:
                        on_wait()
                    fcntl.flock(descriptor, fcntl.LOCK_EX)
            except BaseException:
                os.close(descriptor)
                raise
        return descriptor
