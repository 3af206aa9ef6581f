"""The router: takes a request of one location, decides where it runs, and sees it through.

Everything but HTTP: the wire formats are in ``oip`` and ``api``, the decisions in ``core/routing``. The class has some
more than 300 lines because it is one door: what endpoints ask for goes on from here to a part of its own.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import Callable, Sequence
from http import HTTPStatus

from serve_app.core.catalog import Catalog, PublishedModel, most_accurate_first
from serve_app.core.cluster.cluster_view import ClusterView
from serve_app.core.cluster.reports import WorkerReport
from serve_app.core.coordination.rules import CoordinatorRules
from serve_app.core.links import LinkTable
from serve_app.core.routing.choose import Route
from serve_app.core.routing.dispatch import (
    Absent,
    AttemptResult,
    Dispatch,
    Fail,
    FailReason,
    Finished,
    Lost,
    Rejected,
    Send,
)
from serve_app.core.routing.router_view import RouterView
from serve_app.core.routing.rules import RoutingRules
from serve_app.core.routing.version_switch import VersionSwitch
from serve_app.core.vocabulary import ModelState, Outcome
from serve_app.errors import DeadlineExceeded, EdgeServeError, NotFound, Unavailable
from serve_app.serving.coordinator.client import CoordinatorClient
from serve_app.serving.metrics import RouterMetrics
from serve_app.serving.periodic import every
from serve_app.serving.router.model_control import ModelControl
from serve_app.serving.router.model_selection import require_in_time, routing_request, select_member
from serve_app.serving.router.prober import Prober
from serve_app.serving.router.request import InferenceRequest, InferenceResponse
from serve_app.serving.router.worker_calls import WorkerCalls
from serve_app.serving.transport.messages import InferenceRejected, InferenceResult, InferenceTask, NotResident
from serve_app.serving.transport.worker_pool import WorkerLost, WorkerPool

logger = logging.getLogger(__name__)

_PROBE_EVERY_S = 1.0


class Router:
    """Routes the requests of one location, or of any for the gateway.

    Args:
        catalog: published models.
        locations: all names that exist.
        home: the location that this router stands at, or stands in for.
        rules: for the choice.
        pool: the workers.
        coordinator: the client of the coordinator.
        metrics: counters.
        request_time_s: the deadline of requests that bring none.
        max_inflight: requests under way; more are rejected.
        stands_in: the router may run anywhere: the links that it measures are its own, and not those of ``home``.
        unknown_location_timeout_s: how long a request waits for a location of which no worker is known.
        clock: monotonic seconds.
        rng: which requests a canary answers.

    Attributes:
        view: what the router knows of the cluster.
    """

    def __init__(
        self,
        *,
        catalog: Catalog,
        locations: tuple[str, ...],
        home: str,
        rules: RoutingRules,
        pool: WorkerPool,
        coordinator: CoordinatorClient,
        metrics: RouterMetrics,
        request_time_s: float,
        max_inflight: int,
        stands_in: bool = False,
        unknown_location_timeout_s: float = 15.0,
        clock: Callable[[], float] = time.monotonic,
        rng: random.Random | None = None,
    ) -> None:
        self.catalog = catalog
        self.locations = locations
        self.view = RouterView()
        #: With the versions that are to answer; in ``catalog``, those answer that do so by now.
        self._wanted = catalog
        self._switch = VersionSwitch()
        self._switch.advance(catalog, (), clock())
        self._home = home
        self._stands_in = stands_in
        self._rules = rules
        self._links = LinkTable(home, rules.link)
        self._calls = WorkerCalls(pool, unknown_location_timeout_s)
        self._control = ModelControl(pool, request_time_s)
        self._prober = Prober(
            pool=pool,
            view=self.view,
            links=self._links,
            fail_calls=self._calls.fail_calls,
            own_location=None if stands_in else home,
            clock=clock,
        )
        self._coordinator = coordinator
        self._metrics = metrics
        self._request_time_s = request_time_s
        self._max_inflight = max_inflight
        self._clock = clock
        self._rng = rng or random.Random()
        self._waiting: dict[str, int] = {}
        self._inflight = 0
        self._idle = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []

    def start(self, refresh_every_s: float, label: str) -> None:
        """Begin to follow the coordinator and to measure links; ``label`` is the location of the gauges."""
        began_s = self._clock()

        async def refresh() -> None:
            await self.refresh()
            self._metrics.inflight.set(self._inflight, tags={"location": label})
            age_s = self.view_age_s()
            never_s = self._clock() - began_s
            self._metrics.view_age_seconds.set(never_s if age_s is None else age_s, tags={"location": label})

        loop = asyncio.get_running_loop()
        self._tasks = [
            loop.create_task(every(refresh_every_s, refresh)),
            loop.create_task(every(_PROBE_EVERY_S, self.probe)),
        ]

    def reconfigure(
        self, catalog: Catalog, locations: tuple[str, ...], rules: RoutingRules, coordination: CoordinatorRules
    ) -> None:
        """Go on with other models, locations or rules; requests under way are not disturbed."""
        self._wanted = catalog
        self.locations = locations
        self._rules = rules
        self._links.configure(rules.link)
        self._coordinator.configure(coordination)
        self._waiting = {}
        self._follow_versions(is_new=True)

    # The cluster

    async def refresh(self) -> None:
        """Exchange measured links for what has changed in the cluster."""
        cluster = self.view.cluster
        epoch = cluster.epoch
        links = {} if self._stands_in else self._links.changes()
        delta = await self._coordinator.exchange(links, epoch, cluster.version)
        if delta is None or delta.epoch != epoch:
            self._links.resend()
        if delta is not None:
            # Dead or hanging workers.
            self._calls.fail_calls(self.view.apply(delta, self._clock()))
        if self._waiting:
            self._follow_versions()
        # Links change without a delta as well.
        self.view.precompute(self._home, self._rules, self._links)

    def _follow_versions(self, *, is_new: bool = False) -> None:
        """Let those versions answer that are to, and are loaded."""
        workers = self.view.workers() if self._stands_in else self.view.workers_at(self._home)
        waiting = self._switch.advance(self._wanted, tuple(workers), self._clock())
        if is_new or waiting != self._waiting:
            self.catalog, self._waiting = self._wanted.with_current(waiting), waiting

    async def probe(self) -> None:
        """Measure the links to some locations, in turn to all of them; those that do not answer are cut off."""
        await self._prober.probe()

    async def cluster_view(self) -> ClusterView:
        """The whole cluster, for people to look at; what this router knows while the coordinator is down."""
        known = self.view.cluster
        snapshot = await self._coordinator.snapshot() if known.partial else None
        if snapshot is None:
            return known
        view = ClusterView()
        view.apply(snapshot, self._clock())
        return view

    @property
    def coordinator_up(self) -> bool:
        """Whether the coordinator answered last time."""
        return self._coordinator.up

    def view_age_s(self) -> float | None:
        """Seconds since the last delta of the coordinator; None before the first."""
        return self.view.cluster.age_s(self._clock())

    def workers_at(self, location: str) -> Sequence[WorkerReport]:
        """The workers of a location that may be sent to."""
        return self.view.workers_at(location)

    def is_ready(self, location: str) -> bool:
        """Whether a worker of a location is there to serve."""
        return bool(self.workers_at(location)) and len(self.catalog) > 0

    def ready_models(self, location: str) -> set[str]:
        """The models that are in memory at a location, by id."""
        return {
            model.model_id
            for report in self.workers_at(location)
            for model in report.models.values()
            if model.state is ModelState.READY
        }

    # Models

    def models_named(self, name: str) -> tuple[PublishedModel, ...]:
        """The model, or the members of the family, of that name.

        Raises:
            NotFound: there is neither, or the store does not have what the catalog says.
        """
        models = self.catalog.named(name)
        if not models:
            if name in self.catalog.problems:
                raise NotFound(f"model {name} is in the catalog and not served: {self.catalog.problems[name]}")
            raise NotFound(
                f"no model or family is called {name[:64]!r}; POST /v2/repository/index lists the models, "
                f"and the families are {', '.join(self.catalog.families) or 'none'}"
            )
        return models

    async def load(self, location: str, name: str) -> None:
        """Load a model at a location for an operator; raises the tree of ``errors.py``."""
        await self._control.load(location, self._single(name).model_id)

    async def unload(self, location: str, name: str) -> None:
        """Unload a model from every worker of a location for an operator; raises the tree of ``errors.py``."""
        model = self._single(name)
        # All of them: what is known of the holders may be older than the load that this undoes.
        replicas = [report.replica for report in self.workers_at(location)]
        await self._control.unload(location, replicas, model.model_id)

    def _single(self, name: str) -> PublishedModel:
        models = self.catalog.named(name)
        if not models or name in self.catalog.families:
            raise NotFound(f"no model is called {name[:64]!r}; POST /v2/repository/index lists them")
        return models[0]

    # Requests

    def require_capacity(self) -> None:
        """Raise ``Unavailable`` while too many requests are under way."""
        if self._inflight >= self._max_inflight:
            raise Unavailable(f"{self._inflight} requests are under way already; try again later")

    async def drained(self) -> None:
        """Wait until no request is under way."""
        while self._inflight:
            self._idle.clear()
            await self._idle.wait()

    async def serve(self, request: InferenceRequest) -> InferenceResponse:
        """Serve a request; raises the tree of ``errors.py``, and anything else only for a fault of ours."""
        if request.location not in self.locations:
            raise NotFound(f"no location is called {request.location}; there are {', '.join(self.locations)}")
        self.require_capacity()
        began_s = self._clock()
        self._inflight += 1
        try:
            response = await self._dispatch(request, self._select(request), began_s)
        finally:
            self._inflight -= 1
            if not self._inflight:
                self._idle.set()
        # Measuring takes a while, so the response goes first.
        asyncio.get_running_loop().call_soon(self._measure, request, response, self._clock() - began_s)
        return response

    def _select(self, request: InferenceRequest) -> PublishedModel:
        models = self.models_named(request.name)
        if len(models) > 1 or request.name in self.catalog.families:
            return select_member(models, request, self.view, self._rules, self._links)
        candidates = most_accurate_first(models, request.min_accuracy)
        if self.catalog.canaries and request.name in self.catalog.canaries:
            canary, share = self.catalog.canaries[request.name]
            if self._rng.random() < share and request.fits(canary):
                return require_in_time(canary, request, self.view)
        return require_in_time(candidates[0], request, self.view)

    async def _dispatch(self, request: InferenceRequest, model: PublishedModel, began_s: float) -> InferenceResponse:
        """Send the request where its ``Dispatch`` says, until a worker has executed it or it has failed."""
        limit_s = request.deadline_s if request.deadline_s is not None else self._request_time_s
        deadline_s = began_s + limit_s
        dispatch = Dispatch(routing_request(request, model), self.view, self._rules, self._links, deadline_s)
        try:
            while isinstance(step := dispatch.next(self._clock()), Send):
                result, response = await self._attempt(step, request, model, deadline_s)
                dispatch.replied(result)
                if response is not None:
                    return response
        finally:
            dispatch.close()
        raise _error(step, model.model_id, limit_s)

    async def _attempt(
        self, step: Send, request: InferenceRequest, model: PublishedModel, deadline_s: float
    ) -> tuple[AttemptResult, InferenceResponse | None]:
        """Send the request once; returns what came of it, and the response if it was executed."""
        route, sent_s = step.route, self._clock()
        if route.preload is not None:
            self._calls.preload(request.location, route.preload, model.model_id)
        task = InferenceTask(
            model_id=model.model_id,
            origin=request.location,
            payload=request.payload,
            budget_s=deadline_s - sent_s,
            only_if_resident=step.only_if_resident,
        )
        try:
            reply = await self._calls.infer(route, task)
        except WorkerLost as lost:
            logger.warning("worker %s of %s lost: %s", route.replica, route.location, lost)
            return Lost(), None
        match reply:
            case InferenceResult():
                response = self._response(request, model, route, reply, self._clock() - sent_s)
                return Finished(reply.replica, reply.sequence, reply.evicted), response
            case NotResident():
                return Absent(reply.replica, reply.sequence), None
            case InferenceRejected():
                return Rejected(reply.error), None

    def _response(
        self, request: InferenceRequest, model: PublishedModel, route: Route, result: InferenceResult, call_s: float
    ) -> InferenceResponse:
        """Measure the link by the result, and make the response of it."""
        link_s = max(0.0, call_s - result.queue_s - result.load_s - result.decode_s - result.exec_s)
        self._links.add(route.location, request.payload_bytes, link_s)
        is_forwarded = route.location != request.location
        return InferenceResponse(
            model=model,
            form=result.form,
            location=route.location,
            outcome=Outcome.FORWARD if is_forwarded else result.outcome,
            outputs=result.outputs,
            answer=result.answer,
            queue_s=result.queue_s,
            load_s=result.load_s,
            decode_s=result.decode_s,
            exec_s=result.exec_s,
            forward_s=link_s if is_forwarded else 0.0,
        )

    # Metrics

    def _measure(self, request: InferenceRequest, response: InferenceResponse, seconds: float) -> None:
        outcome = response.outcome.value
        self.count(request.location, response.model.model_id, outcome, HTTPStatus.OK)
        self._metrics.request_seconds.observe(seconds, tags={"location": request.location, "outcome": outcome})
        if response.location != request.location:
            link = {"from_location": request.location, "to_location": response.location}
            self._metrics.forwards.inc(tags=link)
            self._metrics.forward_seconds.observe(response.forward_s, tags=link)

    def count(self, location: str, name: str, outcome: str, status: int) -> None:
        """Count one request that has ended; names that users made up must not become label values."""
        model_id = name if name in self.catalog or self.catalog.named(name) else "none"
        tags = {"location": location, "model": model_id, "outcome": outcome, "code": str(int(status))}
        self._metrics.requests.inc(tags=tags)


def _error(fail: Fail, model_id: str, limit_s: float) -> EdgeServeError:
    """The error that a request fails with."""
    if fail.error is not None:
        return fail.error
    if fail.reason is FailReason.DEADLINE:
        return DeadlineExceeded(f"model {model_id} did not answer within {limit_s * 1000:g} ms; raise deadline_ms")
    return Unavailable(f"no worker could be reached for model {model_id}; try again later", 2.0)
