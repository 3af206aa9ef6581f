"""The other side of ``fresh_process``: a process without threads that has imported torch and forks for each call."""

from __future__ import annotations

import ctypes
import gc
import importlib
import json
import os
import select
import signal
import socket
import sys
import warnings
from typing import Any

from serve_app.errors import EdgeServeError
from serve_app.models.builders.registry import build_on_meta
from serve_app.models.threads import use_threads
from serve_app.models.torchvision_compat import import_torchvision

#: Without a request for so long, the server ends; the next one starts another.
IDLE_S = 20.0

#: A module that takes milliseconds to build.
_SMALL = "torchvision:squeezenet1_1"

# prctl(2)
_PR_SET_PDEATHSIG = 1


def serve(descriptor: int) -> None:
    """Answer the requests that come over a socket, until it is closed or idle."""
    # Ctrl-C in a terminal is for the publisher, whose end ends this process too.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    warnings.simplefilter("ignore")
    use_threads(1)
    import_torchvision()
    importlib.import_module("serve_app.models.profiling.measure_published")
    # The first module without storage imports much more.
    build_on_meta(_SMALL, "random:0")
    # What is imported stays: its objects need not be looked through by every process that collects garbage.
    gc.collect()
    gc.freeze()
    with socket.socket(fileno=descriptor) as connection:
        requests = connection.makefile("rb")
        while select.select([connection], [], [], IDLE_S)[0]:
            line = requests.readline()
            if not line:
                return
            connection.sendall(_answer(line, connection) + b"\n")


def _answer(request: bytes, connection: socket.socket) -> bytes:
    """Fork a process for a request, and return its reply, or how it has ended."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reader)
        connection.close()
        _run(json.loads(request), writer)
    os.close(writer)
    reply = b""
    try:
        while chunk := _read(reader, connection):
            reply += chunk
        if chunk is None:
            os.kill(child, signal.SIGKILL)
    finally:
        os.close(reader)
        _, status = os.waitpid(child, 0)
    return reply or json.dumps({"ended": os.waitstatus_to_exitcode(status)}).encode()


def _read(reader: int, connection: socket.socket) -> bytes | None:
    """Wait for the next part of a reply, empty at its end; None if whoever waits for it has ended."""
    ready: list[int] = select.select([reader, connection.fileno()], [], [])[0]
    return None if connection.fileno() in ready else os.read(reader, 1 << 16)


def _run(request: dict[str, Any], writer: int) -> None:
    """Call the function of a request, write its reply, and end this process."""
    try:
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        sys.path[:] = request["path"]
        os.chdir(request["folder"])
        os.environ.clear()
        os.environ.update(request["environment"])
        module, _, name = request["function"].partition(":")
        result = getattr(importlib.import_module(module), name)(**request["arguments"])
        reply = {"result": result}
    except EdgeServeError as error:
        reply = {"refused": str(error)}
    except BaseException as error:  # also what ends a process: foreign code may call sys.exit
        reason = "out of memory" if isinstance(error, MemoryError) else f"{type(error).__name__}: {error}"
        reply = {"error": " ".join(reason.split())[:500]}
    with os.fdopen(writer, "wb") as pipe:
        pipe.write(json.dumps(reply).encode())
    os._exit(0)
