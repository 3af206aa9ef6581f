"""Call a function in a fresh process: one that has only imported the libraries, and that may crash.

Memory that a model takes and keeps shows only in a process that has had no other model, and foreign code can end its
process without an exception. A server that has imported torch (``fresh_process_server``) forks one process for each
call, which takes milliseconds. The server ends by itself when it is not needed, or when this process ends.

A function that is called so may make such calls itself: the same server answers, with another fresh process. What it
logs is logged here, and what it tells by ``tell`` reaches its caller meanwhile.

Messages are lines of JSON after a letter: ``CALL`` to the server, ``REPLY`` from it, and before that ``TELL``, and
``LOG`` to the first caller.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from typing import IO, Any, Final

from serve_app.errors import DownloadFailed, StoreError

CALL: Final = b"C"
TELL: Final = b"T"
LOG: Final = b"L"
REPLY: Final = b"R"

#: The server is a plain interpreter, so that the main module of this process, whatever it is, is not run again.
_PROGRAM = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); "
    "from serve_app.models.profiling.fresh_process_server import serve; serve(int(sys.argv[2]))"
)

#: Libraries below numpy and torch start no threads of their own, which a fork would lose.
#: Few heaps, as workers have: what further ones keep is not given back, and would count for the model.
_ENVIRONMENT = {
    "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "2",
}  # fmt: skip

_CRASHES = (signal.SIGSEGV, signal.SIGBUS, signal.SIGABRT, signal.SIGILL, signal.SIGFPE)


def call_in_fresh_process(
    function: str,
    arguments: dict[str, Any],
    what: str,
    when: str = "loaded and run",
    on_told: Callable[[dict[str, Any]], None] = lambda told: None,
) -> dict[str, Any]:
    """Call a function in a process of its own, and return its result.

    Args:
        function: ``package.module:name``; it takes ``arguments`` by keyword, and returns an object that JSON can carry.
        arguments: what JSON can carry.
        what: the subject of the sentence if the process ends, such as ``model 'x'``.
        when: what happens to it there.
        on_told: called with what the function tells meanwhile, see ``tell``.

    Raises:
        StoreError: the function has raised one, or any other error; or its process has crashed, or run out of memory.
    """
    request = {
        "function": function,
        "arguments": arguments,
        "path": sys.path,
        "folder": os.getcwd(),  # noqa: PTH109 (it goes into JSON)
        "environment": dict(os.environ) | _ENVIRONMENT,
        "log_level": logging.getLogger("serve_app").getEffectiveLevel(),
    }
    reply = _server.ask(request, on_told)
    if "result" in reply:
        result: dict[str, Any] = reply["result"]
        return result
    if "refused" in reply:
        raise (DownloadFailed if reply["is_download"] else StoreError)(str(reply["refused"]))
    if "error" in reply:
        raise StoreError(f"{what} fails in a process of its own ({reply['error']}); correct the model")
    raise StoreError(f"{what} {_ending(int(reply['ended']), when)}")


def prepare_server() -> None:
    """Start the server if none runs, so that it imports its libraries while this process does something else."""
    _server.start()


def tell(message: dict[str, Any]) -> None:
    """Tell the caller of the function that runs in this process something, before it returns."""
    _server.send(TELL, message)


def use_server(connection: socket.socket) -> None:
    """Make the calls of this process, which the server has forked, over a connection to it; relay what is logged."""
    _server.connect(connection)
    logging.getLogger().addHandler(_Relay())


def _ending(status: int, when: str) -> str:
    """Say how a process has ended whose exit status, negative for a signal, is ``status``."""
    if -status in _CRASHES:
        name = signal.Signals(-status).name
        return f"crashes its process ({name}) when it is {when}; it cannot be served, see its library's log"
    if -status == signal.SIGKILL:
        return f"has used up the memory of this machine when it was {when}; lower its limits"
    return f"ends its process (status {status}) when it is {when}; it cannot be served"


class _Relay(logging.Handler):
    """Sends what is logged in a process that the server has forked to the process of the server."""

    def emit(self, record: logging.LogRecord) -> None:
        """Send a record."""
        with contextlib.suppress(OSError):
            _server.send(LOG, {"name": record.name, "level": record.levelno, "text": self.format(record)})


class _Server:
    """The one server of this process."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._sending = threading.Lock()
        #: None in a process that the server has forked.
        self._process: subprocess.Popen[bytes] | None = None
        self._socket: socket.socket | None = None
        self._lines: IO[bytes] | None = None
        self._owner = 0

    def start(self) -> None:
        """Start the server, unless it runs."""
        with self._lock:
            self._started()

    def connect(self, connection: socket.socket) -> None:
        """Use a server that has forked this process."""
        self._socket, self._lines, self._owner = connection, connection.makefile("rb"), os.getpid()

    def send(self, kind: bytes, content: dict[str, Any]) -> None:
        """Send one message to the server."""
        assert self._socket is not None
        line = kind + json.dumps(content).encode() + b"\n"
        with self._sending:
            self._socket.sendall(line)

    def ask(self, request: dict[str, Any], on_told: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
        """Send a request and wait for the reply; start the server anew if it has ended meanwhile."""
        with self._lock:
            try:
                for _ in range(2):
                    self._started()
                    with contextlib.suppress(OSError):
                        self.send(CALL, request)
                    while line := self._next_line():
                        content: dict[str, Any] = json.loads(line[1:])
                        if line[:1] == REPLY:
                            return content
                        if line[:1] == LOG:
                            logging.getLogger(content["name"]).log(content["level"], "%s", content["text"])
                        else:
                            on_told(content)
                    self._end()
            except BaseException:
                # The rest of an answer must not be taken for that of the next request.
                self._end()
                raise
        raise StoreError("the process that measures models cannot be started; is there memory for it?")

    def _next_line(self) -> bytes:
        """Read a message; empty if the server has ended."""
        assert self._lines is not None
        try:
            return self._lines.readline()
        except OSError:
            return b""

    def _started(self) -> None:
        # After a fork the server belongs to the parent.
        if self._lines is not None and self._owner == os.getpid():
            if self._process is None or self._process.poll() is None:
                return
            self._end()
        ours, theirs = socket.socketpair()
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-c", _PROGRAM, json.dumps(sys.path), str(theirs.fileno())],
                pass_fds=(theirs.fileno(),),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                env=os.environ | _ENVIRONMENT,
            )
        self._socket, self._lines, self._owner = ours, ours.makefile("rb"), os.getpid()
        atexit.register(self._end)

    def _end(self) -> None:
        """Forget a server; closing the connection ends it."""
        atexit.unregister(self._end)
        if self._socket is not None and self._lines is not None:
            with contextlib.suppress(OSError):
                self._lines.close()
                self._socket.close()
        if self._process is not None and self._owner == os.getpid():
            self._process.wait()
        self._socket = self._lines = self._process = None


_server = _Server()
