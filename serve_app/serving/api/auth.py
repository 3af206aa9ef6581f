"""Authorization by a bearer token."""

from __future__ import annotations

import hmac
from collections.abc import Callable

from starlette.types import ASGIApp, Receive, Scope, Send

from serve_app.errors import EdgeServeError, Forbidden, Unauthenticated
from serve_app.serving.api.error_responses import error_response

#: Raises an ``EdgeServeError`` unless the ASGI request may be served.
Authorize = Callable[[Scope], None]

_HEALTH_PATHS = ("/v2/health/live", "/v2/health/ready")


def require_token(token: str | None) -> Authorize:
    """Make the check of the header ``Authorization``; None authorizes every request.

    The check raises ``Unauthenticated`` for a request without a token, ``Forbidden`` for one with another token.
    """
    if token is None:
        return lambda scope: None
    expected = token.encode()

    def authorize(scope: Scope) -> None:
        header: bytes | None = dict(scope["headers"]).get(b"authorization")
        if header is None:
            raise Unauthenticated("this service asks for a token; send Authorization: Bearer <token>")
        scheme, _, credentials = header.partition(b" ")
        if scheme.lower() != b"bearer" or not hmac.compare_digest(credentials.strip(), expected):
            raise Forbidden("the token is not the one of this service; ask its operator for it")

    return authorize


class AuthorizationMiddleware:
    """ASGI middleware that answers unauthorized requests with 401 or 403; health checks need no token."""

    def __init__(self, app: ASGIApp, authorize: Authorize) -> None:
        self._app = app
        self._authorize = authorize

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass an authorized request on."""
        if scope["type"] == "http" and not scope["path"].endswith(_HEALTH_PATHS):
            try:
                self._authorize(scope)
            except EdgeServeError as error:
                await error_response(error)(scope, receive, send)
                return
        await self._app(scope, receive, send)
