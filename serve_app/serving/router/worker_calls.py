"""The calls of one router that are under way to workers."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterable

from serve_app.core.routing.choose import Route
from serve_app.errors import DeadlineExceeded, Unavailable
from serve_app.serving.transport.messages import InferenceRejected, InferenceTask, Reply
from serve_app.serving.transport.worker_pool import WorkerLost, WorkerPool


class WorkerCalls:
    """Calls workers, each until its deadline, or until its replica is known to be gone.

    Args:
        pool: the workers.
        unknown_location_timeout_s: how long a call waits for a location of which no worker is known.
    """

    def __init__(self, pool: WorkerPool, unknown_location_timeout_s: float) -> None:
        self._pool = pool
        self._unknown_location_timeout_s = unknown_location_timeout_s
        #: Timeouts of the calls under way, by replica.
        self._timeouts: dict[str, set[asyncio.Timeout]] = {}
        #: Preloads that no request waits for; kept, or they could be garbage-collected half done.
        self._preloads: set[asyncio.Task[None]] = set()

    async def infer(self, route: Route, task: InferenceTask) -> Reply:
        """Run one inference along a route; raises ``WorkerLost``."""
        replica, limit_s = route.replica, task.budget_s
        timeouts: set[asyncio.Timeout] = set()
        if replica is not None:
            timeouts = self._timeouts.setdefault(replica, timeouts)
        else:
            # No worker is known there; Serve may have a replica soon, or never.
            limit_s = min(limit_s, self._unknown_location_timeout_s)
        deadline = asyncio.get_running_loop().time() + limit_s
        timeout = asyncio.timeout_at(deadline)
        timeouts.add(timeout)
        try:
            async with timeout:
                return await self._pool.infer(route.location, replica, task)
        except TimeoutError:
            if (timeout.when() or 0.0) < deadline:
                raise WorkerLost("it has left the directory") from None
            if limit_s < task.budget_s:
                message = f"no worker of {route.location} is running; try again later"
                return InferenceRejected(error=Unavailable(message, 5.0))
            message = f"model {task.model_id} did not answer within its deadline; raise deadline_ms"
            return InferenceRejected(error=DeadlineExceeded(message))
        finally:
            timeouts.discard(timeout)
            if not timeouts and replica is not None:
                self._timeouts.pop(replica, None)

    def fail_calls(self, replicas: Iterable[str]) -> None:
        """End the calls to these replicas with ``WorkerLost``: their requests are served elsewhere."""
        now = asyncio.get_running_loop().time()
        for replica in replicas:
            for timeout in tuple(self._timeouts.get(replica, ())):
                # One that is just expiring cannot be changed any more, and need not be.
                with contextlib.suppress(RuntimeError):
                    timeout.reschedule(now)

    def preload(self, location: str, replica: str, model_id: str) -> None:
        """Have a replica load a model, and do not wait for it."""

        async def order() -> None:
            # Only later requests gain by the load, and they are served without it as well.
            with contextlib.suppress(WorkerLost):
                await self._pool.preload(location, replica, model_id)

        task = asyncio.get_running_loop().create_task(order(), name=f"preload {model_id}")
        self._preloads.add(task)
        task.add_done_callback(self._preloads.discard)
