"""Call a function in a fresh process: one that has only imported the libraries, and that may crash.

Memory that a model takes and keeps shows only in a process that has had no other model, and foreign code can end its
process without an exception. A server that has imported torch (``fresh_process_server``) forks one process for each
call, which takes milliseconds. The server ends by itself when it is not needed, or when this process ends.
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
from typing import Any

from serve_app.errors import StoreError

logger = logging.getLogger(__name__)

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


def call_in_fresh_process(function: str, arguments: dict[str, Any], what: str) -> dict[str, Any]:
    """Call a function in a process of its own, and return its result.

    Args:
        function: ``package.module:name``; it takes ``arguments`` by keyword, and returns an object that JSON can carry.
        arguments: what JSON can carry.
        what: the subject of the sentence if the process ends, such as ``model 'x'``.

    Raises:
        StoreError: the function has raised one, or any other error; or its process has crashed, or run out of memory.
    """
    request = {
        "function": function,
        "arguments": arguments,
        "path": sys.path,
        "folder": os.getcwd(),  # noqa: PTH109 (it goes into JSON)
        "environment": dict(os.environ) | _ENVIRONMENT,
    }
    reply = _server.ask(request)
    if "result" in reply:
        result: dict[str, Any] = reply["result"]
        return result
    if "refused" in reply:
        raise StoreError(str(reply["refused"]))
    if "error" in reply:
        raise StoreError(f"{what} fails in a process of its own ({reply['error']}); correct the model")
    raise StoreError(f"{what} {_ending(int(reply['ended']))}")


def prepare_server() -> None:
    """Start the server if none runs, so that it imports its libraries while this process does something else."""
    _server.start()


def _ending(status: int) -> str:
    """Say how a process has ended whose exit status, negative for a signal, is ``status``."""
    if -status in _CRASHES:
        name = signal.Signals(-status).name
        return f"crashes its process ({name}) when it is loaded and run; it cannot be served, see its library's log"
    if -status == signal.SIGKILL:
        return "has used up the memory of this machine when it was loaded and run; lower its limits"
    return f"ends its process (status {status}) when it is loaded and run; it cannot be served"


class _Server:
    """The one server of this process."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._socket: socket.socket | None = None
        self._owner = 0

    def start(self) -> None:
        """Start the server, unless it runs."""
        with self._lock:
            self._started()

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        """Send a request and wait for the reply; start the server anew if it has ended meanwhile."""
        line = json.dumps(request).encode() + b"\n"
        with self._lock:
            for _ in range(2):
                connection = self._started()
                try:
                    connection.sendall(line)
                    reply = connection.makefile("rb").readline()
                except OSError:
                    reply = b""
                if reply:
                    answer: dict[str, Any] = json.loads(reply)
                    return answer
                self._end()
        raise StoreError("the process that measures models cannot be started; is there memory for it?")

    def _started(self) -> socket.socket:
        # After a fork the server belongs to the parent.
        if self._socket is not None and self._process is not None and self._owner == os.getpid():
            if self._process.poll() is None:
                return self._socket
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
        self._socket, self._owner = ours, os.getpid()
        atexit.register(self._end)
        return ours

    def _end(self) -> None:
        """Forget a server; closing the connection ends it."""
        atexit.unregister(self._end)
        if self._socket is not None:
            with contextlib.suppress(OSError):
                self._socket.close()
        if self._process is not None and self._owner == os.getpid():
            self._process.wait()
        self._socket = self._process = None


_server = _Server()
