"""What a process of its own measures of its heap; it imports no torch, which would take seconds."""

from __future__ import annotations

import resource

import numpy as np

from serve_app.models.process_memory import exact_heap, keep_freed_memory, process_memory


def freed_while_exact_bytes() -> int:
    """Fall of the memory of this process when half of the blocks of a full heap are freed."""
    with exact_heap():
        kept = [np.ones(2**18, np.uint8) for _ in range(256)]
        full = process_memory()
        del kept[::2]
        return full.anonymous_bytes - process_memory().anonymous_bytes


def faults_of_the_second_burst() -> int:
    """Page faults of this process when it takes the memory of sixteen requests once more, and has freed the first."""
    keep_freed_memory()
    faults = 0
    for _ in range(2):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        burst = [np.ones(600_000, np.uint8) for _ in range(16)]
        del burst
        faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
    return faults
