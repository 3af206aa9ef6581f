"""Loads and unloads that an operator asks for."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Iterable

from serve_app.errors import NotFound, Unavailable
from serve_app.serving.transport.messages import InferenceRejected
from serve_app.serving.transport.worker_pool import WorkerLost, WorkerPool


class ModelControl:
    """Loads and unloads models on request of an operator.

    Args:
        pool: the workers.
        timeout_s: how long a worker may take.
    """

    def __init__(self, pool: WorkerPool, timeout_s: float) -> None:
        self._pool = pool
        self._timeout_s = timeout_s

    async def load(self, location: str, model_id: str) -> None:
        """Load a model at a location; raises the tree of ``errors.py``."""
        rejected = await self._call(self._pool.load(location, model_id), location)
        if rejected is not None:
            raise rejected.error

    async def unload(self, location: str, replicas: Iterable[str], model_id: str) -> None:
        """Unload a model from all of these workers of a location; raises the tree of ``errors.py``."""
        unloaded = False
        for replica in replicas:
            rejected = await self._call(self._pool.unload(location, replica, model_id), location)
            if rejected is None:
                unloaded = True
            elif not isinstance(rejected.error, NotFound):
                raise rejected.error
        if not unloaded:
            raise NotFound(f"model {model_id} is not loaded at {location}; nothing to unload")

    async def _call(self, call: Awaitable[InferenceRejected | None], location: str) -> InferenceRejected | None:
        try:
            async with asyncio.timeout(self._timeout_s):
                return await call
        except (WorkerLost, TimeoutError):
            raise Unavailable(f"no worker of {location} could be reached; try again later", 2.0) from None
