"""The memory of a worker's process: workspace for executions, and the kernel's figures against the accounting."""

from __future__ import annotations

import asyncio
import logging
import math
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from serve_app.core.cache.events import UnaccountedChanged
from serve_app.core.catalog import PublishedModel
from serve_app.core.memory_budget import MemoryBudget, MemoryGuard, ProcessMemory
from serve_app.errors import DoesNotFit
from serve_app.serving.worker.model_manager import ModelManager

logger = logging.getLogger(__name__)

#: Unaccounted bytes change by this share of the capacity at least.
_STEP_SHARE = 1 / 64

#: How often free heap is given back after an unload. The next execution has to fault it in again; where models come and
#: go all the time that would be every miss.
_GIVE_BACK_EVERY_S = 10.0


class ProcessBudget:
    """Keeps a worker to its budget, by the accounting and by the kernel's figures.

    Args:
        budget: for models and for executions.
        read: the kernel's figures of this process; first called before any model is loaded.
        give_back: gives free heap back to the kernel; called in a thread, because it takes milliseconds.
    """

    def __init__(
        self, budget: MemoryBudget, *, read: Callable[[], ProcessMemory], give_back: Callable[[], None] = lambda: None
    ) -> None:
        self._read = read
        self._give_back = give_back
        # Building modules leaves a lot of free heap behind, which the process does not need.
        give_back()
        self._guard = MemoryGuard(read(), max(1, int(budget.capacity_bytes * _STEP_SHARE)))
        self._budget = budget
        self._unloaded = 0
        self._given_back_s = -math.inf
        self._running_bytes = 0
        self._ended = threading.Condition()

    @property
    def base_bytes(self) -> int:
        """Resident memory of the process before its first model."""
        return self._guard.base.rss_bytes

    @property
    def rss_bytes(self) -> int:
        """Resident memory of the process now."""
        return self._read().rss_bytes

    @property
    def workspace_bytes(self) -> int:
        """What of the capacity is set aside for executions."""
        return self._budget.workspace_bytes

    @property
    def unaccounted_bytes(self) -> int:
        """What of the capacity models leave to what no accounting covers."""
        return self._guard.unaccounted_bytes

    def divide(self, budget: MemoryBudget) -> None:
        """Go on with another budget."""
        with self._ended:
            self._budget = budget
            self._ended.notify_all()

    def require(self, model: PublishedModel, needed_bytes: int) -> None:
        """Raise ``DoesNotFit`` if there is never workspace enough for an inference of ``model`` that needs so much."""
        if needed_bytes > self._budget.workspace_bytes:
            raise DoesNotFit(
                f"model {model.model_id} needs {needed_bytes} bytes to run in, but only "
                f"{self._budget.workspace_bytes} are set aside for executions; give the location more memory"
                + (", or send smaller inputs" if model.costs else "")
            )

    @contextmanager
    def workspace(self, needed_bytes: int) -> Iterator[None]:
        """Hold workspace for one execution, in its thread; where there is too little left, wait until others end."""
        with self._ended:
            self._ended.wait_for(
                lambda: not self._running_bytes or self._running_bytes + needed_bytes <= self._budget.workspace_bytes
            )
            self._running_bytes += needed_bytes
        try:
            yield
        finally:
            with self._ended:
                self._running_bytes -= needed_bytes
                self._ended.notify_all()

    async def update(self, manager: ModelManager, now: float) -> None:
        """Compare the kernel's figures with the accounting, and have models leave room for the difference.

        Free heap is given back first where the difference would grow, or after an unload, but not too often: the
        allocator keeps what executions have freed.
        """
        counters = manager.cache.counters
        unloaded, beyond_bytes = counters.evictions + counters.unloads, self._beyond_bytes(manager)
        is_due = unloaded != self._unloaded and now - self._given_back_s >= _GIVE_BACK_EVERY_S
        if is_due or beyond_bytes > self._guard.unaccounted_bytes:
            self._unloaded, self._given_back_s = unloaded, now
            await asyncio.to_thread(self._give_back)
            beyond_bytes = self._beyond_bytes(manager)
        before_bytes = self._guard.unaccounted_bytes
        unaccounted_bytes = self._guard.update(beyond_bytes, now)
        if unaccounted_bytes != before_bytes:
            logger.info(
                "%d MiB are held back from models (before: %d MiB): the process takes %d MiB more than its base of %d "
                "MiB, models of %d MiB and workspace of %d MiB",
                *(
                    amount >> 20
                    for amount in (
                        unaccounted_bytes,
                        before_bytes,
                        beyond_bytes,
                        self.base_bytes,
                        manager.cache.used_bytes,
                        self.workspace_bytes,
                    )
                ),
            )
            manager.handle(UnaccountedChanged(unaccounted_bytes))

    def _beyond_bytes(self, manager: ModelManager) -> int:
        return self._guard.beyond_bytes(self._read(), self._budget, manager.cache.used_bytes, manager.own_bytes)
