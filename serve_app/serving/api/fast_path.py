"""The short way for inference through HTTP; what is done for every other address takes most of the time of a hit.

``FastPath`` is the FastAPI application, but for ``POST .../infer``, which it reads straight from ASGI.

``middlewares`` is for ``RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH``. With it, inference goes from Serve's HTTP server
to the application of this process without what Serve does in between: its accounts, its access log, and the tasks that
watch whether the client hangs up, which the hot path sees by itself. So whoever shuts the application down must wait
for requests under way, as Serve does for its own.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from typing import Any, ClassVar, Protocol

from fastapi import FastAPI
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

_INFER = re.compile("/v2/models/([^/]+)(?:/versions/([^/]+))?/infer")


class Incoming(Protocol):
    """What inference needs of a request; Starlette's ``Request`` is one."""

    @property
    def headers(self) -> Mapping[str, str]:
        """The headers, their names in small letters."""

    @property
    def path_params(self) -> Mapping[str, Any]:
        """``model`` and, if it was named, ``version``."""

    def stream(self) -> AsyncIterator[bytes]:
        """The body, as it comes in; raises ``ClientDisconnect``."""


class BareRequest:
    """A request as ASGI gives it, with nothing looked at that nobody asks for.

    From the end of its body on it watches whether its client hangs up, and then cancels the task that made it.
    """

    __slots__ = ("_receive", "_task", "_watch", "headers", "hung_up", "path_params")

    def __init__(self, scope: Scope, receive: Receive, path_params: Mapping[str, Any]) -> None:
        self.headers: Mapping[str, str] = {
            name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]
        }
        self.path_params = path_params
        self.hung_up = False
        self._receive = receive
        self._task = asyncio.current_task()
        self._watch: asyncio.Task[None] | None = None

    async def stream(self) -> AsyncIterator[bytes]:
        """The body, as it comes in; raises ``ClientDisconnect``."""
        more = True
        while more:
            message = await self._receive()
            if message["type"] == "http.disconnect":
                raise ClientDisconnect
            yield message.get("body", b"")
            more = message.get("more_body", False)
        self._watch = asyncio.get_running_loop().create_task(self._watch_client())

    async def _watch_client(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass
        self.hung_up = True
        if self._task is not None:
            self._task.cancel()

    def close(self) -> None:
        """Watch no longer."""
        if self._watch is not None:
            self._watch.cancel()


class FastPath(FastAPI):
    """An application whose inference takes the short way."""

    #: Answers an inference request; what it raises becomes a response by ``on_error``.
    infer: Callable[[Any], Awaitable[Response]]
    on_error: Callable[[Request, Exception], Awaitable[Response]]
    #: Raises what keeps a request with these headers out.
    admit: Callable[[Mapping[str, str]], None]

    #: Where the application is mounted, as Serve says with the requests that go through it.
    _prefix: str | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Called by Serve with one request."""
        self._prefix = scope.get("root_path", "")
        if not await self.take(scope, receive, send):
            await super().__call__(scope, receive, send)

    async def take(self, scope: Scope, receive: Receive, send: Send) -> bool:
        """Answer a request if it is inference; whether it was."""
        if scope["type"] != "http" or scope["method"] != "POST" or self._prefix is None:
            return False
        path: str = scope["path"]
        found = _INFER.fullmatch(path, len(self._prefix)) if path.startswith(self._prefix) else None
        if found is None:
            return False
        request = BareRequest(scope, receive, {"model": found[1], "version": found[2]})
        response = await self._answer(scope, request)
        if response is not None:
            await response(scope, receive, send)
        return True

    def take_over(self) -> None:
        """Be the application that ``middlewares`` of this process hand inference to."""
        BypassMiddleware.application = self

    async def _answer(self, scope: Scope, request: BareRequest) -> Response | None:
        """The response, or None: the client has hung up, and what was done for it is cancelled."""
        try:
            self.admit(request.headers)
            return await self.infer(request)
        except ClientDisconnect:
            return None
        except asyncio.CancelledError:
            if request.hung_up:
                return None
            raise
        except Exception as error:
            return await self.on_error(Request(scope), error)
        finally:
            request.close()


class BareResponse(Response):
    """A response of bytes; ``headers`` are written as they are."""

    def __init__(self, body: bytes, headers: Mapping[str, str]) -> None:
        # Not that of the base class: to look whether any header is missing takes longer than to write them all.
        self.status_code = 200
        self.body = body
        self.background = None
        self.raw_headers = [
            (name.lower().encode("latin-1"), value.encode("latin-1")) for name, value in headers.items()
        ]
        self.raw_headers.append((b"content-length", str(len(body)).encode()))


class BypassMiddleware:
    """Takes inference past Serve, and hands everything else on to it."""

    application: ClassVar[FastPath | None] = None

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Called by Serve's HTTP server with one request."""
        if self.application is None or not await self.application.take(scope, receive, send):
            await self._app(scope, receive, send)


def middlewares() -> list[Middleware]:
    """What Serve puts around the application of every replica that takes HTTP."""
    return [Middleware(BypassMiddleware)]
