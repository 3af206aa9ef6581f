"""Errors as HTTP responses: ``{"error": "<one sentence>"}`` with the fitting status."""

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
        """The bytes of ``content``."""
        return orjson.dumps(content)


async def on_any_error(request: Request, error: Exception) -> Response:
    """Whatever a request has run into."""
    return await (on_error if isinstance(error, EdgeServeError) else on_fault)(request, error)


async def on_error(request: Request, error: Exception) -> Response:
    """An error of our tree: its sentence and its status, or a fault of ours."""
    assert isinstance(error, EdgeServeError)
    if error.is_fault:
        return await on_fault(request, error)
    return error_response(error)


async def on_http_error(request: Request, error: Exception) -> Response:
    """The framework's own refusals, in our words."""
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
    """The client has gone away in the middle of its request; nobody reads this."""
    return Response(status_code=HTTPStatus.BAD_REQUEST)


async def on_fault(request: Request, error: Exception) -> Response:
    """A fault of ours: the log has it under the request id that the client gets."""
    request_id = request.headers.get("x-request-id") or uuid.uuid4().hex
    request_id = request_id[:64]
    logger.error("request %s failed", request_id, exc_info=error)
    what = str(error) if isinstance(error, EdgeServeError) else "an unexpected fault"
    return error_response(InternalError(f"{what} (request id {request_id}; the log of the router says more)"))


def error_response(error: EdgeServeError, more_headers: Mapping[str, str] | None = None) -> Response:
    """The response for an error of our tree."""
    headers = dict(more_headers or {})
    if error.retry_after_s is not None:
        headers["Retry-After"] = str(max(1, math.ceil(error.retry_after_s)))
    if isinstance(error, Unauthenticated):
        headers["WWW-Authenticate"] = "Bearer"
    return JsonResponse({"error": error.message}, error.status, headers)
