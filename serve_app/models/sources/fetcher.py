"""From a reference to a local file or folder, whatever it takes: a path, an installed package, a download."""

from __future__ import annotations

import ssl
from pathlib import Path

from serve_app.core.reference import Reference, hub_parts, parse_reference
from serve_app.errors import StoreError
from serve_app.models.sources import hub, packages
from serve_app.models.sources.digests import check_digest
from serve_app.models.sources.download_cache import DownloadCache, OnBytes, ignore_bytes
from serve_app.models.sources.probe import url_reachable
from serve_app.models.sources.remote_files import FileSystemFile, HttpFile

#: Where downloads are kept by default; they are made again when they are deleted.
DEFAULT_CACHE = Path("~/.cache/edgeserve/downloads")


class Fetcher:
    """Fetches the files that references name, and keeps what it has downloaded.

    Args:
        cache: the folder of downloads.
        ca_bundle: certificates of authorities to trust instead of the system's; None: those of the system, or of
            ``SSL_CERT_FILE`` and ``SSL_CERT_DIR``.
    """

    def __init__(self, cache: Path = DEFAULT_CACHE, *, ca_bundle: Path | None = None) -> None:
        self._root = cache.expanduser()
        self._cache = DownloadCache(self._root)
        self._ca_bundle = ca_bundle

    def fetch(self, reference: str, on_bytes: OnBytes = ignore_bytes) -> Path:
        """Return the local file or folder that a reference names, fetched if need be.

        Args:
            reference: see ``serve_app.core.reference``; a plain path is a file.
            on_bytes: called during downloads with the bytes that are there, and with all of them, 0 while unknown.

        Raises:
            DownloadFailed: it cannot be reached, now.
            StoreError: it is not there, its content is not the one of its digest, or an extra is missing.
        """
        parsed = _parsed(reference)
        if parsed.kind == "file":
            path = Path(parsed.place).expanduser()
            if not path.exists():
                raise StoreError(f"there is no file {path}; correct the reference {reference}")
        elif parsed.kind == "package":
            path = packages.find(parsed, self._root) or packages.download(parsed, self._root)
        elif parsed.kind == "hf":
            path = hub.fetch(parsed, on_bytes, self._answers)
        else:
            return self._cache.fetch(parsed.place, parsed.sha256, self._remote(parsed), on_bytes)
        check_digest(path, parsed.sha256, reference)
        return path

    def has(self, reference: str) -> bool:
        """Return whether a reference can be had without any network."""
        parsed = _parsed(reference)
        if parsed.kind == "file":
            return Path(parsed.place).expanduser().exists()
        if parsed.kind == "package":
            return packages.find(parsed, self._root) is not None
        if parsed.kind == "hf":
            return hub.has(parsed)
        return self._cache.has(parsed.place)

    def ssl_context(self) -> ssl.SSLContext:
        """Return what connections trust."""
        try:
            return ssl.create_default_context(cafile=str(self._ca_bundle) if self._ca_bundle else None)
        except (OSError, ssl.SSLError) as error:
            raise StoreError(f"{self._ca_bundle}: no certificates can be read from it ({error})") from error

    def _answers(self, url: str) -> bool:
        return url_reachable(url, context=self.ssl_context(), any_answer=True)

    def _remote(self, reference: Reference) -> HttpFile | FileSystemFile:
        if reference.kind in ("http", "https"):
            return HttpFile(reference.place, self.ssl_context)
        return FileSystemFile(reference.place)


def probe_url(reference: str) -> str | None:
    """Return the URL whose answer tells whether a reference can be downloaded; None where only trying tells it."""
    parsed = _parsed(reference)
    if parsed.kind == "hf":
        return f"{hub.endpoint()}/{hub_parts(parsed)[0]}"
    return parsed.place if parsed.kind in ("http", "https") else None


def _parsed(reference: str) -> Reference:
    try:
        return parse_reference(reference)
    except ValueError as error:
        raise StoreError(str(error)) from error
