"""A trace through locations that queue, load, forward and report."""

from __future__ import annotations

import math
from array import array
from collections.abc import Callable, Mapping, Sequence

from serve_app.core.cache.events import ModelsKnown
from serve_app.core.catalog import ModelProfile
from serve_app.core.placement.rules import PlacementSettings
from serve_app.core.routing.rules import RoutingRules
from serve_app.simulator.discrete_event.coordinator import SimulatedCoordinator
from serve_app.simulator.discrete_event.event_queue import EventQueue
from serve_app.simulator.discrete_event.results import DiscreteEventResults
from serve_app.simulator.discrete_event.router import SimulatedRouter
from serve_app.simulator.discrete_event.settings import DiscreteEventOptions
from serve_app.simulator.discrete_event.worker import SimulatedWorker, report_rows
from serve_app.workload.trace import Trace

#: How many requests pass between two reports of progress.
_STRIDE = 20_000


def simulate_discrete_event(
    trace: Trace,
    profiles: Sequence[ModelProfile],
    options: DiscreteEventOptions,
    progress: Callable[[int], None] = lambda _: None,
) -> DiscreteEventResults:
    """Send a trace through its locations; the same arguments give the same results.

    Args:
        trace: the requests; each location of it gets a router and a worker.
        profiles: of ``trace.models``, in their order.
        options: of the locations.
        progress: is called now and then with the number of requests done since.
    """
    simulation = _Simulation(trace, profiles, options)
    simulation.run(progress)
    return simulation.close()


class _Simulation:
    def __init__(self, trace: Trace, profiles: Sequence[ModelProfile], options: DiscreteEventOptions) -> None:
        self._trace, self._profiles = trace, profiles
        self._event_queue = EventQueue()
        self._results = DiscreteEventResults(latencies=array("d", [math.nan]) * len(trace))
        rules = RoutingRules(
            profiles={profile.model_id: profile for profile in profiles},
            links=options.links,
            default_link=options.default_link,
            horizon_s=options.horizon_s,
            staleness_s=options.staleness_s,
        )
        coordinator = SimulatedCoordinator(
            event_queue=self._event_queue,
            report_every_s=options.report_every_s,
            delay_s=options.coordinator_delay_s,
            half_life_s=options.half_life_s,
            placement=(
                PlacementSettings(
                    routing=rules,
                    every_s=options.placement_every_s,
                    payload_bytes=options.payload_bytes,
                    rules=options.placement,
                )
                if options.coordination == "full"
                else None
            ),
        )
        self._alone = options.coordination == "none"
        self._workers = self._make_workers(coordinator, rules, options)
        self._routers = self._make_routers(coordinator, rules, options)
        for worker, router in zip(self._workers.values(), self._routers, strict=True):
            worker.sync = router.catch_up
            worker.follower.view = router.view.cluster
            worker.cache.handle(ModelsKnown(profiles), 0.0)
            worker.start_preloads(0.0)
            if not self._alone:
                coordinator.report(worker, 0.0)
        if options.coordination == "full":
            _PlacementTimer(coordinator, self._workers, rules.profiles, self._event_queue, options)

    def _make_workers(
        self, coordinator: SimulatedCoordinator, rules: RoutingRules, options: DiscreteEventOptions
    ) -> Mapping[str, SimulatedWorker]:
        rows = report_rows(self._profiles)
        workers = [
            SimulatedWorker(
                location=location,
                cache=options.make_cache(number),
                forms=options.make_forms and options.make_forms(),
                report_rows=rows,
                rules=rules,
                exec_slots=options.exec_slots,
                event_queue=self._event_queue,
                results=self._results,
                changed=_ignore if self._alone else coordinator.changed,
            )
            for number, location in enumerate(self._trace.locations)
        ]
        return {worker.replica: worker for worker in workers}

    def _make_routers(
        self, coordinator: SimulatedCoordinator, rules: RoutingRules, options: DiscreteEventOptions
    ) -> Sequence[SimulatedRouter]:
        return [
            SimulatedRouter(
                worker=worker,
                workers=self._workers,
                coordinator=None if self._alone else coordinator,
                rules=rules,
                payload_bytes=options.payload_bytes,
                event_queue=self._event_queue,
                results=self._results,
            )
            for worker in self._workers.values()
        ]

    def run(self, progress: Callable[[int], None]) -> None:
        trace, profiles, routers, run_until = self._trace, self._profiles, self._routers, self._event_queue.run_until
        origins = trace.location if trace.location is not None else array("I", [0]) * len(trace)
        for number, (now, model, origin) in enumerate(zip(trace.arrival_s, trace.model, origins, strict=True)):
            run_until(now)
            routers[origin].request(number, profiles[model], now)
            if number % _STRIDE == _STRIDE - 1:
                progress(_STRIDE)
        # Ticks and rounds of placement never end by themselves.
        while self._results.requests < len(trace):
            assert self._event_queue.step(), "requests wait for something that never happens"
        progress(len(trace) % _STRIDE)

    def close(self) -> DiscreteEventResults:
        results = self._results
        for worker in self._workers.values():
            counters = worker.cache.counters
            results.preloads += counters.preloads
            results.wasted_preloads += counters.wasted_preloads
            results.evictions += counters.evictions
            results.unloads += counters.unloads
            results.form_changes += counters.form_changes
        return results


class _PlacementTimer:
    """Runs rounds of placement at the moments of views, with what the coordinator knows then."""

    def __init__(
        self,
        coordinator: SimulatedCoordinator,
        workers: Mapping[str, SimulatedWorker],
        profiles: Mapping[str, ModelProfile],
        event_queue: EventQueue,
        options: DiscreteEventOptions,
    ) -> None:
        self._coordinator = coordinator
        self._workers = workers
        self._profiles = profiles
        self._event_queue = event_queue
        #: Number of reports after which a round changed nothing, and until when time alone changes nothing.
        self._settled_at = -1
        self._settled_until_s = 0.0
        self._repeat_after_s = options.placement.withdraw_after_s
        # At the moments of views, as no reader may see more of the coordinator's future than others.
        self._every_ticks = max(1, round(options.placement_every_s / options.report_every_s))
        self._plan_next(0)

    def _plan_next(self, tick: int) -> None:
        next_tick = (tick // self._every_ticks + 1) * self._every_ticks
        self._event_queue.at(self._coordinator.received_s(next_tick), self._round, next_tick)

    def _round(self, tick: int, now: float) -> None:
        coordinator = self._coordinator
        # Without a report since a round that changed nothing, rates have only fallen, and seldom unevenly.
        if coordinator.sent != self._settled_at or now >= self._settled_until_s:
            commands = coordinator.plan(tick)
            self._settled_at = -1 if commands else coordinator.read
            self._settled_until_s = now + self._repeat_after_s
            for command in commands:
                self._workers[command.replica].carry_out(command, self._profiles[command.model_id], now)
        self._plan_next(tick)


def _ignore(worker: SimulatedWorker, now: float) -> None:
    """No coordinator takes reports."""
