"""A client that takes as little time as possible itself: one keep-alive HTTP/1.1 connection on asyncio's own transport.

Requests are bytes that were made beforehand, so that what is measured is the server and the sockets.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import orjson

_ANSWER_S = 60.0


class WireError(Exception):
    """A server that did not answer as HTTP/1.1 has it, or not in time."""


@dataclass(frozen=True, slots=True)
class Reply:
    """One answer, and the seconds from the first byte sent to the last one received; header names in small letters."""

    status: int
    headers: Mapping[str, str]
    body: bytes
    seconds: float

    @property
    def exec_s(self) -> float:
        """What the server says that it spent executing; 0 where it does not say."""
        for entry in self.headers.get("server-timing", "").split(","):
            name, _, duration = entry.strip().partition(";dur=")
            if name == "exec":
                return float(duration) / 1000
        return 0.0


def request(host: str, port: int, path: str, body: bytes, headers: Mapping[str, str]) -> bytes:
    """A POST as it goes over the wire."""
    lines = [f"POST {path} HTTP/1.1", f"Host: {host}:{port}", f"Content-Length: {len(body)}"]
    lines += [f"{name}: {value}" for name, value in headers.items()]
    return "\r\n".join((*lines, "", "")).encode() + body


def binary_infer(shape: tuple[int, ...], input_name: str) -> tuple[bytes, dict[str, str]]:
    """Body and headers of an Open Inference Protocol request: one fp32 tensor, in binary both ways."""
    data = np.arange(np.prod(shape), dtype="<f4").tobytes()
    tensor = {"name": input_name, "shape": shape, "datatype": "FP32", "parameters": {"binary_data_size": len(data)}}
    head = orjson.dumps({"inputs": [tensor], "parameters": {"binary_data_output": True}})
    return head + data, {
        "Content-Type": "application/octet-stream",
        "Inference-Header-Content-Length": str(len(head)),
    }


class Connection(asyncio.Protocol):
    """One connection, for one request at a time; made by ``connect``."""

    def __init__(self) -> None:
        self._transport: asyncio.Transport | None = None
        self._received = bytearray()
        self._needed = 0
        self._head_bytes = 0
        self._answered: asyncio.Future[None] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Called by asyncio."""
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        """Called by asyncio."""
        self._received += data
        if not self._head_bytes:
            end = self._received.find(b"\r\n\r\n")
            if end < 0:
                return
            self._head_bytes = end + 4
            self._needed = self._head_bytes + _content_length(bytes(self._received[:end]))
        if len(self._received) >= self._needed and self._answered is not None and not self._answered.done():
            self._answered.set_result(None)

    def connection_lost(self, error: Exception | None) -> None:
        """Called by asyncio."""
        if self._answered is not None and not self._answered.done():
            self._answered.set_exception(WireError(f"the connection was closed before the answer ({error})"))

    async def ask(self, message: bytes) -> Reply:
        """Send one request and wait for its answer; raises ``WireError``."""
        assert self._transport is not None
        self._received.clear()
        self._head_bytes = 0
        self._answered = asyncio.get_running_loop().create_future()
        began_s = time.perf_counter()
        self._transport.write(message)
        # A timer for each request would be in the figures.
        await self._answered
        seconds = time.perf_counter() - began_s
        status, headers = _parse_head(bytes(self._received[: self._head_bytes - 4]))
        return Reply(status, headers, bytes(self._received[self._head_bytes :]), seconds)

    def close(self) -> None:
        """Hang up."""
        if self._transport is not None:
            self._transport.abort()


async def connect(host: str, port: int) -> Connection:
    """A connection; raises ``WireError``."""
    try:
        _, connection = await asyncio.get_running_loop().create_connection(Connection, host, port)
    except OSError as error:
        raise WireError(f"nothing answers at {host}:{port} ({error.strerror})") from None
    return connection


async def ask_many(host: str, port: int, message: bytes, *, count: int, connections: int = 1) -> list[Reply]:
    """Ask the same so often over each of so many connections at a time; raises ``WireError`` unless all are 200."""

    async def ask_in_turn() -> list[Reply]:
        connection = await connect(host, port)
        try:
            return [await connection.ask(message) for _ in range(count)]
        finally:
            connection.close()

    try:
        async with asyncio.timeout(_ANSWER_S):
            asked = await asyncio.gather(*(ask_in_turn() for _ in range(connections)))
    except TimeoutError:
        raise WireError(f"{host}:{port} did not answer {count} requests within {_ANSWER_S:.0f} s") from None
    replies = [reply for one in asked for reply in one]
    for reply in replies:
        if reply.status != 200:
            raise WireError(f"{host}:{port} answered {reply.status}: {reply.body[:200].decode(errors='replace')}")
    return replies


def _parse_head(head: bytes) -> tuple[int, dict[str, str]]:
    first, *lines = head.decode("latin-1").split("\r\n")
    headers = (line.partition(":") for line in lines)
    return int(first.split()[1]), {name.strip().lower(): value.strip() for name, _, value in headers}


def _content_length(head: bytes) -> int:
    _, headers = _parse_head(head)
    if "content-length" not in headers:
        raise WireError("an answer without Content-Length cannot be read by this client")
    return int(headers["content-length"])
