"""Errors as HTTP responses: ``{"error": "<one sentence>"}`` with the status of the error."""

from __future__ import annotations

import logging
import math
import uuid
from collections.abc import Mapping
from http import HTTPStatus

import orjson
from fastapi import Request
from fastapi.responses import Response
from starlette.exceptions import HTTPException

from serve_app.errors import (
    EdgeServeError,
    InternalError,
    MethodNotAllowed,
    NotFound,
    Unauthenticated,
)

logger = logging.getLogger(__name__)


class JsonResponse(Response):
    """JSON written by orjson."""

    media_type = "application/json"

    def render(self, content: object) -> bytes:
        """Return ``content`` as JSON."""
        return orjson.dumps(content)


async def on_any_error(request: Request, error: Exception) -> Response:
    """Respond to any exception of a request."""
    return await (on_error if isinstance(error, EdgeServeError) else on_fault)(request, error)


async def on_error(request: Request, error: Exception) -> Response:
    """Respond to an ``EdgeServeError``: its sentence and status, or the response to a fault."""
    assert isinstance(error, EdgeServeError)
    if error.is_fault:
        return await on_fault(request, error)
    return error_response(error)


async def on_http_error(request: Request, error: Exception) -> Response:
    """Respond to an error of the web framework, as to one of ``errors.py``."""
    assert isinstance(error, HTTPException)
    path = request.url.path[:200]
    if error.status_code == HTTPStatus.METHOD_NOT_ALLOWED:
        return error_response(
            MethodNotAllowed(f"{path} does not take {request.method}; see /docs for what it takes"), error.headers
        )
    if error.status_code == HTTPStatus.NOT_FOUND:
        return error_response(NotFound(f"there is nothing at {path}; see /docs for what there is"))
    return JsonResponse({"error": str(error.detail)}, error.status_code)


async def on_disconnect(request: Request, error: Exception) -> Response:
    """Respond to a client that has disconnected before the end of its request; the response is not read."""
    return Response(status_code=HTTPStatus.BAD_REQUEST)


async def on_fault(request: Request, error: Exception) -> Response:
    """Respond to a fault of EdgeServe: log it under a request id, and name the id to the client."""
    request_id = request.headers.get("x-request-id") or uuid.uuid4().hex
    request_id = request_id[:64]
    logger.error("request %s failed", request_id, exc_info=error)
    what = str(error) if isinstance(error, EdgeServeError) else "an unexpected fault"
    return error_response(InternalError(f"{what} (request id {request_id}; the log of the router says more)"))


def error_response(error: EdgeServeError, more_headers: Mapping[str, str] | None = None) -> Response:
    """Return the response for an ``EdgeServeError``."""
    headers = dict(more_headers or {})
    if error.retry_after_s is not None:
        headers["Retry-After"] = str(max(1, math.ceil(error.retry_after_s)))
    if isinstance(error, Unauthenticated):
        headers["WWW-Authenticate"] = "Bearer"
    return JsonResponse({"error": error.message}, error.status, headers)
