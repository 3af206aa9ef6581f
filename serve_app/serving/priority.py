"""Who goes first in a worker: the threads that serve hits, before those that load."""

from __future__ import annotations

import contextlib
import os
import sys
import threading

#: A thread that is this much nicer than another one gets a tenth of its time, if both want a processor all the time.
_NICER = 10

_SWITCH_S = 0.001


def let_others_go_first() -> None:
    """Have the calling thread take a processor only as far as other threads leave it; for good."""
    # Linux counts threads as processes here. Elsewhere all stay equal.
    with contextlib.suppress(OSError, AttributeError):
        thread = threading.get_native_id()
        os.setpriority(os.PRIO_PROCESS, thread, os.getpriority(os.PRIO_PROCESS, thread) + _NICER)


def switch_soon() -> None:
    """Let a thread of this process that runs Python give way to the event loop sooner than after 5 ms."""
    sys.setswitchinterval(_SWITCH_S)
