"""How routers and workers reach the coordinator, and do without it while it is down."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from typing import Any

import ray

from serve_app.core.cluster.reports import ViewDelta, WorkerReport
from serve_app.core.coordination.rules import CoordinatorRules
from serve_app.core.links import Link
from serve_app.serving import ray_internals
from serve_app.serving.coordinator.actor import NAME, NAMESPACE, Coordinator

logger = logging.getLogger(__name__)
_CALL_TIMEOUT_S = 2.0


class CoordinatorClient:
    """One participant's connection to the coordinator: finds it, and finds it again after it was lost.

    Args:
        rules: for the coordinator. The first participant starts it; all send theirs, and the newest count.
        location: whose subscription a router reads; None: the whole cluster.

    Attributes:
        up: whether the last call was answered.
    """

    def __init__(self, rules: CoordinatorRules, location: str | None = None) -> None:
        self._rules = rules
        self._location = location
        self._actor: Any = None
        self.up = False

    async def exchange(
        self, sent: WorkerReport | Mapping[tuple[str, str], Link], epoch: str, version: int
    ) -> ViewDelta | None:
        """Send a worker's report, or the links that a router has measured; get a delta, or None: no answer."""
        try:
            actor = self._actor
            if actor is None:
                rules = self._rules
                # Finding or making the actor blocks, so it must not happen on the event loop.
                actor = await asyncio.to_thread(self._connect, rules)
                # Rules that have come meanwhile have not been sent: then the next exchange connects again.
                self._actor = actor if rules is self._rules else None
            if isinstance(sent, WorkerReport):
                call = actor.report.remote(sent, epoch, version)
            else:
                call = actor.read.remote(sent, epoch, version, self._location)
            delta: ViewDelta = await asyncio.wait_for(call, _CALL_TIMEOUT_S)
        except (ray.exceptions.RayError, TimeoutError, ValueError) as error:
            if self.up:
                logger.warning("coordinator lost (%s); going on with the last view", type(error).__name__)
            self.up, self._actor = False, None
            return None
        if not self.up:
            logger.info("coordinator found")
        self.up = True
        return delta

    def configure(self, rules: CoordinatorRules) -> None:
        """Take other rules; the coordinator gets them before the next call."""
        self._rules = rules
        self._actor = None

    async def snapshot(self) -> ViewDelta | None:
        """Every worker's last report, or None: no answer."""
        if self._actor is None:
            return None
        try:
            whole: ViewDelta = await asyncio.wait_for(self._actor.snapshot.remote(), _CALL_TIMEOUT_S)
        except (ray.exceptions.RayError, TimeoutError):
            return None
        return whole

    async def deregister(self, replica: str) -> None:
        """Tell the coordinator that a worker shuts down; best effort."""
        if self._actor is not None:
            try:
                await asyncio.wait_for(self._actor.deregister.remote(replica), _CALL_TIMEOUT_S)
            except (ray.exceptions.RayError, TimeoutError):
                logger.info("the coordinator did not learn that %s leaves", replica)

    def _connect(self, rules: CoordinatorRules) -> Any:
        actor = (
            ray.remote(Coordinator)
            .options(
                name=NAME,
                namespace=NAMESPACE,
                lifetime="detached",
                get_if_exists=True,
                max_restarts=-1,
                num_cpus=0,
                resources={ray_internals.HEAD_NODE_RESOURCE: 0.001},
            )
            .remote(rules)
        )
        # It may have been there before, with the rules of another participant. Calls are answered in order.
        actor.configure.remote(rules)
        return actor
