"""How a worker divides its memory: models, workspace of executions, and unaccounted bytes.

``docs/numbers.md`` says where each of these numbers is shown.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from serve_app.core.catalog import PublishedModel

#: Workspace for parallel executions takes no more of the memory than this share, unless one execution alone needs more.
_WORKSPACE_SHARE = 0.25


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryBudget:
    """What a worker may take beyond its base.

    Attributes:
        capacity_bytes: for models and executions.
        workspace_bytes: what of it is set aside for executions.
    """

    capacity_bytes: int
    workspace_bytes: int

    @property
    def model_capacity_bytes(self) -> int:
        """What all models may take together."""
        return self.capacity_bytes - self.workspace_bytes


def divide(memory_bytes: int, models: Iterable[PublishedModel], exec_slots: int) -> MemoryBudget:
    """Set workspace aside for executions; models get the rest.

    Executions need workspace, models do not: what counts is how many run, not how many are resident. Where memory is
    too small for the largest workspace in every slot, executions of large workspace run one after another. Of a model
    with free axes a usual execution has room in any case; what its largest ones need beyond a share of the memory is
    not kept from models, and requests that need more are refused.
    """
    fitting = [model for model in models if model.weights_bytes + model.usual_workspace_bytes <= memory_bytes]
    usual_bytes = max((model.usual_workspace_bytes for model in fitting), default=0)
    largest_bytes = max((model.workspace_bytes for model in fitting), default=0)
    shared_bytes = min(exec_slots * largest_bytes, int(memory_bytes * _WORKSPACE_SHARE))
    # A model of no weights at all may need everything for itself; a cache of nothing does not exist.
    workspace_bytes = min(max(usual_bytes, shared_bytes), memory_bytes - 1)
    return MemoryBudget(capacity_bytes=memory_bytes, workspace_bytes=workspace_bytes)


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
    """Finds what a process takes beyond base, models and workspace, and how much of that models must leave room for.

    Heap that the allocator keeps, code that runs for the first time, caches of libraries: no accounting covers them,
    but they take memory. Pages of the process's own beyond the workspace cannot be models that are mapped files; those
    of libraries that keep weights in memory of their own can.
    Models that are mapped and not touched yet make the process smaller than the accounting says, and hide what it has
    grown by. The guard compares both sums and takes the larger difference.

    ``unaccounted_bytes`` follows the difference with a delay, faster up than down, in steps: a short peak moves
    nothing.

    Args:
        base: the process before its first model.
        step_bytes: least change of ``unaccounted_bytes``.
    """

    RISE_S = 1.0
    FALL_S = 10.0

    def __init__(self, base: ProcessMemory, step_bytes: int) -> None:
        if step_bytes < 1:
            raise ValueError(f"step_bytes must be at least 1, not {step_bytes}")
        self.base = base
        self.unaccounted_bytes = 0
        self._step_bytes = step_bytes
        self._smoothed_bytes = 0.0
        self._updated_s: float | None = None

    def beyond_bytes(self, memory: ProcessMemory, budget: MemoryBudget, used_bytes: int, own_bytes: int = 0) -> int:
        """By how much the process exceeds its base, workspace, and models of ``used_bytes``.

        ``own_bytes`` are those of the models that are no pages of files.
        """
        private_bytes = memory.anonymous_bytes - self.base.anonymous_bytes - budget.workspace_bytes - own_bytes
        all_bytes = memory.rss_bytes - self.base.rss_bytes - budget.workspace_bytes - used_bytes
        return max(private_bytes, all_bytes, 0)

    def update(self, beyond_bytes: int, now: float) -> int:
        """Take in by how much the process exceeds the accounting now; returns ``unaccounted_bytes``."""
        elapsed_s = 0.0 if self._updated_s is None else now - self._updated_s
        self._updated_s = now
        delay_s = self.RISE_S if beyond_bytes > self._smoothed_bytes else self.FALL_S
        self._smoothed_bytes += (beyond_bytes - self._smoothed_bytes) * -math.expm1(-elapsed_s / delay_s)
        steps, held = self._smoothed_bytes / self._step_bytes, self.unaccounted_bytes // self._step_bytes
        # To begin takes half a step, to end a quarter; in between a whole step and a quarter, down only.
        if steps > held and (held or steps >= 0.5):
            held = math.ceil(steps)
        elif steps <= 0.25:
            held = 0
        elif steps < held - 1.25:
            held = math.ceil(steps)
        self.unaccounted_bytes = held * self._step_bytes
        return self.unaccounted_bytes
