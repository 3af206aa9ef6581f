"""Downloads that outlive the process: kept by URL and version, continued where they broke off, checked by digest."""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any, Final
from urllib.parse import unquote, urlsplit

from serve_app.errors import DownloadFailed, StoreError
from serve_app.models.sources.digests import require_digest
from serve_app.models.sources.remote_files import Download, Interrupted, RemoteFile, redacted
from serve_app.store.durable_files import sha256_of

logger = logging.getLogger(__name__)

#: Called with the bytes that are there, and with all of them; 0 while unknown.
OnBytes = Callable[[int, int], None]

#: How often a download that breaks off is continued, before that is left to the next run.
_ATTEMPTS: Final = 3


def ignore_bytes(done: int, total: int) -> None:
    """Report no progress."""


class DownloadCache:
    """A folder of downloaded files.

    Each URL has a folder with the file, ``record.json`` (its version and digest) and, while it is downloaded,
    ``partial`` and ``partial.json``. A file that is complete is put in place at once.

    Args:
        root: the folder; made when it is needed.
    """

    def __init__(self, root: Path) -> None:
        self._root = root

    def has(self, url: str) -> bool:
        """Return whether some version of the file is there."""
        return _Entry(self._root, url).kept() is not None

    def fetch(self, url: str, sha256: str | None, remote: RemoteFile, on_bytes: OnBytes) -> Path:
        """Return the file of a URL: as it is kept, where that is its latest version or has the digest, else downloaded.

        Where the server cannot be reached, the version that is kept will do.

        Raises:
            DownloadFailed: it is not kept, and cannot be downloaded.
            StoreError: it has another digest, or the folder cannot be written.
        """
        entry = _Entry(self._root, url)
        try:
            with entry.locked():
                return self._fetch(entry, sha256, remote, on_bytes)
        except OSError as error:
            raise StoreError(f"{entry.folder}: downloads cannot be kept there ({error.strerror or error})") from error

    def _fetch(self, entry: _Entry, sha256: str | None, remote: RemoteFile, on_bytes: OnBytes) -> Path:
        kept = entry.kept()
        known = entry.record().get("version") if kept else None
        if kept is not None and sha256 is not None and sha256_of(kept).startswith(sha256):
            return kept
        if sha256 is not None:
            known = None  # what is kept is not what is wanted
        try:
            return self._download(entry, sha256, remote, known, on_bytes) or entry.file
        except DownloadFailed as error:
            if kept is None or sha256 is not None:
                raise
            logger.warning("%s; the version that is kept is used: %s", error, kept)
            return kept

    def _download(
        self, entry: _Entry, sha256: str | None, remote: RemoteFile, known: str | None, on_bytes: OnBytes
    ) -> Path | None:
        """Return the downloaded file, or None where the version ``known`` is the latest."""
        broken: Interrupted | None = None
        for _ in range(_ATTEMPTS):
            offset, partial = entry.partial_state()
            with remote.open(offset, partial, known) as download:
                if download is None:
                    return None
                try:
                    entry.append(download, on_bytes)
                except Interrupted as error:
                    broken = error
                    continue
                digest = sha256_of(entry.partial)
                if sha256 is not None:
                    try:
                        require_digest(digest, sha256, redacted(entry.url))
                    except StoreError:
                        entry.partial.unlink()
                        raise
                return entry.complete(download.version, digest)
        raise DownloadFailed(
            f"cannot download {redacted(entry.url)}: the connection broke off {_ATTEMPTS} times ({broken}); publish "
            "again, and the download goes on where it stopped"
        )


class _Entry:
    """The folder of one URL."""

    def __init__(self, root: Path, url: str) -> None:
        self.url = url
        self.folder = root / hashlib.sha256(url.encode()).hexdigest()[:24]
        self.file = self.folder / (PurePosixPath(unquote(urlsplit(url).path)).name or "file")
        self.partial = self.folder / "partial"
        self._partial_record = self.folder / "partial.json"
        self._record = self.folder / "record.json"

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the folder against other processes."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def record(self) -> dict[str, Any]:
        """Return version and digest of the file that is kept."""
        return _read_json(self._record)

    def kept(self) -> Path | None:
        """Return the file, if it is complete."""
        return self.file if self.file.is_file() and self.record() else None

    def partial_state(self) -> tuple[int, str | None]:
        """Return the bytes of a broken download, and the version that they are of.

        What has come whole without being put in place is downloaded again: there is no rest to ask for.
        """
        record = _read_json(self._partial_record)
        version, size_bytes = record.get("version"), record.get("size_bytes")
        if not version or not self.partial.is_file() or self.partial.stat().st_size == size_bytes:
            return 0, None
        return self.partial.stat().st_size, version

    def append(self, download: Download, on_bytes: OnBytes) -> None:
        """Write a download behind what is there of it.

        Raises:
            Interrupted: it broke off.
        """
        self._partial_record.write_text(json.dumps({"version": download.version, "size_bytes": download.size_bytes}))
        done = download.offset
        with self.partial.open("ab" if done else "wb") as file:
            on_bytes(done, download.size_bytes)
            for chunk in download.chunks:
                file.write(chunk)
                done += len(chunk)
                on_bytes(done, download.size_bytes)
        if download.size_bytes and done != download.size_bytes:
            raise Interrupted(f"{done} of {download.size_bytes} bytes came")

    def complete(self, version: str | None, digest: str) -> Path:
        """Put the complete download in place."""
        self._record.unlink(missing_ok=True)
        self.partial.replace(self.file)
        self._record.write_text(json.dumps({"url": redacted(self.url), "version": version, "sha256": digest}))
        self._partial_record.unlink(missing_ok=True)
        return self.file


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}
