"""Tokens: who may send requests."""

from __future__ import annotations

import hmac

from starlette.types import ASGIApp, Receive, Scope, Send

from serve_app.errors import (
    EdgeServeError,
    Forbidden,
    Unauthenticated,
)
from serve_app.serving.api.error_responses import error_response


class TokenGate:
    """Lets only requests through that carry the token; health checks need none."""

    def __init__(self, app: ASGIApp, token: str) -> None:
        self._app = app
        self._token = token.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or answer 401 or 403."""
        if scope["type"] == "http" and not scope["path"].endswith(("/v2/health/live", "/v2/health/ready")):
            try:
                require_token(dict(scope["headers"]).get(b"authorization"), self._token)
            except EdgeServeError as error:
                await error_response(error)(scope, receive, send)
                return
        await self._app(scope, receive, send)


def require_token(header: bytes | None, expected: bytes) -> None:
    """Raise ``Unauthenticated`` or ``Forbidden`` unless the header ``Authorization`` carries the token."""
    if header is None:
        raise Unauthenticated("this service asks for a token; send Authorization: Bearer <token>")
    scheme, _, token = header.partition(b" ")
    if scheme.lower() != b"bearer" or not hmac.compare_digest(token.strip(), expected):
        raise Forbidden("the token is not the one of this service; ask its operator for it")
