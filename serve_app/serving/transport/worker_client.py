"""Calls from routers to workers, each to one replica: local RPC on the same host, Serve's handles to other hosts."""

from __future__ import annotations

from collections.abc import Awaitable
from pathlib import Path
from typing import Any, TypeVar

import grpc

from serve_app.serving import ray_internals
from serve_app.serving.transport.local_rpc import ConnectionLost, LocalRpcPool
from serve_app.serving.transport.messages import InferenceRejected, InferenceTask, Reply
from serve_app.serving.transport.named_replica_request_router import LOST_REPLICA_ERRORS
from serve_app.serving.transport.worker_pool import WorkerLost

#: Name of the deployment of workers in the application of each location.
WORKER_DEPLOYMENT = "Worker"

_Result = TypeVar("_Result")


class ServeWorkerPool:
    """The workers of all locations; the application of a location is looked up for its first call.

    Args:
        sockets: the folder in which workers of this host listen.
    """

    def __init__(self, sockets: Path) -> None:
        self._handles: dict[str, Any] = {}
        self._local = LocalRpcPool(sockets)

    async def infer(self, location: str, replica: str | None, task: InferenceTask) -> Reply:
        """Run one inference; raises ``WorkerLost``."""
        try:
            connection = None if replica is None else await self._local.connection(replica)
            if connection is not None:
                return await connection.infer(task)
        except ConnectionLost as error:
            raise WorkerLost(str(error)) from error
        return await reply_of(self._handle(location).infer.remote(task, replica=replica))

    async def ping(self, location: str, payload: bytes) -> None:
        """Make a round trip to any replica of a location; raises ``WorkerLost``."""
        await reply_of(self._handle(location).ping.remote(payload))

    async def preload(self, location: str, replica: str, model_id: str) -> None:
        """Have a replica load a model for later requests; raises ``WorkerLost``."""
        await reply_of(self._handle(location).preload.remote(model_id, replica=replica))

    async def load(self, location: str, model_id: str) -> InferenceRejected | None:
        """Load a model at a location, by order of an operator; raises ``WorkerLost``."""
        return await reply_of(self._handle(location).load.remote(model_id))

    async def unload(self, location: str, replica: str, model_id: str) -> InferenceRejected | None:
        """Unload a model from a replica, by order of an operator; raises ``WorkerLost``."""
        return await reply_of(self._handle(location).unload.remote(model_id, replica=replica))

    def _handle(self, location: str) -> Any:
        if location not in self._handles:
            self._handles[location] = ray_internals.deployment_handle(WORKER_DEPLOYMENT, location)
        return self._handles[location]


async def reply_of(response: Awaitable[_Result]) -> _Result:
    """Await the response of a Serve handle; raises ``WorkerLost`` if the replica has gone."""
    try:
        return await response
    except LOST_REPLICA_ERRORS as error:
        raise WorkerLost(type(error).__name__) from error
    except grpc.aio.AioRpcError as error:
        # A replica that is replaced cancels the calls that outlast its time to shut down.
        if error.code() is not grpc.StatusCode.CANCELLED:
            raise
        raise WorkerLost("the replica has canceled the call") from error
