"""A line from a router straight to a worker of the same host: a Unix socket, framed messages, tensors as they are.

A call through a Serve handle takes many times as long, so hits on the same host go this way; Serve's handles stay the
way to other hosts. The worker listens (``LocalRpcServer``) in a folder that only its user may enter, under the name of
its replica, so a router that finds no such socket knows that the worker is elsewhere. What differs from a handle:

* a worker that dies breaks its lines, which fails their calls at once: ``ConnectionLost``;
* a call that is cancelled at the router is cancelled at the worker, and so are all calls of a router that dies;
* a worker that shuts down goes on answering until ``LocalRpcServer.close``, which lets go of no call that has begun;
  later ones fail like those to a dead worker. Serve does not count these calls, so its own draining does not wait for
  them.

A frame is a header, a pickled message, and the bytes of its one array, if it has any, which are not copied in between.
Both ends are of the same program and the same user, as with Ray's own calls.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import os
import pickle
import socket
import stat
import struct
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable
from enum import IntEnum
from pathlib import Path
from typing import Any

from serve_app.serving.transport.messages import InferenceTask, Reply

logger = logging.getLogger(__name__)

#: Call, kind, bytes of the pickled message with its padding, bytes of the array.
_HEADER = struct.Struct("<QIIQ")
#: Arrays begin at multiples of this, as vector instructions like it.
_ALIGNMENT = 64
_SCRATCH_BYTES = 64 * 1024
#: As much as the system allows: each time a socket is full costs two switches between processes.
_SOCKET_BYTES = 4 * 2**20


class ConnectionLost(Exception):
    """The other end has gone, or does not take calls any more."""


class _Kind(IntEnum):
    CALL = 0
    REPLY = 1
    FAULT = 2
    CANCEL = 3
    CLOSED = 4


class _Framed(asyncio.BufferedProtocol, ABC):
    """One end of a line: cuts what arrives into frames.

    Small frames are cut from a scratch buffer; a large one is received right into memory of its own, in which its array
    then stays.
    """

    def __init__(self) -> None:
        self._scratch = memoryview(bytearray(_SCRATCH_BYTES))
        self._have = 0
        self._large: memoryview | None = None
        self._transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Called by asyncio."""
        self._transport = transport  # type: ignore[assignment]
        for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):
            transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, option, _SOCKET_BYTES)

    def get_buffer(self, sizehint: int) -> memoryview:
        """Called by asyncio: where to put what arrives."""
        return (self._scratch if self._large is None else self._large)[self._have :]

    def buffer_updated(self, nbytes: int) -> None:
        """Called by asyncio: so much has arrived."""
        self._have += nbytes
        if self._large is not None:
            if self._have == len(self._large):
                frame, self._large, self._have = self._large, None, 0
                self._take(frame)
            return
        begin = 0
        while self._have - begin >= _HEADER.size:
            _, _, message_bytes, array_bytes = _HEADER.unpack_from(self._scratch, begin)
            size = _HEADER.size + message_bytes + array_bytes
            if self._have - begin < size:
                if size > len(self._scratch):
                    self._large = memoryview(bytearray(size))
                break
            self._take(memoryview(bytearray(self._scratch[begin : begin + size])))
            begin += size
        rest = bytes(self._scratch[begin : self._have])
        target = self._scratch if self._large is None else self._large
        target[: len(rest)] = rest
        self._have = len(rest)

    def send(self, call: int, kind: _Kind, message: object = None) -> None:
        """Send one frame; nothing happens if the line is broken."""
        if self._transport is None or self._transport.is_closing():
            return
        arrays: list[pickle.PickleBuffer] = []
        pickled = pickle.dumps(message, protocol=5, buffer_callback=arrays.append)
        padding = -(_HEADER.size + len(pickled)) % _ALIGNMENT
        array = arrays[0].raw() if arrays else b""
        head = _HEADER.pack(call, kind, len(pickled) + padding, len(array)) + pickled + bytes(padding)
        if arrays:
            self._transport.writelines((head, array))
        else:
            self._transport.write(head)

    def hang_up(self) -> None:
        """Close this end when everything has been sent."""
        if self._transport is not None:
            self._transport.close()

    def _take(self, frame: memoryview) -> None:
        call, kind, message_bytes, array_bytes = _HEADER.unpack_from(frame)
        end = _HEADER.size + message_bytes
        array = (frame[end : end + array_bytes],) if array_bytes else ()
        self.received(call, _Kind(kind), pickle.loads(frame[_HEADER.size : end], buffers=array))

    @abstractmethod
    def received(self, call: int, kind: _Kind, message: Any) -> None:
        """One frame has come."""


class LocalRpcConnection(_Framed):
    """The router's end: many calls at a time, each answered whenever it is done. Made by ``connect``."""

    def __init__(self) -> None:
        super().__init__()
        self._calls = itertools.count()
        self._waiting: dict[int, asyncio.Future[Reply]] = {}
        self.is_broken = False

    async def infer(self, work: InferenceTask) -> Reply:
        """Have the worker do it.

        Raises:
            LineBroken: the worker has died, or takes no calls any more.
            RuntimeError: a fault of ours at the worker, whose log says more.
        """
        if self.is_broken:
            raise ConnectionLost("the worker hung up")
        call = next(self._calls)
        answer: asyncio.Future[Reply] = asyncio.get_running_loop().create_future()
        self._waiting[call] = answer
        try:
            self.send(call, _Kind.CALL, work)
            return await answer
        except asyncio.CancelledError:
            self.send(call, _Kind.CANCEL)
            raise
        finally:
            self._waiting.pop(call, None)

    def received(self, call: int, kind: _Kind, message: Any) -> None:
        """An answer has come."""
        answer = self._waiting.get(call)
        if answer is None or answer.done():
            return
        match kind:
            case _Kind.REPLY:
                answer.set_result(message)
            case _Kind.CLOSED:
                answer.set_exception(ConnectionLost("the worker is shutting down"))
            case _:
                answer.set_exception(RuntimeError(f"the worker failed: {message}"))

    def connection_lost(self, error: Exception | None) -> None:
        """Called by asyncio: the worker has died or hung up."""
        self.is_broken = True
        for answer in self._waiting.values():
            if not answer.done():
                answer.set_exception(ConnectionLost("the worker died or hung up"))


class _ServerConnection(_Framed):
    """The worker's end of one line."""

    def __init__(self, exchange: LocalRpcServer) -> None:
        super().__init__()
        self._exchange = exchange
        self._running: dict[int, asyncio.Task[None]] = {}

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Called by asyncio."""
        super().connection_made(transport)
        if self._exchange.is_closed:
            self.hang_up()
        else:
            self._exchange.extensions.add(self)

    def connection_lost(self, error: Exception | None) -> None:
        """Called by asyncio: the router has gone, and nobody waits for what it asked for."""
        self._exchange.extensions.discard(self)
        for task in self._running.values():
            task.cancel()

    @property
    def running(self) -> tuple[asyncio.Task[None], ...]:
        """The calls that have begun."""
        return tuple(self._running.values())

    def received(self, call: int, kind: _Kind, message: Any) -> None:
        """A call has come, or is not wanted any more."""
        if kind is _Kind.CANCEL:
            task = self._running.get(call)
            if task is not None:
                task.cancel()
        elif self._exchange.is_closed:
            self.send(call, _Kind.CLOSED)
        else:
            task = asyncio.get_running_loop().create_task(self._answer(call, message))
            self._running[call] = task
            task.add_done_callback(lambda _: self._running.pop(call, None))

    async def _answer(self, call: int, work: InferenceTask) -> None:
        try:
            reply = await self._exchange.infer(work)
        except Exception as error:
            logger.exception("a call failed")
            self.send(call, _Kind.FAULT, f"{type(error).__name__}: {error}")
        else:
            self.send(call, _Kind.REPLY, reply)


class LocalRpcServer:
    """Where a worker takes calls of routers on its host.

    Args:
        infer: answers one call.
    """

    def __init__(self, infer: Callable[[InferenceTask], Awaitable[Reply]]) -> None:
        self.infer = infer
        self.is_closed = False
        self.extensions: set[_ServerConnection] = set()
        self._server: asyncio.Server | None = None
        self._path: Path | None = None

    async def open(self, folder: Path, replica: str) -> None:
        """Listen as ``replica`` in ``folder``; raises ``OSError`` where that cannot be done safely."""
        _own(folder)
        _sweep(folder)
        self._path = _socket_path(folder, replica)
        self._server = await asyncio.get_running_loop().create_unix_server(
            lambda: _ServerConnection(self), path=str(self._path), backlog=1024
        )

    async def close(self) -> None:
        """Take no more calls, and wait for those that have begun; then hang up."""
        self.is_closed = True
        if self._server is not None and self._path is not None:
            self._server.close()
            self._path.unlink(missing_ok=True)
        while running := [task for extension in self.extensions for task in extension.running]:
            await asyncio.wait(running)
        for extension in tuple(self.extensions):
            extension.hang_up()


async def connect(folder: Path, replica: str) -> LocalRpcConnection | None:
    """A line to a worker; None if there is no such worker on this host.

    Raises:
        LineBroken: it was here, but has gone.
    """
    path = _socket_path(folder, replica)
    try:
        # A cheap look first: for workers elsewhere this is asked again with every call.
        path.lstat()
        _require_own(folder)
        _, line = await asyncio.get_running_loop().create_unix_connection(LocalRpcConnection, str(path))
    except FileNotFoundError:
        return None
    except ConnectionError as error:
        raise ConnectionLost(f"nobody answers ({error.strerror})") from None
    except OSError as error:
        logger.warning("worker %s is asked by way of Serve: %s", replica, error)
        return None
    return line


class LocalRpcPool:
    """A router's lines to the workers of its host, made when they are first needed.

    Args:
        folder: where those workers listen.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._lines: dict[str, LocalRpcConnection] = {}

    async def to(self, replica: str) -> LocalRpcConnection | None:
        """The line to a worker; None if it is on another host; raises ``ConnectionLost`` if it has gone."""
        known = self._lines.get(replica)
        if known is not None and not known.is_broken:
            return known
        line = await connect(self._folder, replica)
        if line is None:
            return None
        self._lines = {name: other for name, other in self._lines.items() if not other.is_broken}
        # Another call may have connected meanwhile.
        if self._lines.setdefault(replica, line) is not line:
            line.hang_up()
        return self._lines[replica]


def _socket_path(folder: Path, replica: str) -> Path:
    return folder / f"{replica}.sock"


def _own(folder: Path) -> None:
    """Make the folder, or make sure that it is this user's and nobody else's."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    _require_own(folder)


def _require_own(folder: Path) -> None:
    """Raise ``PermissionError`` unless only this user may enter: who answers in there is trusted."""
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o077:
        raise PermissionError(f"{folder} is not a folder that only this user may enter")


def _sweep(folder: Path) -> None:
    """Remove the sockets of workers that were killed."""
    for path in folder.glob("*.sock"):
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX) as probe:
            probe.setblocking(False)
            try:
                probe.connect(str(path))
            except ConnectionRefusedError:
                path.unlink(missing_ok=True)
