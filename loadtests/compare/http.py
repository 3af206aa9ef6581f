"""One keep-alive connection, as cheap as Python has it: the client shares the machine with what it measures."""

from __future__ import annotations

import http.client
import time
from collections.abc import Mapping
from dataclasses import dataclass, field

_TIMEOUT_S = 30.0
_OK = 200
#: A connection that was idle for longer is made anew: servers close idle ones, and such a request would seem to fail.
_IDLE_S = 1.0


class RequestFailed(Exception):
    """No answer, or not the one that was asked for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    """One answer, as the side itself reports it.

    ``wait_s`` is how long the request waited for its model; ``queue_s`` how long for a thread that runs it.
    ``predictions`` are probabilities by class; only read when asked for.
    """

    outcome: str
    wait_s: float
    queue_s: float
    exec_s: float
    predictions: Mapping[int, float] = field(default_factory=dict)


class Http:
    """One connection to one server; connects again after a failure."""

    def __init__(self, port: int) -> None:
        self._connection = http.client.HTTPConnection("127.0.0.1", port, timeout=_TIMEOUT_S)
        self._used_s = time.monotonic()

    def post(self, path: str, body: bytes, headers: Mapping[str, str]) -> tuple[http.client.HTTPMessage, bytes]:
        """Headers and body of the answer; raises ``RequestFailed``."""
        return self._send("POST", path, body, headers)

    def get(self, path: str) -> bytes:
        """Body of the answer; raises ``RequestFailed``."""
        return self._send("GET", path, None, {})[1]

    def close(self) -> None:
        """Close the connection."""
        self._connection.close()

    def _send(
        self, method: str, path: str, body: bytes | None, headers: Mapping[str, str]
    ) -> tuple[http.client.HTTPMessage, bytes]:
        if time.monotonic() - self._used_s > _IDLE_S:
            self._connection.close()
        try:
            self._connection.request(method, path, body, dict(headers))
            answer = self._connection.getresponse()
            content = answer.read()
        except (OSError, http.client.HTTPException) as error:
            self._connection.close()
            raise RequestFailed(f"{type(error).__name__}: {error}") from None
        finally:
            self._used_s = time.monotonic()
        if answer.status != _OK:
            raise RequestFailed(f"{answer.status} {content[:200].decode(errors='replace')}")
        return answer.headers, content


def timings_s(header: str) -> dict[str, float]:
    """Seconds of every part of a ``Server-Timing`` header.

    Raises:
        RequestFailed: it is not one.
    """
    try:
        parts = [part.strip().split(";dur=") for part in header.split(",")]
        return {name: float(milliseconds) / 1000 for name, milliseconds in parts}
    except ValueError:
        raise RequestFailed(f"no Server-Timing: {header[:100]!r}") from None
