"""Inference by the fast path gives the same responses past Serve as through Serve."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx
import numpy as np
import orjson
from fakes import FakePool, done, make_router, report

from serve_app.config.edge import LimitSettings
from serve_app.serving.api.fast_path import FastPathApp, FastPathRegistry, middlewares, register
from serve_app.serving.api.http_app import build_http_app
from serve_app.serving.api.request_reader import HttpSettings

PATH = "/paris/v2/models/small/infer"


def body() -> tuple[bytes, dict[str, str]]:
    data = np.zeros((1, 3, 8, 8), "<f4").tobytes()
    tensor = {"name": "input", "shape": [1, 3, 8, 8], "datatype": "FP32", "parameters": {"binary_data_size": len(data)}}
    head = orjson.dumps({"inputs": [tensor]})
    return head + data, {
        "Content-Type": "application/octet-stream",
        "Inference-Header-Content-Length": str(len(head)),
    }


def application(pool: FakePool, token: str | None = None) -> FastPathApp:
    settings = HttpSettings(location="paris", default_location="paris", limits=LimitSettings(), token=token)

    async def scrape() -> str:
        return ""

    return build_http_app(make_router(pool, report("paris", "small")), settings, scrape)


def deployed(app: FastPathApp) -> tuple[Any, list[str]]:
    """What Serve's HTTP server calls, and the paths that went through Serve, which mounts the application at /paris."""
    registry = FastPathRegistry()
    through_serve: list[str] = []

    async def serve(scope: Any, receive: Any, send: Any) -> None:
        through_serve.append(scope["path"])
        await app({**scope, "root_path": "/paris"}, receive, send)

    (middleware,) = middlewares(registry)
    register(app.fast_path, registry)
    return middleware.cls(serve, *middleware.args, **middleware.kwargs), through_serve


async def test_inference_bypasses_serve_once_the_route_prefix_is_known() -> None:
    app, through_serve = deployed(application(FakePool(paris=[done("paris-1")] * 3)))
    content, headers = body()
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://edge") as http:
        answers = [await http.post(PATH, content=content, headers=headers) for _ in range(3)]
        elsewhere = await http.post("/tokyo/v2/models/small/infer", content=content, headers=headers)
    assert [answer.status_code for answer in answers] == [200] * 3
    assert answers[0].content == answers[2].content
    assert answers[0].headers == answers[2].headers
    assert through_serve == [PATH, "/tokyo/v2/models/small/infer"]
    assert elsewhere.status_code == 404


async def test_a_process_without_an_application_passes_every_request_to_serve() -> None:
    app = application(FakePool(paris=[done("paris-1")]))
    (middleware,) = middlewares(FastPathRegistry())
    content, headers = body()
    transport = httpx.ASGITransport(middleware.cls(app, **middleware.kwargs))
    async with httpx.AsyncClient(transport=transport, base_url="http://edge") as http:
        answer = await http.post(PATH.removeprefix("/paris"), content=content, headers=headers)
    assert answer.status_code == 200


async def test_the_fast_path_asks_for_the_token_and_explains_its_errors() -> None:
    app, _ = deployed(application(FakePool(paris=[done("paris-1")]), token="secret"))
    content, headers = body()
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://edge") as http:
        for _ in range(2):
            assert (await http.post(PATH, content=content, headers=headers)).status_code == 401
        wrong = {**headers, "Authorization": "Bearer other"}
        assert (await http.post(PATH, content=content, headers=wrong)).status_code == 403
        known = {**headers, "Authorization": "Bearer secret"}
        assert (await http.post(PATH, content=content, headers=known)).status_code == 200
        missing = await http.post("/paris/v2/models/nowhere/infer", content=content, headers=known)
    assert missing.status_code == 404
    assert "no model or family" in missing.json()["error"]


async def test_inference_is_canceled_when_its_client_disconnects() -> None:
    pool = FakePool(paris=[asyncio.Event()])
    app, _ = deployed(application(pool))
    content, headers = body()
    disconnect = asyncio.Event()
    messages = iter([{"type": "http.request", "body": content}])

    async def receive() -> Any:
        for message in messages:
            return message
        await disconnect.wait()
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        raise AssertionError(f"the client has disconnected, and is sent {message}")

    scope = {
        "type": "http", "method": "POST", "path": PATH, "query_string": b"",
        "headers": [(name.lower().encode(), value.encode()) for name, value in headers.items()],
    }  # fmt: skip
    request = asyncio.create_task(app(scope, receive, send))
    async with asyncio.timeout(10):
        await pool.called.wait()
        disconnect.set()
        await request
