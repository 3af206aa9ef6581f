"""The way from routers to workers: Serve handles, each call aimed at one replica."""

from __future__ import annotations

import random
from collections.abc import Awaitable
from typing import Any, TypeVar

from ray import serve
from ray.exceptions import ActorDiedError, ActorUnavailableError
from ray.serve.exceptions import DeploymentUnavailableError, ReplicaUnavailableError
from ray.serve.request_router import PendingRequest, RequestRouter, RunningReplica

from serve_app.serving.messages import Refused, Reply, Work
from serve_app.serving.router import WorkerLost

WORKER = "Worker"

_LOST = (ActorDiedError, ActorUnavailableError, DeploymentUnavailableError, ReplicaUnavailableError)

_Result = TypeVar("_Result")


class NamedReplicaRouter(RequestRouter):  # type: ignore[misc]
    """Sends a call to the replica that it names; to any other only if that one is gone or nobody is named.

    EdgeServe's routers know which replica holds which model; Serve's own choice would undo theirs.
    """

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """Ranks of replicas: the named one first, then the rest."""
        wanted = pending_request.kwargs.get("replica") if pending_request is not None else None
        named = [replica for replica in candidate_replicas if replica.replica_id.unique_id == wanted]
        others = [replica for replica in candidate_replicas if replica.replica_id.unique_id != wanted]
        random.shuffle(others)
        return [rank for rank in (named, others) if rank]


class ServeWorkerPool:
    """All workers of the cluster; a location's application is looked up when it is first needed.

    Args:
        applications: the name of each location's Serve application.
    """

    def __init__(self, applications: dict[str, str]) -> None:
        self._applications = applications
        self._handles: dict[str, Any] = {}

    async def infer(self, location: str, replica: str | None, work: Work) -> Reply:
        """Run one inference; raises ``WorkerLost``."""
        return await _call(self._handle(location).infer.remote(work, replica=replica))

    async def load(self, location: str, model_id: str) -> Refused | None:
        """Load a model by hand at a location; raises ``WorkerLost``."""
        return await _call(self._handle(location).load.remote(model_id))

    async def unload(self, location: str, replica: str, model_id: str) -> Refused | None:
        """Unload a model by hand from a replica; raises ``WorkerLost``."""
        return await _call(self._handle(location).unload.remote(model_id, replica=replica))

    def _handle(self, location: str) -> Any:
        if location not in self._handles:
            # Not checked for existence: the application may still be on its way up, and the check would block.
            self._handles[location] = serve.get_deployment_handle(
                WORKER, app_name=self._applications[location], _check_exists=False
            )
        return self._handles[location]


async def _call(response: Awaitable[_Result]) -> _Result:
    try:
        return await response
    except _LOST as error:
        raise WorkerLost(type(error).__name__) from error
