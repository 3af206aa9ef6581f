"""What uvicorn writes to a connection, with its own protocol: an answer of inference leaves in one write."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
from uvicorn.server import ServerState

from serve_app.serving.api.fast_path import FastResponse


class WrittenTransport(asyncio.Transport):
    """Keeps what is written, and whether it was closed after that."""

    def __init__(self) -> None:
        super().__init__()
        self.writes: list[bytes] = []
        self.closed = asyncio.Event()

    def write(self, data: Any) -> None:
        assert not self.closed.is_set()
        self.writes.append(bytes(data))

    def writelines(self, pieces: Any) -> None:
        for piece in pieces:
            self.write(piece)

    def is_closing(self) -> bool:
        return self.closed.is_set()

    def resume_reading(self) -> None:
        """Nothing is paused."""

    def close(self) -> None:
        self.closed.set()


async def written(answer: FastResponse, connection: str = "close") -> WrittenTransport:
    """Have uvicorn answer one request."""
    answered = asyncio.Event()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await answer(scope, receive, send)
        answered.set()

    config = uvicorn.Config(app, lifespan="off", log_config=None)
    config.load()
    assert config.http_protocol_class is HttpToolsProtocol, "Serve's HTTP server has another protocol by now"
    protocol = HttpToolsProtocol(config, ServerState(), {}, asyncio.get_running_loop())
    transport = WrittenTransport()
    protocol.connection_made(transport)
    protocol.data_received(f"GET / HTTP/1.1\r\nHost: edge\r\nConnection: {connection}\r\n\r\n".encode())
    async with asyncio.timeout(10):
        await answered.wait()
    assert protocol.transport is transport
    assert transport.closed.is_set() == (connection == "close")
    protocol.connection_lost(None)
    return transport


@pytest.mark.parametrize("connection", ["close", "keep-alive"])
async def test_head_and_body_leave_in_one_write(connection: str) -> None:
    transport = await written(FastResponse(b"body", {"X-Name": "value"}), connection)
    (one,) = transport.writes
    head, _, body = one.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200 OK\r\nx-name: value\r\ncontent-length: 4")
    assert body == b"body"


async def test_a_large_body_is_not_copied_behind_the_head() -> None:
    large = bytes(1_000_000)
    transport = await written(FastResponse(large, {}))
    assert transport.writes[-1] == large
    assert b"content-length: 1000000\r\n" in b"".join(transport.writes)


async def test_an_answer_goes_out_by_any_server() -> None:
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    await FastResponse(b"body", {})({}, send, send)
    assert [message["type"] for message in sent] == ["http.response.start", "http.response.body"]
    assert sent[1]["body"] == b"body"
