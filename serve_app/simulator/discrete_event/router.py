"""A router in virtual time: sends each request where its ``Dispatch`` says."""

from __future__ import annotations

import math
from collections.abc import Mapping

from serve_app.core.catalog import ModelProfile
from serve_app.core.routing.choose import RoutingRequest
from serve_app.core.routing.dispatch import Absent, Dispatch, Fail, Finished
from serve_app.core.routing.router_view import RouterView
from serve_app.core.routing.rules import RoutingRules
from serve_app.core.vocabulary import Outcome
from serve_app.simulator.discrete_event.coordinator import SimulatedCoordinator
from serve_app.simulator.discrete_event.event_queue import EventQueue
from serve_app.simulator.discrete_event.results import DiscreteEventResults
from serve_app.simulator.discrete_event.worker import Job, SimulatedWorker


class SimulatedRouter:
    """The router of one location.

    Unlike ``serving/router/router.py``: no lost workers, no probes or measured links, no families. Deadlines only where
    ``request_time_s`` is given, which only parity tests do.

    Args:
        worker: of its own location.
        workers: of all locations, by replica.
        coordinator: None where locations do not cooperate.
        rules: for the choice.
        payload_bytes: of every request.
        event_queue: of the simulation.
        results: of the simulation.
        request_time_s: the deadline of every request; none by default.
    """

    def __init__(
        self,
        *,
        worker: SimulatedWorker,
        workers: Mapping[str, SimulatedWorker],
        coordinator: SimulatedCoordinator | None,
        rules: RoutingRules,
        payload_bytes: int,
        event_queue: EventQueue,
        results: DiscreteEventResults,
        request_time_s: float = math.inf,
    ) -> None:
        self.name = worker.location
        self.view = RouterView()
        self._worker = worker
        self._workers = workers
        self._coordinator = coordinator
        self._rules = rules
        self._payload_bytes = payload_bytes
        self._event_queue = event_queue
        self._results = results
        self._request_time_s = request_time_s
        self._tick = -1
        self._read = -1

    def catch_up(self, now: float) -> None:
        """Like ``refresh`` for callers that do not look at rates: does nothing until there is another report."""
        if self._coordinator is not None and self._coordinator.sent != self._read:
            self.refresh(now)

    def refresh(self, now: float) -> None:
        """Apply the last view that has come, and update the worker's costs of losing a model."""
        coordinator = self._coordinator
        if coordinator is None or (tick := coordinator.tick(now)) == self._tick:
            return
        self._tick = tick
        view = self.view.cluster
        delta = coordinator.view(view.epoch, view.version, tick)
        self._read = coordinator.read
        self.view.apply(delta, now)
        self._worker.catch_up(now)

    def request(self, number: int, model: ModelProfile, now: float) -> None:
        """Take in a user's request."""
        if self._coordinator is None:
            self._worker.take(Job(number, model, self, now), now)
            return
        request = RoutingRequest(model=model, here=self.name, payload_bytes=self._payload_bytes)
        dispatch = Dispatch(request, self.view, self._rules, deadline_s=now + self._request_time_s)
        self._send(Job(number, model, self, now, dispatch), now)

    def _send(self, job: Job, now: float) -> None:
        assert job.dispatch is not None
        self.refresh(now)
        step = job.dispatch.next(now)
        if isinstance(step, Fail):
            self._reject(job, now)
            return
        route = step.route
        worker = job.there = self._worker if route.replica is None else self._workers[route.replica]
        job.only_if_resident = step.only_if_resident
        if route.preload is not None:
            self._workers[route.preload].preload(job.model, now)
        if worker is self._worker:
            job.back_s = 0.0
            worker.take(job, now)
            return
        link = self._rules.link(self.name, worker.location)
        job.back_s = link.rtt_s / 2
        away_s = link.seconds(self._payload_bytes)
        self._results.link_s += away_s
        self._event_queue.at(now + away_s - job.back_s, self._arrives, job)

    def _arrives(self, job: Job, now: float) -> None:
        assert job.there is not None
        job.there.take(job, now)

    def replied(self, job: Job, now: float) -> None:
        """The result of the last attempt has come: count the request, or send it elsewhere."""
        result, dispatch = job.result, job.dispatch
        assert result is not None
        if dispatch is not None:
            dispatch.replied(result)
        if isinstance(result, Finished):
            self._count(job)
            self._close(job, now - job.arrived_s)
        elif dispatch is None:
            self._reject(job, now)
        else:
            if isinstance(result, Absent):
                self._results.stale_retries += 1
            self._send(job, now)

    def _count(self, job: Job) -> None:
        results = self._results
        if job.there is not None and job.there is not self._worker:
            results.forwards += 1
        elif job.outcome is Outcome.HIT:
            results.hits += 1
        elif job.outcome is Outcome.JOIN:
            results.joins += 1
        else:
            results.misses += 1

    def _reject(self, job: Job, now: float) -> None:
        self._results.misses += 1
        self._results.rejected += 1
        self._results.load_s += job.model.load_s
        self._close(job, now - job.arrived_s + job.model.load_s + job.model.exec_s)

    def _close(self, job: Job, latency_s: float) -> None:
        assert math.isnan(self._results.latencies[job.number]), f"request {job.number} was answered twice"
        self._results.latencies[job.number] = latency_s
        self._results.exec_s += (job.form or job.model).exec_s
        self._results.requests += 1
