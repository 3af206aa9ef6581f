"""What else runs on this machine."""

from __future__ import annotations

import os
from pathlib import Path

_LOAD = Path("/proc/loadavg")


def runnable_threads() -> int:
    """Return how many threads of the machine run or could, beside the caller; 0 where the kernel does not say.

    It takes microseconds. See proc_loadavg(5).
    """
    try:
        running, _, _ = _LOAD.read_text().split()[3].partition("/")
    except (OSError, IndexError):
        return 0
    return max(0, int(running) - 1)


def usable_cores() -> int:
    """Return the cores that this process may use."""
    return len(os.sched_getaffinity(0))
