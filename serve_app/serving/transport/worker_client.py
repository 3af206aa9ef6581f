"""The way from routers to workers: lines on the same host, else Serve handles; each call aimed at one replica."""

from __future__ import annotations

from collections.abc import Awaitable
from pathlib import Path
from typing import Any, TypeVar

import grpc

from serve_app.serving import ray_internals
from serve_app.serving.transport.local_rpc import ConnectionLost, LocalRpcPool
from serve_app.serving.transport.messages import InferenceRejected, InferenceTask, Reply
from serve_app.serving.transport.named_replica_router import LOST_REPLICA_ERRORS
from serve_app.serving.transport.worker_pool import WorkerLost

WORKER = "Worker"

_Result = TypeVar("_Result")


class ServeWorkerPool:
    """All workers of the cluster; a location's application is looked up when it is first needed.

    Args:
        lines: the folder in which workers of this host listen.
    """

    def __init__(self, lines: Path) -> None:
        self._handles: dict[str, Any] = {}
        self._lines = LocalRpcPool(lines)

    async def infer(self, location: str, replica: str | None, work: InferenceTask) -> Reply:
        """Run one inference; raises ``WorkerLost``."""
        try:
            line = None if replica is None else await self._lines.to(replica)
            if line is not None:
                return await line.infer(work)
        except ConnectionLost as error:
            raise WorkerLost(str(error)) from error
        return await _call(self._handle(location).infer.remote(work, replica=replica))

    async def ping(self, location: str, payload: bytes) -> None:
        """Go to any replica of a location and back; raises ``WorkerLost``."""
        await _call(self._handle(location).ping.remote(payload))

    async def preload(self, location: str, replica: str, model_id: str) -> None:
        """Have a replica load a model that requests will come for; raises ``WorkerLost``."""
        await _call(self._handle(location).preload.remote(model_id, replica=replica))

    async def load(self, location: str, model_id: str) -> InferenceRejected | None:
        """Load a model by hand at a location; raises ``WorkerLost``."""
        return await _call(self._handle(location).load.remote(model_id))

    async def unload(self, location: str, replica: str, model_id: str) -> InferenceRejected | None:
        """Unload a model by hand from a replica; raises ``WorkerLost``."""
        return await _call(self._handle(location).unload.remote(model_id, replica=replica))

    def _handle(self, location: str) -> Any:
        if location not in self._handles:
            self._handles[location] = ray_internals.deployment_handle(WORKER, location)
        return self._handles[location]


async def _call(response: Awaitable[_Result]) -> _Result:
    try:
        return await response
    except LOST_REPLICA_ERRORS as error:
        raise WorkerLost(type(error).__name__) from error
    except grpc.aio.AioRpcError as error:
        # A replica that is replaced cuts off what still runs there when its time is over.
        if error.code() is not grpc.StatusCode.CANCELLED:
            raise
        raise WorkerLost("cut off") from error
