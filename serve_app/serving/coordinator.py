"""The coordinator as a Ray actor, and how the others reach it. All rules are in ``core/coordination.py``."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
import uuid
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

import ray

from serve_app.core.coordination import CoordinatorRules, CoordinatorState
from serve_app.core.links import Link
from serve_app.core.reports import ViewDelta, WorkerReport
from serve_app.serving import code
from serve_app.serving.metrics import CoordinatorMetrics

logger = logging.getLogger(__name__)

#: Where the actor is found: one for the whole cluster.
NAMESPACE = "edgeserve"
NAME = "coordinator"

_METRICS_EVERY_S = 1.0
#: So many pairs of location and model have their rate in the metrics, or none.
_MAX_RATES = 10_000
_CALL_TIMEOUT_S = 2.0
_CODE_TIMEOUT_S = 5.0


class Coordinator:
    """Central, but off the request path: takes reports, gives views and orders."""

    def __init__(self, rules: CoordinatorRules) -> None:
        self._state = CoordinatorState(epoch=uuid.uuid4().hex, rules=rules)
        self._metrics = CoordinatorMetrics()
        self._counted_models: set[str] = set()
        self._measured_s = 0.0
        self._code = code.digest()

    def code(self) -> str:
        """The digest of the code that it has begun with; see ``code.py``."""
        return self._code

    def report(self, report: WorkerReport, epoch: str, version: int) -> ViewDelta:
        """Take a worker's report; answer with what it does not know yet, and what it should do."""
        now = time.monotonic()
        self._measure_if_due(now)
        return self._state.answer(report, epoch, version, now)

    def configure(self, rules: CoordinatorRules) -> None:
        """A participant says how it was told that coordinators work; the newest configuration counts."""
        self._state.configure(rules, time.monotonic())

    def depart(self, replica: str) -> None:
        """A worker says that it is shutting down."""
        self._state.depart(replica)

    def view(
        self, links: Mapping[tuple[str, str], Link], epoch: str, version: int, location: str | None = None
    ) -> ViewDelta:
        """Take the ways that a router has measured; answer with what it does not know yet."""
        self._state.measured(links)
        now = time.monotonic()
        self._measure_if_due(now)
        return self._state.view(epoch, version, now, location)

    def everything(self) -> ViewDelta:
        """Every worker's last report and all rates, for people to look at."""
        return self._state.everything(time.monotonic())

    def _measure_if_due(self, now: float) -> None:
        if now - self._measured_s >= _METRICS_EVERY_S:
            self._measured_s = now
            self._measure(now)

    def _measure(self, now: float) -> None:
        # Of more, nobody could look at all, and to tell them would take longer than all else.
        if self._state.rated <= _MAX_RATES:
            for location, rates in self._state.rates(now).items():
                for model_id, per_s in rates.items():
                    self._metrics.model_rate.set(per_s, tags={"location": location, "model": model_id})
        holders = self._state.holder_counts()
        for model_id in self._counted_models | holders.keys():
            self._metrics.model_holders.set(holders.get(model_id, 0), tags={"model": model_id})
        self._counted_models |= holders.keys()


class CoordinatorLink:
    """One participant's connection to the coordinator: finds it, and finds it again after it was lost.

    Args:
        rules: for the coordinator. Whoever comes first starts it; all tell it theirs, and the newest count.
        location: of whose interest a router's news are; None: of everybody's.
    """

    def __init__(self, rules: CoordinatorRules, location: str | None = None) -> None:
        self._rules = rules
        self._location = location
        self._actor: Any = None
        self.up = False

    async def exchange(
        self, news: WorkerReport | Mapping[tuple[str, str], Link], epoch: str, version: int
    ) -> ViewDelta | None:
        """Send a worker's report, or what a router has measured; get the news, or None: it cannot be reached."""
        try:
            actor = self._actor
            if actor is None:
                rules = self._rules
                # Finding or making the actor blocks, so it must not happen on the event loop.
                actor = await asyncio.to_thread(self._connect, rules)
                # It has not been told of rules that have come meanwhile: then the next exchange connects anew.
                self._actor = actor if rules is self._rules else None
            if isinstance(news, WorkerReport):
                call = actor.report.remote(news, epoch, version)
            else:
                call = actor.view.remote(news, epoch, version, self._location)
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
        """There is another configuration; the coordinator is told before anything else is said to it."""
        self._rules = rules
        self._actor = None

    async def everything(self) -> ViewDelta | None:
        """Every worker's last report, or None: the coordinator cannot be reached."""
        if self._actor is None:
            return None
        try:
            whole: ViewDelta = await asyncio.wait_for(self._actor.everything.remote(), _CALL_TIMEOUT_S)
        except (ray.exceptions.RayError, TimeoutError):
            return None
        return whole

    async def depart(self, replica: str) -> None:
        """Say that a worker is leaving; best effort."""
        if self._actor is not None:
            try:
                await asyncio.wait_for(self._actor.depart.remote(replica), _CALL_TIMEOUT_S)
            except (ray.exceptions.RayError, TimeoutError):
                logger.info("the coordinator was not told that %s leaves", replica)

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
                resources={"node:__internal_head__": 0.001},
            )
            .remote(rules)
        )
        # It may have been there before, with the rules of those who started it. Calls are answered in order.
        actor.configure.remote(rules)
        return actor


def end() -> None:
    """End the coordinator, if there is one; whoever needs it starts another."""
    with contextlib.suppress(ValueError):
        ray.kill(ray.get_actor(NAME, namespace=NAMESPACE))


def end_outdated() -> None:
    """End a coordinator that has begun with other code than is on the disk now: it outlives what is deployed anew."""
    try:
        actor = ray.get_actor(NAME, namespace=NAMESPACE)
        is_current = ray.get(actor.code.remote(), timeout=_CODE_TIMEOUT_S) == code.digest()
    except ValueError:
        return
    except (AttributeError, ray.exceptions.RayError):
        # So old that it cannot be asked, or it does not answer.
        is_current = False
    if not is_current:
        end()


async def every(period_s: float, act: Callable[[], Awaitable[None]]) -> None:
    """Run ``act`` again and again until cancelled; a failure is logged and does not end it."""
    task = asyncio.current_task()
    while True:
        began_s = time.monotonic()
        try:
            await act()
        except (Exception, asyncio.CancelledError):
            # A call of Serve raises this as well when the other side has cancelled it.
            if task is not None and task.cancelling():
                raise
            logger.exception("a periodic task failed; trying again")
        await asyncio.sleep(max(0.0, period_s - (time.monotonic() - began_s)))
