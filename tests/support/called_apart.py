"""Functions that tests call in a fresh process."""

from __future__ import annotations

import logging
import os
import signal
import sys
from typing import Any

from serve_app.errors import StoreError
from serve_app.models.profiling.fresh_process import call_in_fresh_process, tell


def add(left: int, right: int) -> dict[str, Any]:
    return {"sum": left + right, "process": os.getpid(), "main": getattr(sys.modules["__main__"], "__file__", None)}


def add_apart(left: int, right: int) -> dict[str, Any]:
    tell({"adding": [left, right]})
    logging.getLogger("adding").error("%d and %d", left, right)
    return {
        "inner": call_in_fresh_process("called_apart:add", {"left": left, "right": right}, "x"),
        "process": os.getpid(),
    }


def crash_apart() -> dict[str, Any]:
    try:
        call_in_fresh_process("called_apart:crash", {"number": signal.SIGABRT}, "the inner one")
    except StoreError as error:
        return {"said": str(error)}
    return {}


def refuse() -> dict[str, Any]:
    raise StoreError("this is refused; do that")


def fail() -> dict[str, Any]:
    raise ValueError("a number\nis wrong")


def run_out() -> dict[str, Any]:
    raise MemoryError


def crash(number: int) -> dict[str, Any]:
    os.kill(os.getpid(), number)
    signal.pause()
    return {}


def leave() -> dict[str, Any]:
    os._exit(3)


def chatter() -> dict[str, Any]:
    print("noise")  # noqa: T201
    sys.stdout.flush()
    os.write(1, b"noise")
    return {"said": True}
