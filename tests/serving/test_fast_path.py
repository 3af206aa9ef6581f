"""Inference by the short way: with or without Serve around it, it is the same application."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import httpx
import numpy as np
import orjson
import pytest
from fakes import FakePool, done, make_router, report

from serve_app.config.edge import LimitSettings
from serve_app.serving.api.endpoints import HttpSettings, build_http_app
from serve_app.serving.api.fast_path import BypassMiddleware, FastPath, middlewares

PATH = "/paris/v2/models/small/infer"


def body() -> tuple[bytes, dict[str, str]]:
    data = np.zeros((1, 3, 8, 8), "<f4").tobytes()
    tensor = {"name": "input", "shape": [1, 3, 8, 8], "datatype": "FP32", "parameters": {"binary_data_size": len(data)}}
    head = orjson.dumps({"inputs": [tensor]})
    return head + data, {
        "Content-Type": "application/octet-stream",
        "Inference-Header-Content-Length": str(len(head)),
    }


def application(pool: FakePool, token: str | None = None) -> FastPath:
    settings = HttpSettings(location="paris", default_location="paris", limits=LimitSettings(), token=token)

    async def scrape() -> str:
        return ""

    return build_http_app(make_router(pool, report("paris", "small")), settings, scrape)


@pytest.fixture
async def served() -> AsyncIterator[Any]:
    """What Serve's HTTP server calls, and the paths that went through Serve: it mounts the application at /paris."""
    through_serve: list[str] = []
    previous = BypassMiddleware.application

    def around(app: FastPath) -> Any:
        async def serve(scope: Any, receive: Any, send: Any) -> None:
            through_serve.append(scope["path"])
            await app({**scope, "root_path": "/paris"}, receive, send)

        app.take_over()
        (middleware,) = middlewares()
        return middleware.cls(serve, *middleware.args, **middleware.kwargs), through_serve

    yield around
    BypassMiddleware.application = previous


async def test_inference_passes_serve_by_once_it_is_known_where_the_application_is_mounted(served: Any) -> None:
    app, through_serve = served(application(FakePool(paris=[done("paris-1")] * 3)))
    content, headers = body()
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://edge") as http:
        answers = [await http.post(PATH, content=content, headers=headers) for _ in range(3)]
        elsewhere = await http.post("/tokyo/v2/models/small/infer", content=content, headers=headers)
    assert [answer.status_code for answer in answers] == [200] * 3
    assert answers[0].content == answers[2].content
    assert answers[0].headers == answers[2].headers
    assert through_serve == [PATH, "/tokyo/v2/models/small/infer"]
    assert elsewhere.status_code == 404


async def test_the_short_way_asks_for_the_token_and_explains_its_errors(served: Any) -> None:
    app, _ = served(application(FakePool(paris=[done("paris-1")]), token="secret"))
    content, headers = body()
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://edge") as http:
        for _ in range(2):
            assert (await http.post(PATH, content=content, headers=headers)).status_code == 401
        known = {**headers, "Authorization": "Bearer secret"}
        assert (await http.post(PATH, content=content, headers=known)).status_code == 200
        missing = await http.post("/paris/v2/models/nowhere/infer", content=content, headers=known)
    assert missing.status_code == 404
    assert "no model or family" in missing.json()["error"]


async def test_a_client_that_hangs_up_has_its_request_cancelled(served: Any) -> None:
    pool = FakePool(paris=[asyncio.Event()])
    inner = application(pool)
    app, _ = served(inner)
    content, headers = body()
    hang_up = asyncio.Event()
    messages = iter([{"type": "http.request", "body": content}])

    async def receive() -> Any:
        for message in messages:
            return message
        await hang_up.wait()
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        raise AssertionError(f"nobody is there to be told {message}")

    scope = {
        "type": "http", "method": "POST", "path": PATH, "query_string": b"",
        "headers": [(name.lower().encode(), value.encode()) for name, value in headers.items()],
    }  # fmt: skip
    request = asyncio.create_task(app(scope, receive, send))
    async with asyncio.timeout(10):
        await pool.called.wait()
        hang_up.set()
        await request
