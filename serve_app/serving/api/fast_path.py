"""The fast path: inference over HTTP without Ray Serve's and FastAPI's work per request, most of the time of a hit.

``FastPath`` answers ``POST .../infer`` straight from ASGI. A request reaches it in one of two ways:

* through Serve: ``FastPathApp``, the application that Serve calls, asks its ``FastPath`` before FastAPI;
* past Serve: ``BypassMiddleware`` stands before Serve's own ASGI application in the HTTP server of the replica. Serve
  puts it there by the import path in ``RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH``, which names ``middlewares``.

Serve makes the middleware before the replica has an application, and passes nothing to it. ``register`` connects the
two. Without the variable, or before ``register``, every request goes through Serve.

A request past Serve is in none of Serve's counts and logs, and Serve does not wait for it when the replica shuts down:
the router drains its own requests.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from typing import Any, Protocol

from fastapi import FastAPI
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from serve_app.serving.api.auth import Authorize
from serve_app.serving.api.joined_writes import joined_writes

_INFER = re.compile("/v2/models/([^/]+)(?:/versions/([^/]+))?/infer")


class InferenceHttpRequest(Protocol):
    """What inference reads of an HTTP request; Starlette's ``Request`` is one."""

    @property
    def headers(self) -> Mapping[str, str]:
        """The headers, with lower-case names."""

    @property
    def path_params(self) -> Mapping[str, Any]:
        """``model``, and ``version`` where the path has one."""

    def stream(self) -> AsyncIterator[bytes]:
        """The body, chunk by chunk; raises ``ClientDisconnect``."""


class FastRequest:
    """A request as ASGI gives it, parsed no further than inference needs.

    A request that takes longer than most hits watches its client from then on, and cancels its own task when the client
    disconnects. To watch takes a task, which is a good part of the time of a short hit.
    """

    #: Seconds after the end of the body until the client is watched.
    WATCHED_AFTER_S = 0.01

    __slots__ = ("_loop", "_receive", "_task", "_timer", "_watch", "disconnected", "headers", "path_params")

    def __init__(self, scope: Scope, receive: Receive, path_params: Mapping[str, Any]) -> None:
        self.headers: Mapping[str, str] = {
            name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]
        }
        self.path_params = path_params
        self.disconnected = False
        self._receive = receive
        self._loop = asyncio.get_running_loop()
        self._task = asyncio.current_task(self._loop)
        self._timer: asyncio.TimerHandle | None = None
        self._watch: asyncio.Task[None] | None = None

    async def stream(self) -> AsyncIterator[bytes]:
        """The body, chunk by chunk; raises ``ClientDisconnect``."""
        more = True
        while more:
            message = await self._receive()
            if message["type"] == "http.disconnect":
                raise ClientDisconnect
            yield message.get("body", b"")
            more = message.get("more_body", False)
        self._timer = self._loop.call_later(self.WATCHED_AFTER_S, self._begin_to_watch)

    def _begin_to_watch(self) -> None:
        self._watch = self._loop.create_task(self._watch_client())

    async def _watch_client(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass
        self.disconnected = True
        if self._task is not None:
            self._task.cancel()

    def close(self) -> None:
        """Stop watching the client."""
        if self._timer is not None:
            self._timer.cancel()
        if self._watch is not None:
            self._watch.cancel()


class FastResponse(Response):
    """A response of bytes with exactly the given headers and the content length."""

    def __init__(self, body: bytes, headers: Mapping[str, str]) -> None:
        # The constructor of the base class searches for missing headers, which takes longer than writing all of them.
        self.status_code = 200
        self.body = body
        self.background = None
        self.raw_headers = [
            (name.lower().encode("latin-1"), value.encode("latin-1")) for name, value in headers.items()
        ]
        self.raw_headers.append((b"content-length", str(len(body)).encode()))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the response."""
        with joined_writes(send):
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            await send({"type": "http.response.body", "body": self.body})


class FastPath:
    """Answers inference requests straight from ASGI.

    Args:
        infer: answers one inference request.
        authorize: raises unless the request may be served.
        on_error: makes the response for what ``infer`` or ``authorize`` raised.
    """

    def __init__(
        self,
        *,
        infer: Callable[[Any], Awaitable[Response]],
        authorize: Authorize,
        on_error: Callable[[Request, Exception], Awaitable[Response]],
    ) -> None:
        self._infer = infer
        self._authorize = authorize
        self._on_error = on_error
        self._route_prefix: str | None = None

    def set_route_prefix(self, route_prefix: str) -> None:
        """Set the path below which Serve has mounted the application; until then no request is answered here.

        Serve gives a replica its route prefix with the requests that go through Serve, and in no other way.
        """
        self._route_prefix = route_prefix

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> bool:
        """Answer a request if it is an inference request of this application; return whether it was."""
        if scope["type"] != "http" or scope["method"] != "POST" or self._route_prefix is None:
            return False
        path: str = scope["path"]
        found = _INFER.fullmatch(path, len(self._route_prefix)) if path.startswith(self._route_prefix) else None
        if found is None:
            return False
        request = FastRequest(scope, receive, {"model": found[1], "version": found[2]})
        response = await self._answer(scope, request)
        if response is not None:
            await response(scope, receive, send)
        return True

    async def _answer(self, scope: Scope, request: FastRequest) -> Response | None:
        """Return the response, or None if the client has disconnected; its inference is canceled then."""
        try:
            self._authorize(scope)
            return await self._infer(request)
        except ClientDisconnect:
            return None
        except asyncio.CancelledError:
            if request.disconnected:
                return None
            raise
        except Exception as error:
            return await self._on_error(Request(scope), error)
        finally:
            request.close()


class FastPathApp(FastAPI):
    """A FastAPI application whose inference requests take the fast path.

    Args:
        fast_path: is asked first for every request.
        settings: of FastAPI.
    """

    def __init__(self, fast_path: FastPath, **settings: Any) -> None:
        super().__init__(**settings)
        self.fast_path = fast_path

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Called by Serve with one request, and with the events of its lifespan, which carry no route prefix."""
        if scope["type"] == "http":
            self.fast_path.set_route_prefix(scope.get("root_path", ""))
        if not await self.fast_path.handle(scope, receive, send):
            await super().__call__(scope, receive, send)


class FastPathRegistry:
    """Connects the middleware of a process to the fast path of the process's application, which exists later."""

    def __init__(self) -> None:
        self.fast_path: FastPath | None = None


class BypassMiddleware:
    """ASGI middleware before Serve: passes inference requests to the registered fast path, all others to Serve.

    Args:
        app: Serve's ASGI application.
        registry: holds the fast path, or None until the application is registered.
    """

    def __init__(self, app: ASGIApp, registry: FastPathRegistry) -> None:
        self._app = app
        self._registry = registry

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Called by Serve's HTTP server with one request."""
        fast_path = self._registry.fast_path
        if fast_path is None or not await fast_path.handle(scope, receive, send):
            await self._app(scope, receive, send)


#: One replica runs in a process, and Serve calls ``middlewares`` without arguments.
_PROCESS = FastPathRegistry()


def register(fast_path: FastPath, registry: FastPathRegistry = _PROCESS) -> None:
    """Have ``BypassMiddleware`` pass inference requests to this fast path from now on."""
    registry.fast_path = fast_path


def middlewares(registry: FastPathRegistry = _PROCESS) -> list[Middleware]:
    """Return what Serve puts before its ASGI application in every process that serves HTTP."""
    return [Middleware(BypassMiddleware, registry=registry)]
