"""Calls from a router to a worker of the same host: framed messages over a Unix socket, tensors as they are.

A call through a Serve handle takes many times as long, so hits on the same host go this way; Serve's handles remain the
way to other hosts. The server of a worker (``LocalRpcServer``) listens in a folder that only its user may enter, under
the name of its replica: without such a socket, a router knows that the worker is on another host. Unlike a handle:

* a worker that dies breaks its connections, which fails their calls at once: ``ConnectionLost``;
* a call that is canceled at the router is canceled at the worker, and so are all calls of a router that dies;
* a worker that shuts down answers until ``LocalRpcServer.close``, which waits for every call that has begun; later
  calls fail like calls to a dead worker. Serve does not count these calls, so its own draining does not wait for them.

A frame is a header, a message as ``encoding`` writes it, and its arrays; large ones are not copied in between.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import os
import socket
import stat
import struct
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable
from enum import IntEnum
from pathlib import Path
from typing import Any

from serve_app.serving.transport.encoding import ALIGNMENT, decode, encode
from serve_app.serving.transport.messages import InferenceTask, Reply

logger = logging.getLogger(__name__)

#: Number of the call, kind, bytes of the message with its padding, bytes of the arrays.
_HEADER = struct.Struct("<QIIQ")
_SCRATCH_BYTES = 64 * 1024
#: Frames from so many bytes on are handed to the socket piece by piece; to join smaller ones is faster.
_APART_BYTES = 4096
#: As much as the system allows: each time a socket is full costs two switches between processes.
_SOCKET_BYTES = 4 * 2**20


class ConnectionLost(Exception):
    """The worker has died, or takes no more calls."""


class _Kind(IntEnum):
    CALL = 0
    REPLY = 1
    FAULT = 2
    CANCEL = 3
    CLOSED = 4


class _FramedProtocol(asyncio.BufferedProtocol, ABC):
    """One end of a connection: cuts received bytes into frames.

    Small frames are cut from a scratch buffer; a large frame is received into memory of its own, which its array keeps.
    """

    def __init__(self) -> None:
        self._scratch = memoryview(bytearray(_SCRATCH_BYTES))
        self._received_bytes = 0
        self._large: memoryview | None = None
        self._transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Called by asyncio."""
        self._transport = transport  # type: ignore[assignment]
        for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):
            transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, option, _SOCKET_BYTES)

    def get_buffer(self, sizehint: int) -> memoryview:
        """Called by asyncio for the buffer that it receives into."""
        return (self._scratch if self._large is None else self._large)[self._received_bytes :]

    def buffer_updated(self, nbytes: int) -> None:
        """Called by asyncio when the buffer has received ``nbytes`` more."""
        self._received_bytes += nbytes
        if self._large is not None:
            if self._received_bytes == len(self._large):
                frame, self._large, self._received_bytes = self._large, None, 0
                self._decode(frame)
            return
        begin = 0
        while self._received_bytes - begin >= _HEADER.size:
            _, _, message_bytes, array_bytes = _HEADER.unpack_from(self._scratch, begin)
            size = _HEADER.size + message_bytes + array_bytes
            if self._received_bytes - begin < size:
                if size > len(self._scratch):
                    self._large = memoryview(bytearray(size))
                break
            self._decode(memoryview(bytearray(self._scratch[begin : begin + size])))
            begin += size
        rest = bytes(self._scratch[begin : self._received_bytes])
        target = self._scratch if self._large is None else self._large
        target[: len(rest)] = rest
        self._received_bytes = len(rest)

    def send(self, call: int, kind: _Kind, message: object = None) -> None:
        """Send one frame; do nothing if the connection is lost."""
        if self._transport is None or self._transport.is_closing():
            return
        content, arrays = encode(message)
        padding = -(_HEADER.size + len(content)) % ALIGNMENT
        pieces: list[bytes | memoryview] = [content, bytes(padding)]
        arrays_bytes = 0
        for array in arrays:
            gap = -len(array) % ALIGNMENT
            pieces += (array, bytes(gap))
            arrays_bytes += len(array) + gap
        header = _HEADER.pack(call, kind, len(content) + padding, arrays_bytes)
        if arrays_bytes < _APART_BYTES:
            self._transport.write(b"".join((header, *pieces)))
        else:
            self._transport.writelines((header, *pieces))

    def close(self) -> None:
        """Close the connection once everything has been sent."""
        if self._transport is not None:
            self._transport.close()

    def abort(self) -> None:
        """Close the connection at once, as the death of this process would."""
        if self._transport is not None:
            self._transport.abort()

    def _decode(self, frame: memoryview) -> None:
        call, kind, message_bytes, _ = _HEADER.unpack_from(frame)
        end = _HEADER.size + message_bytes
        self.received(call, kind, decode(frame[_HEADER.size : end], frame[end:]))

    @abstractmethod
    def received(self, call: int, kind: int, message: Any) -> None:
        """Handle one frame."""


class LocalRpcConnection(_FramedProtocol):
    """The router's end of a connection, made by ``connect``: any number of calls at a time, answered in any order."""

    def __init__(self) -> None:
        super().__init__()
        self._calls = itertools.count()
        self._pending: dict[int, asyncio.Future[Reply]] = {}
        self.is_lost = False

    async def infer(self, task: InferenceTask) -> Reply:
        """Run a task at the worker.

        Raises:
            ConnectionLost: the worker has died, or takes no more calls.
            RuntimeError: a fault at the worker, whose log says more.
        """
        if self.is_lost:
            raise ConnectionLost("the worker has closed the connection")
        call = next(self._calls)
        reply: asyncio.Future[Reply] = asyncio.get_running_loop().create_future()
        self._pending[call] = reply
        try:
            self.send(call, _Kind.CALL, task)
            return await reply
        except asyncio.CancelledError:
            self.send(call, _Kind.CANCEL)
            raise
        finally:
            self._pending.pop(call, None)

    def received(self, call: int, kind: int, message: Any) -> None:
        """End the call that a frame answers."""
        reply = self._pending.get(call)
        if reply is None or reply.done():
            return
        match kind:
            case _Kind.REPLY:
                reply.set_result(message)
            case _Kind.CLOSED:
                reply.set_exception(ConnectionLost("the worker is shutting down"))
            case _:
                reply.set_exception(RuntimeError(f"the worker failed: {message}"))

    def connection_lost(self, error: Exception | None) -> None:
        """Called by asyncio when the worker has died or closed the connection."""
        self.is_lost = True
        for reply in self._pending.values():
            if not reply.done():
                reply.set_exception(ConnectionLost("the worker died or closed the connection"))


class _ServerConnection(_FramedProtocol):
    """The worker's end of a connection."""

    def __init__(self, server: LocalRpcServer) -> None:
        super().__init__()
        self._server = server
        self._running: dict[int, asyncio.Task[None]] = {}

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Called by asyncio."""
        super().connection_made(transport)
        if self._server.is_closed:
            self.close()
        else:
            self._server.connections.add(self)

    def connection_lost(self, error: Exception | None) -> None:
        """Called by asyncio when the router has died or closed the connection; its calls have no reader any more."""
        self._server.connections.discard(self)
        for running in self._running.values():
            running.cancel()

    @property
    def running(self) -> tuple[asyncio.Task[None], ...]:
        """The calls that have begun."""
        return tuple(self._running.values())

    def received(self, call: int, kind: int, message: Any) -> None:
        """Begin a call, or cancel it."""
        if kind == _Kind.CANCEL:
            running = self._running.get(call)
            if running is not None:
                running.cancel()
        elif self._server.is_closed:
            self.send(call, _Kind.CLOSED)
        else:
            running = asyncio.get_running_loop().create_task(self._answer(call, message))
            self._running[call] = running
            running.add_done_callback(lambda _: self._running.pop(call, None))

    async def _answer(self, call: int, task: InferenceTask) -> None:
        try:
            reply = await self._server.infer(task)
        except Exception as error:
            logger.exception("a call failed")
            self.send(call, _Kind.FAULT, f"{type(error).__name__}: {error}")
        else:
            self.send(call, _Kind.REPLY, reply)


class LocalRpcServer:
    """Takes the calls of routers on the host of a worker.

    Args:
        infer: answers one call.
    """

    def __init__(self, infer: Callable[[InferenceTask], Awaitable[Reply]]) -> None:
        self.infer = infer
        self.is_closed = False
        self.connections: set[_ServerConnection] = set()
        self._listener: asyncio.Server | None = None
        self._path: Path | None = None

    async def open(self, folder: Path, replica: str) -> None:
        """Listen as ``replica`` in ``folder``; raises ``OSError`` where that cannot be done safely."""
        _make_private(folder)
        _remove_stale_sockets(folder)
        self._path = _socket_path(folder, replica)
        self._listener = await asyncio.get_running_loop().create_unix_server(
            lambda: _ServerConnection(self), path=str(self._path), backlog=1024
        )

    async def close(self) -> None:
        """Take no more calls, wait for those that have begun, and close the connections."""
        self.is_closed = True
        if self._listener is not None and self._path is not None:
            self._listener.close()
            self._path.unlink(missing_ok=True)
        while running := [task for connection in self.connections for task in connection.running]:
            await asyncio.wait(running)
        for connection in tuple(self.connections):
            connection.close()


async def connect(folder: Path, replica: str) -> LocalRpcConnection | None:
    """Connect to a worker; None if there is no such worker on this host.

    Raises:
        ConnectionLost: the worker was on this host, but has died.
    """
    path = _socket_path(folder, replica)
    try:
        # A cheap check first: for workers on other hosts it runs with every call.
        path.lstat()
        _require_private(folder)
        _, connection = await asyncio.get_running_loop().create_unix_connection(LocalRpcConnection, str(path))
    except FileNotFoundError:
        return None
    except ConnectionError as error:
        raise ConnectionLost(f"the worker does not listen ({error.strerror})") from None
    except OSError as error:
        logger.warning("worker %s is called through Serve: %s", replica, error)
        return None
    return connection


class LocalRpcPool:
    """A router's connections to the workers of its host, each made for its first call.

    Args:
        folder: where those workers listen.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._connections: dict[str, LocalRpcConnection] = {}

    async def connection(self, replica: str) -> LocalRpcConnection | None:
        """Return the connection to a worker; None if the worker is on another host.

        Raises:
            ConnectionLost: the worker was on this host, but has died.
        """
        known = self._connections.get(replica)
        if known is not None and not known.is_lost:
            return known
        connection = await connect(self._folder, replica)
        if connection is None:
            return None
        self._connections = {name: other for name, other in self._connections.items() if not other.is_lost}
        # Another call may have connected meanwhile.
        if self._connections.setdefault(replica, connection) is not connection:
            connection.close()
        return self._connections[replica]


def _socket_path(folder: Path, replica: str) -> Path:
    return folder / f"{replica}.sock"


def _make_private(folder: Path) -> None:
    """Make the folder, or make sure that it is private to this user."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    _require_private(folder)


def _require_private(folder: Path) -> None:
    """Raise ``PermissionError`` unless only this user may enter: a router trusts every process that listens there."""
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o077:
        raise PermissionError(f"{folder} is not a folder that only this user may enter")


def _remove_stale_sockets(folder: Path) -> None:
    """Remove the sockets of workers that were killed."""
    for path in folder.glob("*.sock"):
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX) as probe:
            probe.setblocking(False)
            try:
                probe.connect(str(path))
            except ConnectionRefusedError:
                path.unlink(missing_ok=True)
