"""The other side of ``fresh_process``: a process without threads that has imported torch and forks for each call."""

from __future__ import annotations

import ctypes
import gc
import importlib
import json
import logging
import os
import select
import signal
import socket
import sys
import warnings
from collections.abc import Sequence
from typing import Any

from serve_app.errors import DownloadFailed, EdgeServeError
from serve_app.models.builders.registry import build_on_meta
from serve_app.models.graph_optimizations import foldable_norms
from serve_app.models.profiling.fresh_process import CALL, LOG, REPLY, use_server
from serve_app.models.threads import use_threads
from serve_app.models.torchvision_compat import import_torchvision

#: Without a request for so long, the server ends; the next one starts another.
IDLE_S = 20.0

#: A module that takes milliseconds to build.
_SMALL = "torchvision:shufflenet_v2_x0_5"

# prctl(2)
_PR_SET_PDEATHSIG = 1


def serve(descriptor: int) -> None:
    """Answer the requests that come over a socket, until it is closed or idle."""
    # Ctrl-C in a terminal is for the publisher, whose end ends this process too.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    warnings.simplefilter("ignore")
    use_threads(1)
    import_torchvision()
    # Not above: modules of publishing import the other side of this one.
    importlib.import_module("serve_app.models.publishing.publish_apart")
    # The first module without storage, and the first trace, import much more.
    foldable_norms(build_on_meta(_SMALL, "random:0"), _SMALL)
    # What is imported stays: its objects need not be looked through by every process that collects garbage.
    gc.collect()
    gc.freeze()
    with socket.socket(fileno=descriptor) as connection:
        requests = connection.makefile("rb")
        while select.select([connection], [], [], IDLE_S)[0]:
            line = requests.readline()
            if not line:
                return
            connection.sendall(_answer(line, [connection]))


def _answer(line: bytes, callers: Sequence[socket.socket]) -> bytes:
    """Fork a process for a call, relay what it tells, and return its reply, or how it has ended.

    Args:
        line: the call.
        callers: connections to the process that makes it, the last, and to those that wait for that one.
    """
    ours, theirs = socket.socketpair()
    child = os.fork()
    if child == 0:
        for each in (ours, *callers):
            each.close()
        _run(json.loads(line.removeprefix(CALL)), theirs)
    theirs.close()
    reply = b""
    with ours:
        try:
            while not reply:
                ready = select.select([ours, *callers], [], [])[0]
                _relay_from_callers(callers, ready)
                message = _read_line(ours) if ours in ready else None
                if message is None:
                    continue
                if message[:1] == CALL:
                    ours.sendall(_answer(message, [*callers, ours]))
                elif message[:1] == REPLY:
                    reply = message
                elif not message:
                    break
                else:
                    _relay(message, callers)
        except OSError:
            # Whoever waits for it has ended.
            os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
    return reply or _line(REPLY, {"ended": os.waitstatus_to_exitcode(status)})


def _relay_from_callers(callers: Sequence[socket.socket], ready: Sequence[socket.socket]) -> None:
    """Relay what other threads of waiting processes send; raise an OSError if one of the processes has ended."""
    for position, caller in enumerate(callers):
        if caller in ready:
            message = _read_line(caller)
            if not message or not position:
                raise ConnectionResetError
            _relay(message, callers[:position])


def _relay(message: bytes, callers: Sequence[socket.socket]) -> None:
    """Send what is told to the process that waits, and what is logged to the first one."""
    callers[0 if message[:1] == LOG else -1].sendall(message)


def _read_line(connection: socket.socket) -> bytes:
    """Read the next message, and nothing of the one after it; empty at the end."""
    line = b""
    while not line.endswith(b"\n"):
        start = connection.recv(1 << 16, socket.MSG_PEEK)
        if not start:
            return b""
        line += connection.recv(start.find(b"\n") + 1 or len(start))
    return line


def _run(request: dict[str, Any], connection: socket.socket) -> None:
    """Call the function of a request, send its reply, and end this process."""
    try:
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        sys.path[:] = request["path"]
        os.chdir(request["folder"])
        os.environ.clear()
        os.environ.update(request["environment"])
        use_server(connection)
        logging.getLogger("serve_app").setLevel(request["log_level"])
        module, _, name = request["function"].partition(":")
        result = getattr(importlib.import_module(module), name)(**request["arguments"])
        reply = {"result": result}
    except EdgeServeError as error:
        reply = {"refused": str(error), "is_download": isinstance(error, DownloadFailed)}
    except BaseException as error:  # also what ends a process: foreign code may call sys.exit
        reason = "out of memory" if isinstance(error, MemoryError) else f"{type(error).__name__}: {error}"
        reply = {"error": " ".join(reason.split())[:500]}
    connection.sendall(_line(REPLY, reply))
    os._exit(0)


def _line(kind: bytes, content: dict[str, Any]) -> bytes:
    return kind + json.dumps(content).encode() + b"\n"
