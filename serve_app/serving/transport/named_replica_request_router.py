"""The choice of a replica by Ray Serve, replaced by the choice of EdgeServe's router."""

from __future__ import annotations

import math
import random
import time
from typing import Any

from ray.exceptions import ActorDiedError, ActorUnavailableError, ObjectLostError
from ray.serve.exceptions import DeploymentUnavailableError, ReplicaUnavailableError
from ray.serve.request_router import PendingRequest, ReplicaID, RequestRouter, RunningReplica

from serve_app.serving import ray_internals

#: What Ray raises for a call whose replica has died or cannot be reached.
LOST_REPLICA_ERRORS = (
    ActorDiedError,
    ActorUnavailableError,
    DeploymentUnavailableError,
    ObjectLostError,
    ReplicaUnavailableError,
)


class NamedReplicaRequestRouter(RequestRouter):  # type: ignore[misc]
    """Sends a call to the replica that it names; a call to a lost replica fails with ``ReplicaUnavailableError``.

    EdgeServe's routers know which replica holds which model, and where to send a request when the replica dies. Serve's
    own choice would undo theirs, and its own retry would wait for a new replica although other locations could serve.
    """

    #: Seconds after a failed call for which the replica counts as lost.
    LOST_S = 2.0

    def initialize_state(self, **kwargs: Any) -> None:
        """Called by Serve after the constructor, whose arguments are Serve's own."""
        super().initialize_state(**kwargs)
        #: When a call to a replica failed last, by the replica's id.
        self._lost_at_s: dict[str, float] = {}

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """Return the named replica; without a name, all replicas in random order."""
        if pending_request is None:
            return [candidate_replicas]
        # Otherwise Serve would call this method in a loop without a pause while no candidate accepts the request.
        pending_request.routing_context.should_backoff = True
        name = pending_request.kwargs.get("replica")
        if name is None:
            return [random.sample(candidate_replicas, len(candidate_replicas))]
        named = [replica for replica in candidate_replicas if replica.replica_id.unique_id == name]
        if named and not self._is_lost(name):
            return [named]
        self._fail(pending_request)
        # Serve notices that a request has ended only when it gets a candidate for it.
        return [candidate_replicas]

    def on_replica_actor_unavailable(self, replica_id: ReplicaID) -> None:
        """Called by Serve when a call could not be delivered, or its replica died during it."""
        super().on_replica_actor_unavailable(replica_id)
        self._lost_at_s[replica_id.unique_id] = time.monotonic()

    def on_replica_actor_died(self, replica_id: ReplicaID) -> None:
        """Called by Serve when a replica has died."""
        super().on_replica_actor_died(replica_id)
        self._lost_at_s[replica_id.unique_id] = time.monotonic()
        for pending_request in ray_internals.pending_requests(self):
            if pending_request.kwargs.get("replica") == replica_id.unique_id:
                self._fail(pending_request)

    def _fail(self, pending_request: PendingRequest) -> None:
        if not pending_request.future.done():
            pending_request.future.set_exception(ReplicaUnavailableError(str(pending_request.kwargs["replica"])))
        ray_internals.discard_pending_request(self, pending_request)

    def _is_lost(self, unique_id: str) -> bool:
        return time.monotonic() - self._lost_at_s.get(unique_id, -math.inf) < self.LOST_S
