"""Head and body of a response in one write: uvicorn writes them one after the other.

Each write is a system call, and wakes the process at the other end of the connection, which then waits for the rest.
ASGI has no way to say so; this is all of uvicorn that EdgeServe uses without being its public interface.
``tests/serving/test_joined_writes.py`` fails where an upgrade of uvicorn changes it, and the writes are two then.
"""

from __future__ import annotations

import contextlib
from typing import Any, Final

from starlette.types import Send
from uvicorn.protocols.http.httptools_impl import RequestResponseCycle

#: More than this is not copied to join it.
_MOST_BYTES: Final = 64 * 1024


class _JoiningTransport:
    """Collects what is written to a transport, which is otherwise asked itself."""

    __slots__ = ("_pieces", "_transport")

    def __init__(self, transport: Any) -> None:
        self._transport = transport
        self._pieces: list[bytes] = []

    def write(self, piece: bytes) -> None:
        """Keep a piece for ``flush``."""
        self._pieces.append(piece)
        if len(piece) > _MOST_BYTES:
            self.flush()

    def flush(self) -> None:
        """Write all pieces."""
        pieces, self._pieces = self._pieces, []
        if sum(map(len, pieces)) > _MOST_BYTES:
            self._transport.writelines(pieces)
        elif pieces:
            self._transport.write(b"".join(pieces))

    def close(self) -> None:
        """Close the transport once everything is written."""
        self.flush()
        self._transport.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)


class joined_writes(contextlib.AbstractContextManager[None]):  # noqa: N801 - it is used as a function
    """Has what ``send`` writes within the context written at its end, where ``send`` is uvicorn's."""

    __slots__ = ("_cycle", "_joining", "_transport")

    def __init__(self, send: Send) -> None:
        cycle = getattr(send, "__self__", None)
        self._cycle: Any = cycle if type(cycle) is RequestResponseCycle else None

    def __enter__(self) -> None:
        if self._cycle is not None:
            self._transport = self._cycle.transport
            self._joining = self._cycle.transport = _JoiningTransport(self._transport)

    def __exit__(self, *error: object) -> None:
        if self._cycle is not None:
            self._cycle.transport = self._transport
            self._joining.flush()
