"""Helpers for files that must survive crashes, full disks and missing permissions."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from serve_app.errors import StoreError

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_FORBIDDEN = {errno.EACCES, errno.EPERM, errno.EROFS}


@contextlib.contextmanager
def explain_os_errors(doing: str, path: Path) -> Iterator[None]:
    """Turn an ``OSError`` into a ``StoreError`` that says what to do.

    Args:
        doing: the attempt, as in "cannot <doing>".
        path: a path on the file system concerned.
    """
    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            advice = f"{_free_mb(path)} MB are free; make room, raise the limit or choose another store directory"
        elif error.errno in _FORBIDDEN:
            advice = "give this user the right to write there or choose another store directory"
        else:
            advice = "check the store directory and its disk"
        raise StoreError(f"cannot {doing}: {error.strerror or error}; {advice}") from error


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file, as 64 hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def stat_signature(path: Path) -> list[int]:
    """Return what changes when a file is written to or replaced: inode, size, and the times of content and inode.

    Raises:
        OSError: it is missing.
    """
    status = path.stat()
    return [status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns]


def write_durably(path: Path, content: bytes) -> None:
    """Write a file, and wait until the disk has it."""
    path.write_bytes(content)
    fsync_path(path)


def fsync_path(path: Path) -> None:
    """Wait until the disk has a file, or the names in a directory."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def is_alive(pid: str) -> bool:
    """Return whether a process of this machine has this number; false for anything but a number."""
    if not pid.isdigit():
        return False
    try:
        os.kill(int(pid), 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return True


def _free_mb(path: Path) -> int:
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free // 1_000_000
