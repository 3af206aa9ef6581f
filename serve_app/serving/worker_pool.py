"""The way from routers to workers: lines on the same host, else Serve handles; each call aimed at one replica."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Awaitable
from pathlib import Path
from typing import Any, TypeVar

import grpc
from ray import serve
from ray.exceptions import ActorDiedError, ActorUnavailableError, ObjectLostError
from ray.serve.exceptions import DeploymentUnavailableError, ReplicaUnavailableError
from ray.serve.request_router import PendingRequest, ReplicaID, RequestRouter, RunningReplica

from serve_app.serving.line import LineBroken, Lines
from serve_app.serving.messages import Refused, Reply, Work
from serve_app.serving.router import WorkerLost

WORKER = "Worker"

_LOST = (ActorDiedError, ActorUnavailableError, DeploymentUnavailableError, ObjectLostError, ReplicaUnavailableError)

_Result = TypeVar("_Result")


class NamedReplicaRouter(RequestRouter):  # type: ignore[misc]
    """Sends a call to the replica that it names, or fails it: ``ReplicaUnavailableError`` once that one is lost.

    EdgeServe's routers know which replica holds which model, and what to do when it dies. Serve's own choice would
    undo theirs, and its own retry would wait for a new replica although other locations could serve.
    """

    #: How long after a failed call the replica is taken for lost.
    LOST_S = 2.0

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """The named replica; without a name, all of them in random order."""
        if pending_request is None:
            return [candidate_replicas]
        # Without this, Serve would ask again at once, and again, while no candidate answers.
        pending_request.routing_context.should_backoff = True
        wanted = pending_request.kwargs.get("replica")
        if wanted is None:
            return [random.sample(candidate_replicas, len(candidate_replicas))]
        named = [replica for replica in candidate_replicas if replica.replica_id.unique_id == wanted]
        if named and not self._is_lost(wanted):
            return [named]
        self._fail(pending_request)
        # Serve looks whether a request has ended only when it is offered a candidate for it.
        return [candidate_replicas]

    def on_replica_actor_unavailable(self, replica_id: ReplicaID) -> None:
        """A call could not be delivered, or its replica died with it."""
        super().on_replica_actor_unavailable(replica_id)
        self._lost()[replica_id.unique_id] = time.monotonic()

    def on_replica_actor_died(self, replica_id: ReplicaID) -> None:
        """A replica is gone for good."""
        super().on_replica_actor_died(replica_id)
        self._lost()[replica_id.unique_id] = time.monotonic()
        for pending_request in list(self._pending_requests_by_id.values()):
            if pending_request.kwargs.get("replica") == replica_id.unique_id:
                self._fail(pending_request)

    def _fail(self, pending_request: PendingRequest) -> None:
        if not pending_request.future.done():
            pending_request.future.set_exception(ReplicaUnavailableError(str(pending_request.kwargs["replica"])))
        self._remove_pending_request_from_indices(pending_request)

    def _is_lost(self, unique_id: str) -> bool:
        return time.monotonic() - self._lost().get(unique_id, -math.inf) < self.LOST_S

    def _lost(self) -> dict[str, float]:
        # Serve makes the object with arguments of its own, so there is no constructor to put this into.
        lost: dict[str, float] = self.__dict__.setdefault("_lost_replicas", {})
        return lost


class ServeWorkerPool:
    """All workers of the cluster; a location's application is looked up when it is first needed.

    Args:
        lines: the folder in which workers of this host listen.
    """

    def __init__(self, lines: Path) -> None:
        self._handles: dict[str, Any] = {}
        self._lines = Lines(lines)

    async def infer(self, location: str, replica: str | None, work: Work) -> Reply:
        """Run one inference; raises ``WorkerLost``."""
        try:
            line = None if replica is None else await self._lines.to(replica)
            if line is not None:
                return await line.infer(work)
        except LineBroken as error:
            raise WorkerLost(str(error)) from error
        return await _call(self._handle(location).infer.remote(work, replica=replica))

    async def ping(self, location: str, payload: bytes) -> None:
        """Go to any replica of a location and back; raises ``WorkerLost``."""
        await _call(self._handle(location).ping.remote(payload))

    async def preload(self, location: str, replica: str, model_id: str) -> None:
        """Have a replica load a model that requests will come for; raises ``WorkerLost``."""
        await _call(self._handle(location).preload.remote(model_id, replica=replica))

    async def load(self, location: str, model_id: str) -> Refused | None:
        """Load a model by hand at a location; raises ``WorkerLost``."""
        return await _call(self._handle(location).load.remote(model_id))

    async def unload(self, location: str, replica: str, model_id: str) -> Refused | None:
        """Unload a model by hand from a replica; raises ``WorkerLost``."""
        return await _call(self._handle(location).unload.remote(model_id, replica=replica))

    def _handle(self, location: str) -> Any:
        if location not in self._handles:
            # Not checked for existence: the application may still be on its way up, and the check would block.
            self._handles[location] = serve.get_deployment_handle(WORKER, app_name=location, _check_exists=False)
        return self._handles[location]


async def _call(response: Awaitable[_Result]) -> _Result:
    try:
        return await response
    except _LOST as error:
        raise WorkerLost(type(error).__name__) from error
    except grpc.aio.AioRpcError as error:
        # A replica that is replaced cuts off what still runs there when its time is over.
        if error.code() is not grpc.StatusCode.CANCELLED:
            raise
        raise WorkerLost("cut off") from error
