"""Remote files behind one interface: over HTTP by httpx, in S3 and Google Cloud Storage by fsspec (extras)."""

from __future__ import annotations

import importlib
import ssl
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, Final, Protocol
from urllib.parse import urlsplit, urlunsplit

import httpx

from serve_app.errors import DownloadFailed, StoreError

_CHUNK_BYTES: Final = 2**20

#: Seconds until a connection must be made, and between two parts of a download.
_CONNECT_S, _STALL_S = 10.0, 30.0

#: Libraries of fsspec, and the extra that brings each.
_EXTRAS: Final = {"s3": ("s3fs", "s3"), "gs": ("gcsfs", "gs")}


@dataclass(frozen=True, slots=True, kw_only=True)
class Download:
    """A download under way: the content from ``offset`` on.

    Attributes:
        version: changes with the content; None: the server does not say, and the download cannot be resumed.
        size_bytes: of the whole file; 0: unknown.
        offset: 0 where the server starts anew, whatever was asked for.
        chunks: the content; may raise ``Interrupted``.
    """

    version: str | None
    size_bytes: int
    offset: int
    chunks: Iterator[bytes]


class Interrupted(Exception):
    """The connection broke within the content; what is there can be continued."""


class RemoteFile(Protocol):
    """One remote file."""

    def open(self, offset: int, partial: str | None, known: str | None) -> AbstractContextManager[Download | None]:
        """Start a download.

        Args:
            offset: continue there, if the file still has the version ``partial``.
            partial: version of what is there already.
            known: version that needs no download.

        Yields:
            The download; None where the file has the version ``known``.

        Raises:
            DownloadFailed: the file cannot be reached.
        """


class HttpFile:
    """A file of a web server; proxies are those of the environment.

    Args:
        url: where it is.
        ssl_context: makes what the connection trusts.
    """

    def __init__(self, url: str, ssl_context: Callable[[], ssl.SSLContext]) -> None:
        self._url = url
        self._ssl_context = ssl_context

    @contextmanager
    def open(self, offset: int, partial: str | None, known: str | None) -> Iterator[Download | None]:
        """See ``RemoteFile``; one request, because not every server and signed URL answers HEAD."""
        headers = {"Accept-Encoding": "identity"}
        if known is not None:
            headers |= _conditional("If-None-Match", "If-Modified-Since", known)
        elif offset and partial is not None and not partial.startswith("W/"):
            headers |= {"Range": f"bytes={offset}-", "If-Range": partial}
        timeout = httpx.Timeout(_STALL_S, connect=_CONNECT_S)
        try:
            with (
                httpx.Client(verify=self._ssl_context(), timeout=timeout, follow_redirects=True) as client,
                client.stream("GET", self._url, headers=headers) as response,
            ):
                yield self._download(response, offset)
        except httpx.HTTPError as error:
            raise DownloadFailed(f"cannot download {redacted(self._url)}: {_reason(error)}") from error
        except (httpx.InvalidURL, ValueError) as error:
            raise StoreError(f"cannot download {redacted(self._url)}: {error}; correct the URL") from error

    def _download(self, response: httpx.Response, offset: int) -> Download | None:
        if response.status_code == httpx.codes.NOT_MODIFIED:
            return None
        if not response.is_success:
            raise DownloadFailed(
                f"cannot download {redacted(self._url)}: the server answers {response.status_code} "
                f"{response.reason_phrase}"
            )
        resumed = response.status_code == httpx.codes.PARTIAL_CONTENT
        length, is_encoded = int(response.headers.get("Content-Length", 0)), "Content-Encoding" in response.headers
        start = offset if resumed else 0
        return Download(
            version=response.headers.get("ETag") or response.headers.get("Last-Modified"),
            size_bytes=start + length if length and not is_encoded else 0,
            offset=start,
            chunks=_http_chunks(response),
        )


class FileSystemFile:
    """A file in S3 or Google Cloud Storage, by fsspec; credentials and endpoints are those of the environment.

    Args:
        url: ``s3://BUCKET/KEY`` or ``gs://BUCKET/KEY``.
    """

    def __init__(self, url: str) -> None:
        self._url = url

    @contextmanager
    def open(self, offset: int, partial: str | None, known: str | None) -> Iterator[Download | None]:
        """See ``RemoteFile``."""
        system, path = self._system()
        try:
            info = system.info(path)
            if info.get("type") == "directory":
                raise StoreError(f"{self._url} is a folder; name a file in it")
            version = _version(info)
            if version is not None and version == known:
                yield None
                return
            start = offset if offset and version is not None and version == partial else 0
            with system.open(path, "rb", cache_type="none") as file:
                file.seek(start)
                chunks = _file_chunks(file)
                yield Download(version=version, size_bytes=int(info["size"]), offset=start, chunks=chunks)
        except (StoreError, Interrupted):
            raise
        except FileNotFoundError as error:
            raise DownloadFailed(f"cannot download {self._url}: there is no such file") from error
        except Exception as error:  # each library of fsspec has errors of its own
            raise DownloadFailed(f"cannot download {self._url}: {_reason(error)}") from error

    def _system(self) -> tuple[Any, str]:
        scheme = urlsplit(self._url).scheme
        library, extra = _EXTRAS.get(scheme, (scheme, "hub"))
        try:
            fsspec = importlib.import_module("fsspec")
            options: dict[str, Any] = {}
            if scheme == "s3":
                options["config_kwargs"] = {"connect_timeout": _CONNECT_S, "read_timeout": _STALL_S}
            system, path = fsspec.core.url_to_fs(self._url, **options)
        except ImportError as error:
            raise StoreError(f"{self._url} needs {library}; run: pip install 'edgeserve[{extra}]'") from error
        return system, path


def redacted(url: str) -> str:
    """Return a URL without what may be secret in it: user, password and query."""
    parts = urlsplit(url)
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))


def _conditional(by_tag: str, by_time: str, version: str) -> dict[str, str]:
    is_tag = version.startswith(('"', "W/"))
    return {by_tag if is_tag else by_time: version}


def _http_chunks(response: httpx.Response) -> Iterator[bytes]:
    try:
        yield from response.iter_bytes()  # as they come: what has come of a larger chunk would be lost with it
    except httpx.TransportError as error:
        raise Interrupted(_reason(error)) from error


def _file_chunks(file: Any) -> Iterator[bytes]:
    while True:
        try:
            chunk = file.read(_CHUNK_BYTES)
        except Exception as error:  # each library of fsspec has errors of its own
            raise Interrupted(_reason(error)) from error
        if not chunk:
            return
        yield chunk


def _version(info: dict[str, Any]) -> str | None:
    for key in ("ETag", "etag", "generation", "mtime"):
        if info.get(key):
            return str(info[key])
    return None


def _reason(error: Exception) -> str:
    reason = " ".join(str(error).split()) or type(error).__name__
    if "CERTIFICATE_VERIFY_FAILED" in reason:
        reason += "; name the certificate of a private authority in SSL_CERT_FILE"
    return reason[:300]
