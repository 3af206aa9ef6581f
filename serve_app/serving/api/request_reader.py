"""What every endpoint reads of an HTTP request: its location, its models, its content type and its body."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from http import HTTPStatus

from starlette.requests import ClientDisconnect, Request

from serve_app.config.edge import LimitSettings
from serve_app.core.catalog import PublishedModel
from serve_app.errors import EdgeServeError, InvalidRequest, NotFound, PayloadTooLarge, UnsupportedMediaType
from serve_app.serving import oip
from serve_app.serving.api.fast_path import InferenceHttpRequest
from serve_app.serving.router.router import Router

_LOCATION_HEADER = "x-edge-location"

#: Memory for a body is allocated by its Content-Length up to this size, and beyond it only as the body arrives.
_PREALLOCATED_BYTES = 2**20
#: Of the memory of an array of bytes, and more than numbers need.
_ALIGNMENT = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class HttpSettings:
    """Settings of the HTTP interface. ``location`` is None for the gateway, which serves all locations."""

    location: str | None
    default_location: str
    limits: LimitSettings
    token: str | None


class RequestReader:
    """Reads requests to one router, and counts those that fail."""

    def __init__(self, router: Router, settings: HttpSettings) -> None:
        self._router = router
        self._settings = settings

    def location(self, request: InferenceHttpRequest) -> str:
        """Return the location that a request is for.

        Raises:
            NotFound: there is no such location, or another address serves it.
        """
        own = self._settings.location
        name: str = request.headers.get(_LOCATION_HEADER, own or self._settings.default_location)
        if own is not None and name != own:
            raise NotFound(f"this address serves {own} only; ask the address without a location for {name[:64]!r}")
        if name not in self._router.locations:
            raise NotFound(f"no location is called {name[:64]!r}; there are {', '.join(self._router.locations)}")
        return name

    def models(self, request: InferenceHttpRequest) -> tuple[PublishedModel, ...]:
        """Return the model that the path names, or the members of the family.

        Raises:
            NotFound: there is neither, or not in this version.
        """
        return self._router.models_named(self.name(request))

    def name(self, request: InferenceHttpRequest) -> str:
        """Return the name that the path has for a model or a family, as ``MODEL@VERSION`` where it has a version.

        Raises:
            NotFound: there is no such version.
        """
        name: str = request.path_params["model"]
        version: str | None = request.path_params.get("version")
        if not version:
            return name
        versions = self._router.catalog.versions(name)
        if not versions:
            # A family has no versions of its own.
            oip.check_version(version)
            return name
        oip.check_version(version, tuple(map(str, versions)))
        return f"{name}@{version}"

    async def body(self, request: InferenceHttpRequest, *, header_bytes: int = 0) -> memoryview:
        """Receive the body, as writable memory: torch wants its inputs so, and would copy them otherwise.

        Args:
            request: whose body is received.
            header_bytes: what follows so many bytes is aligned for numbers of any type, and need not be copied either.

        Raises:
            PayloadTooLarge: the body is larger than the limit.
        """
        limit = self._settings.limits.body
        message = f"the body is larger than the limit of {limit} bytes; send a smaller one"
        expected = int(request.headers.get("content-length") or 0)
        if expected > limit:
            raise PayloadTooLarge(message)
        begin = -header_bytes % _ALIGNMENT
        # A chunk is copied to its place while the next ones arrive.
        body, end = bytearray(begin + min(expected, _PREALLOCATED_BYTES)), begin
        async for chunk in request.stream():
            if end - begin + len(chunk) > limit:
                raise PayloadTooLarge(message)
            body[end : end + len(chunk)] = chunk
            end += len(chunk)
        return memoryview(body)[begin:end]

    @contextlib.contextmanager
    def counting_errors(self, request: InferenceHttpRequest, name: str) -> Iterator[None]:
        """Count a request that fails; the router counts one that succeeds, with its outcome."""
        try:
            yield
        except ClientDisconnect:
            raise
        except Exception as error:
            status = error.status if isinstance(error, EdgeServeError) else HTTPStatus.INTERNAL_SERVER_ERROR
            location = request.headers.get(_LOCATION_HEADER, self._settings.default_location)
            location = self._settings.location or (location if location in self._router.locations else "none")
            self._router.count(location, name, "error", status)
            raise


def query_options(request: Request, *known: str) -> dict[str, str]:
    """Return the options in the query of a request; those of every inference are always known.

    Raises:
        InvalidRequest: there is another one.
    """
    options = dict(request.query_params)
    all_known = (*known, *oip.OPTIONS)
    unknown = next((name for name in options if name not in all_known), None)
    if unknown is not None:
        raise InvalidRequest(f"there is no option {unknown[:64]!r}; the options are {', '.join(all_known)}")
    return options


def check_content_type(request: InferenceHttpRequest, accepted: frozenset[str], wording: str) -> str:
    """Return the content type of a body, which must be among ``accepted``, listed by ``wording``; and no encoding.

    Raises:
        UnsupportedMediaType: it has another.
    """
    encoding = request.headers.get("content-encoding", "identity")
    if encoding.lower() != "identity":
        raise UnsupportedMediaType(f"Content-Encoding {encoding[:32]!r} is not accepted here; send the body as it is")
    content_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if content_type not in accepted:
        found = f"{content_type[:64]!r} is" if content_type else "a body without a content type is"
        raise UnsupportedMediaType(f"{found} not accepted here; send Content-Type: {wording}")
    return content_type
