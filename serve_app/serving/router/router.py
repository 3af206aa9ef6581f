"""The router: takes a request of one location, decides where it runs, and sees it through.

Everything but HTTP: the wire formats are in ``oip.py`` and ``http.py``, the rules in ``core/routing.py``.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Sequence
from http import HTTPStatus

from serve_app.core.catalog import Catalog, PublishedModel, most_accurate_first
from serve_app.core.cluster.cluster_view import ClusterView
from serve_app.core.coordination.rules import CoordinatorRules
from serve_app.core.links import LinkTable
from serve_app.core.routing.choose import Route, RoutingRequest, choose
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
from serve_app.core.routing.eviction_cost import exec_s, prepare
from serve_app.core.routing.router_view import RouterView
from serve_app.core.routing.rules import RoutingRules
from serve_app.core.vocabulary import Forwarding, Outcome
from serve_app.errors import DeadlineExceeded, EdgeServeError, NotFound, Unavailable
from serve_app.serving.coordinator.client import CoordinatorClient
from serve_app.serving.metrics import RouterMetrics
from serve_app.serving.periodic import every
from serve_app.serving.router.request import InferenceRequest, InferenceResponse
from serve_app.serving.transport.messages import InferenceRejected, InferenceResult, InferenceTask, NotResident, Reply
from serve_app.serving.transport.worker_pool import WorkerLost, WorkerPool

logger = logging.getLogger(__name__)

#: How long a request waits for a location of which no worker is known.
_BLIND_S = 15.0

#: Every router goes to other locations and back this often, to so many at once, and now and then with a payload.
_PROBE_EVERY_S = 1.0
_PROBED_AT_ONCE = 16
_PROBE_BYTES = 65_536

#: A location that has not answered so many probes in a row, each for so long, is cut off from here.
_SILENT_PROBES = 2
_PROBE_TIMEOUT_S = 2.0


class Router:
    """Routes the requests of one location, or of any for the gateway.

    Args:
        catalog: published models.
        locations: all names that exist.
        home: the location that this router stands at, or stands in for.
        rules: for the choice.
        pool: the workers.
        link: the coordinator.
        metrics: counters.
        request_time_s: the deadline of requests that bring none.
        max_inflight: requests under way; more are refused.
        stands_in: it may be anywhere: what it measures is its own way, and nothing to tell others of ``home``.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        *,
        catalog: Catalog,
        locations: tuple[str, ...],
        home: str,
        rules: RoutingRules,
        pool: WorkerPool,
        link: CoordinatorClient,
        metrics: RouterMetrics,
        request_time_s: float,
        max_inflight: int,
        stands_in: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.catalog = catalog
        self.locations = locations
        self.known = RouterView()
        self._home = home
        self._stands_in = stands_in
        self._rules = rules
        self._ways = LinkTable(home, rules.link)
        self._pool = pool
        self._link = link
        self._metrics = metrics
        self._request_time_s = request_time_s
        self._max_inflight = max_inflight
        self._clock = clock
        self._inflight = 0
        self._idle = asyncio.Event()
        self._calls: dict[str, set[asyncio.Timeout]] = {}
        self._listening: asyncio.Task[None] | None = None
        self._probing: asyncio.Task[None] | None = None
        self._probes = 0
        self._probed: Counter[str] = Counter()
        self._silent: Counter[str] = Counter()
        #: Orders that nobody waits for; kept, or they could be collected half done.
        self._orders: set[asyncio.Task[None]] = set()

    def start(self, refresh_every_s: float, label: str) -> None:
        """Begin to follow the coordinator and to measure the ways; ``label`` is the location of the gauges."""

        began_s = self._clock()

        async def refresh() -> None:
            await self.refresh()
            self._metrics.inflight.set(self._inflight, tags={"location": label})
            age_s = self.view_age_s()
            never_s = self._clock() - began_s
            self._metrics.view_age_seconds.set(never_s if age_s is None else age_s, tags={"location": label})

        loop = asyncio.get_running_loop()
        self._listening = loop.create_task(every(refresh_every_s, refresh))
        self._probing = loop.create_task(every(_PROBE_EVERY_S, self.probe))

    def reconfigure(
        self, catalog: Catalog, locations: tuple[str, ...], rules: RoutingRules, coordination: CoordinatorRules
    ) -> None:
        """Go on with other models, locations or rules; requests under way are not disturbed."""
        self.catalog = catalog
        self.locations = locations
        self._rules = rules
        self._ways.configure(rules.link)
        self._link.configure(coordination)

    async def refresh(self) -> None:
        """Ask the coordinator what is new."""
        epoch = self.known.view.epoch
        news = {} if self._stands_in else self._ways.news()
        delta = await self._link.exchange(news, epoch, self.known.view.version)
        if delta is None or delta.epoch != epoch:
            self._ways.forget_told()
        if delta is not None:
            # Dead or hanging workers.
            self._take_back(self.known.apply(delta, self._clock()))
        # The ways change without news as well.
        prepare(self.known, self._home, self._rules, self._ways)

    async def whole_view(self) -> ClusterView:
        """What there is in the whole cluster, for people to look at; what this router knows if nobody can tell."""
        view = self.known.view
        whole = await self._link.everything() if view.scoped else None
        if whole is None:
            return view
        found = ClusterView()
        found.apply(whole, self._clock())
        return found

    def _take_back(self, replicas: Iterable[str]) -> None:
        """Have the requests that wait for these replicas served elsewhere."""
        now = asyncio.get_running_loop().time()
        for replica in replicas:
            for timeout in tuple(self._calls.get(replica, ())):
                # One that is just expiring cannot be changed any more, and need not be.
                with contextlib.suppress(RuntimeError):
                    timeout.reschedule(now)

    async def probe(self) -> None:
        """Measure the ways to a few locations, in turn to all of them; those that do not answer are cut off."""
        there = sorted({report.location for report in self.known.view.workers.values()})
        if not there:
            return
        self._probes += 1
        first = self._probes * _PROBED_AT_ONCE
        turn = {there[number % len(there)] for number in range(first, first + _PROBED_AT_ONCE)}
        await asyncio.gather(*(self._probe(location) for location in turn))

    async def _probe(self, location: str) -> None:
        self._probed[location] += 1
        size_bytes = 0 if self._probed[location] % 4 else _PROBE_BYTES
        began_s = self._clock()
        try:
            async with asyncio.timeout(_PROBE_TIMEOUT_S):
                await self._pool.ping(location, bytes(size_bytes))
        except (WorkerLost, TimeoutError):
            self._silent[location] += 1
            # Our own location is judged by its reports: there is nobody nearer who could know better.
            is_own = location == self._home and not self._stands_in
            if self._silent[location] >= _SILENT_PROBES and not is_own:
                if self._silent[location] == _SILENT_PROBES:
                    logger.warning("location %s does not answer from here; it gets no requests until it does", location)
                self._take_back(self.known.reach(location, reached=False))
            return
        self._silent[location] = 0
        self.known.reach(location, reached=True)
        self._ways.add(location, size_bytes, self._clock() - began_s)

    @property
    def coordinator_up(self) -> bool:
        """Whether the coordinator answered last time."""
        return self._link.up

    def view_age_s(self) -> float | None:
        """Seconds since the coordinator was last heard."""
        return self.known.view.age_s(self._clock())

    def candidates(self, query: InferenceRequest) -> Sequence[PublishedModel]:
        """The models that may serve a query, best first.

        Raises:
            NotFound: neither a model nor a family has this name.
            InvalidRequest: no member is accurate enough.
        """
        return most_accurate_first(self.models_named(query.name), query.min_accuracy)

    def models_named(self, name: str) -> tuple[PublishedModel, ...]:
        """The model, or the members of the family, of that name.

        Raises:
            NotFound: there is neither.
        """
        models = (self.catalog[name],) if name in self.catalog else self.catalog.members(name)
        if not models:
            raise NotFound(
                f"no model or family is called {name[:64]!r}; POST /v2/repository/index lists the models, "
                f"and the families are {', '.join(self.catalog.families) or 'none'}"
            )
        return models

    async def load(self, location: str, name: str) -> None:
        """Load a model by hand at a location; raises the tree of ``errors.py``."""
        model = self._single(name)
        refused = await self._by_hand(self._pool.load(location, model.model_id), location)
        if refused is not None:
            raise refused.error

    async def unload(self, location: str, name: str) -> None:
        """Unload a model by hand from every worker of a location; raises the tree of ``errors.py``."""
        model = self._single(name)
        # All of them: what is known of who holds it may be older than the load that this undoes.
        replicas = [report.replica for report in self.known.workers() if report.location == location]
        unloaded = False
        for replica in replicas:
            refused = await self._by_hand(self._pool.unload(location, replica, model.model_id), location)
            if refused is None:
                unloaded = True
            elif not isinstance(refused.error, NotFound):
                raise refused.error
        if not unloaded:
            raise NotFound(f"model {model.model_id} is not loaded at {location}; nothing to unload")

    def _single(self, name: str) -> PublishedModel:
        if name not in self.catalog:
            raise NotFound(f"no model is called {name[:64]!r}; POST /v2/repository/index lists them")
        return self.catalog[name]

    async def _by_hand(self, call: Awaitable[InferenceRejected | None], location: str) -> InferenceRejected | None:
        try:
            async with asyncio.timeout(self._request_time_s):
                return await call
        except (WorkerLost, TimeoutError):
            raise Unavailable(f"no worker of {location} could be reached; try again later", 2.0) from None

    def require_room(self) -> None:
        """Raise ``Unavailable`` while too many requests are under way."""
        if self._inflight >= self._max_inflight:
            raise Unavailable(f"{self._inflight} requests are under way already; try again later")

    async def drained(self) -> None:
        """Wait until no request is under way."""
        while self._inflight:
            self._idle.clear()
            await self._idle.wait()

    async def serve(self, query: InferenceRequest) -> InferenceResponse:
        """Answer a query; raises the tree of ``errors.py``, and anything else only for a fault of ours."""
        if query.location not in self.locations:
            raise NotFound(f"no location is called {query.location}; there are {', '.join(self.locations)}")
        self.require_room()
        began_s = self._clock()
        self._inflight += 1
        try:
            served = await self._see_through(query, self._pick(query), began_s)
        finally:
            self._inflight -= 1
            if not self._inflight:
                self._idle.set()
        # Measuring takes a while, so the answer goes first.
        asyncio.get_running_loop().call_soon(self._measure, query, served, self._clock() - began_s)
        return served

    def _measure(self, query: InferenceRequest, served: InferenceResponse, seconds: float) -> None:
        outcome = served.outcome.value
        self.count(query.location, served.model.model_id, outcome, HTTPStatus.OK)
        self._metrics.request_seconds.observe(seconds, tags={"location": query.location, "outcome": outcome})
        if served.location != query.location:
            way = {"from_location": query.location, "to_location": served.location}
            self._metrics.forwards.inc(tags=way)
            self._metrics.forward_seconds.observe(served.forward_s, tags=way)

    def _pick(self, query: InferenceRequest) -> PublishedModel:
        """The model of that name; of a family, the most accurate that is expected to meet the deadline."""
        candidates = self.candidates(query)
        if query.name not in self.catalog:
            return self._pick_member(query, candidates)
        (model,) = candidates
        if query.deadline_s is not None:
            fastest_s = min([exec_s(model.profile, report) for report in self.known.workers()] or [0.0])
            # Measured times vary; only what is out of reach by far is refused unseen.
            if fastest_s / 2 > query.deadline_s:
                raise DeadlineExceeded(
                    f"model {model.model_id} takes about {fastest_s * 1000:.0f} ms, longer than the deadline of "
                    f"{query.deadline_s * 1000:g} ms; raise deadline_ms or ask for a family"
                )
        return model

    def _pick_member(self, query: InferenceRequest, members: Sequence[PublishedModel]) -> PublishedModel:
        may_forward = query.forwarding is not Forwarding.NEVER
        workers = [report for report in self.known.workers() if may_forward or report.location == query.location]
        fitting = [model for model in members if query.fits(model)] or members
        fitting = [model for model in fitting if any(report.can_hold(model.profile) for report in workers)] or fitting
        if query.deadline_s is None:
            return fitting[0]
        for model in fitting:
            route = choose(self._routing_request(query, model), self.known, self._rules, self._ways)
            if route.expected_s <= query.deadline_s:
                return model
        raise DeadlineExceeded(
            f"no model of {query.name} is expected to answer within {query.deadline_s * 1000:g} ms; "
            "raise deadline_ms or lower min_accuracy"
        )

    async def _see_through(self, query: InferenceRequest, model: PublishedModel, began_s: float) -> InferenceResponse:
        """Send the request where its ``Dispatch`` says, until a worker has executed it or it has failed."""
        limit_s = query.deadline_s if query.deadline_s is not None else self._request_time_s
        deadline_s = began_s + limit_s
        dispatch = Dispatch(self._routing_request(query, model), self.known, self._rules, self._ways, deadline_s)
        try:
            while isinstance(step := dispatch.next(self._clock()), Send):
                result, response = await self._attempt(step, query, model, deadline_s)
                dispatch.replied(result)
                if response is not None:
                    return response
        finally:
            dispatch.close()
        raise _error(step, model.model_id, limit_s)

    async def _attempt(
        self, step: Send, query: InferenceRequest, model: PublishedModel, deadline_s: float
    ) -> tuple[AttemptResult, InferenceResponse | None]:
        """Send the request once; what came of it, and the response if it was executed."""
        route, sent_s = step.route, self._clock()
        if route.preload is not None:
            self._order_preload(query.location, route.preload, model.model_id)
        work = InferenceTask(
            model_id=model.model_id,
            origin=query.location,
            payload=query.payload,
            budget_s=deadline_s - sent_s,
            only_if_resident=step.only_if_resident,
        )
        try:
            reply = await self._call(route, work)
        except WorkerLost as lost:
            logger.warning("worker %s of %s lost: %s", route.replica, route.location, lost)
            return Lost(), None
        match reply:
            case InferenceResult():
                response = self._response(query, model, route, reply, self._clock() - sent_s)
                return Finished(reply.replica, reply.sequence, reply.evicted), response
            case NotResident():
                return Absent(reply.replica, reply.sequence), None
            case InferenceRejected():
                return Rejected(reply.error), None

    def _order_preload(self, location: str, replica: str, model_id: str) -> None:
        async def order() -> None:
            # Only later requests would have gained by it, and they will find another way.
            with contextlib.suppress(WorkerLost):
                await self._pool.preload(location, replica, model_id)

        task = asyncio.get_running_loop().create_task(order(), name=f"have {model_id} loaded")
        self._orders.add(task)
        task.add_done_callback(self._orders.discard)

    async def _call(self, plan: Route, work: InferenceTask) -> Reply:
        calls: set[asyncio.Timeout] = set()
        if plan.replica is not None:
            calls = self._calls.setdefault(plan.replica, calls)
        # Nobody is known there; Serve may have a replica soon, or never.
        limit_s = work.budget_s if plan.replica is not None else min(work.budget_s, _BLIND_S)
        deadline = asyncio.get_running_loop().time() + limit_s
        timeout = asyncio.timeout_at(deadline)
        calls.add(timeout)
        try:
            async with timeout:
                return await self._pool.infer(plan.location, plan.replica, work)
        except TimeoutError:
            if (timeout.when() or 0.0) < deadline:
                raise WorkerLost("it has left the directory") from None
            if limit_s < work.budget_s:
                return InferenceRejected(
                    error=Unavailable(f"no worker of {plan.location} is running; try again later", 5.0)
                )
            message = f"model {work.model_id} did not answer within its deadline; raise deadline_ms"
            return InferenceRejected(error=DeadlineExceeded(message))
        finally:
            calls.discard(timeout)
            if not calls and plan.replica is not None:
                self._calls.pop(plan.replica, None)

    def _routing_request(self, query: InferenceRequest, model: PublishedModel) -> RoutingRequest:
        return RoutingRequest(
            model=model.profile,
            here=query.location,
            payload_bytes=query.payload_bytes,
            forwarding=query.forwarding,
        )

    def _response(
        self, query: InferenceRequest, model: PublishedModel, plan: Route, done: InferenceResult, call_s: float
    ) -> InferenceResponse:
        """Measure the link by the reply, and make the response of it."""
        outcome, forward_s = done.outcome, 0.0
        way_s = max(0.0, call_s - done.queue_s - done.load_s - done.decode_s - done.exec_s)
        self._ways.add(plan.location, query.payload_bytes, way_s)
        if plan.location != query.location:
            outcome, forward_s = Outcome.FORWARD, way_s
        return InferenceResponse(
            model=model,
            location=plan.location,
            outcome=outcome,
            logits=done.logits,
            queue_s=done.queue_s,
            load_s=done.load_s,
            decode_s=done.decode_s,
            exec_s=done.exec_s,
            forward_s=forward_s,
        )

    def count(self, location: str, name: str, outcome: str, status: int) -> None:
        """Count one request that has ended; names that users made up must not become label values."""
        model_id = name if name in self.catalog or self.catalog.members(name) else "none"
        tags = {"location": location, "model": model_id, "outcome": outcome, "code": str(int(status))}
        self._metrics.requests.inc(tags=tags)


def _error(fail: Fail, model_id: str, limit_s: float) -> EdgeServeError:
    """What the user is told of a request that has failed."""
    if fail.error is not None:
        return fail.error
    if fail.reason is FailReason.DEADLINE:
        return DeadlineExceeded(f"model {model_id} did not answer within {limit_s * 1000:g} ms; raise deadline_ms")
    return Unavailable(f"no worker could be reached for model {model_id}; try again later", 2.0)
