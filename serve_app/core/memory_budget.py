"""How a worker divides its memory: into models, workspace of executions, and what the kernel sees beyond both."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from serve_app.core.catalog import PublishedModel

#: Workspace for parallel executions takes no more of the memory than this share, unless one execution alone needs more.
_WORKSPACE_SHARE = 0.25


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryBudget:
    """What a worker may take beyond its base: so much for models, so much for executions."""

    models_bytes: int
    workspace_bytes: int


def divide(memory_bytes: int, models: Iterable[PublishedModel], exec_slots: int) -> MemoryBudget:
    """Set workspace aside for executions; models get the rest.

    Executions need workspace, models do not: what counts is how many run, not how many are resident. Where memory is
    too small for the largest workspace in every slot, executions of large workspace run one after another.
    """
    needed = [model.workspace_bytes for model in models if model.weights_bytes + model.workspace_bytes <= memory_bytes]
    largest_bytes = max(needed, default=0)
    shared_bytes = min(exec_slots * largest_bytes, int(memory_bytes * _WORKSPACE_SHARE))
    # A model of no weights at all may need everything for itself; a cache of nothing does not exist.
    workspace_bytes = min(max(largest_bytes, shared_bytes), memory_bytes - 1)
    return MemoryBudget(models_bytes=memory_bytes - workspace_bytes, workspace_bytes=workspace_bytes)


@dataclass(frozen=True, slots=True, kw_only=True)
class ProcessMemory:
    """What the kernel says that a process has in memory: pages of its own, and pages of files that it has touched."""

    anonymous_bytes: int
    file_bytes: int

    @property
    def rss_bytes(self) -> int:
        """Resident memory."""
        return self.anonymous_bytes + self.file_bytes


class MemoryGuard:
    """Finds what a process takes beyond what its books say, and how much to hold back for it.

    Heap that the allocator keeps, code that runs for the first time, caches of libraries: nobody counts them, but they
    take memory. Pages of its own that are more than the workspace cannot be models, which are mapped files. Models
    that are mapped and not touched yet make the process smaller than its books, and hide what it has grown by; so both
    sums are looked at, and the larger difference counts.

    What is held back follows the difference with a delay, faster up than down, in steps: a moment's peak moves nothing.

    Args:
        base: the process before its first model.
        step_bytes: least change of what is held back.
    """

    RISE_S = 1.0
    FALL_S = 10.0

    def __init__(self, base: ProcessMemory, step_bytes: int) -> None:
        if step_bytes < 1:
            raise ValueError(f"step_bytes must be at least 1, not {step_bytes}")
        self.base = base
        self.held_back_bytes = 0
        self._step_bytes = step_bytes
        self._smoothed_bytes = 0.0
        self._looked_s: float | None = None

    def beyond_bytes(self, memory: ProcessMemory, budget: MemoryBudget, used_bytes: int) -> int:
        """By how much the process exceeds its base and what is counted: models of ``used_bytes``, and workspace."""
        private_bytes = memory.anonymous_bytes - self.base.anonymous_bytes - budget.workspace_bytes
        all_bytes = memory.rss_bytes - self.base.rss_bytes - budget.workspace_bytes - used_bytes
        return max(private_bytes, all_bytes, 0)

    def look(self, beyond_bytes: int, now: float) -> int:
        """Take in what is beyond the books now; returns what to hold back from now on."""
        elapsed_s = 0.0 if self._looked_s is None else now - self._looked_s
        self._looked_s = now
        delay_s = self.RISE_S if beyond_bytes > self._smoothed_bytes else self.FALL_S
        self._smoothed_bytes += (beyond_bytes - self._smoothed_bytes) * -math.expm1(-elapsed_s / delay_s)
        steps, held = self._smoothed_bytes / self._step_bytes, self.held_back_bytes // self._step_bytes
        # To begin takes half a step, to end a quarter; in between a whole step and a quarter, down only.
        if steps > held and (held or steps >= 0.5):
            held = math.ceil(steps)
        elif steps <= 0.25:
            held = 0
        elif steps < held - 1.25:
            held = math.ceil(steps)
        self.held_back_bytes = held * self._step_bytes
        return self.held_back_bytes
