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
from serve_app.simulator.discrete_event.router import Router
from serve_app.simulator.discrete_event.settings import DiscreteEventOptions
from serve_app.simulator.discrete_event.worker import Worker, lines
from serve_app.workload.trace import Trace

#: How many requests pass between two reports of progress.
_STRIDE = 20_000


def simulate_discrete_event(
    trace: Trace,
    profiles: Sequence[ModelProfile],
    options: DiscreteEventOptions,
    progress: Callable[[int], None] = lambda _: None,
) -> DiscreteEventResults:
    """Send a trace through its locations; the same arguments give the same tally.

    Args:
        trace: the requests; each location of it gets a router and a worker.
        profiles: of ``trace.models``, in their order.
        options: what the locations are like.
        progress: is told now and then how many more requests are done.
    """
    simulation = _Simulation(trace, profiles, options)
    simulation.run(progress)
    return simulation.close()


class _Simulation:
    def __init__(self, trace: Trace, profiles: Sequence[ModelProfile], options: DiscreteEventOptions) -> None:
        self._trace, self._profiles = trace, profiles
        self._agenda = EventQueue()
        self._tally = DiscreteEventResults(latencies=array("d", [math.nan]) * len(trace))
        rules = RoutingRules(
            profiles={profile.model_id: profile for profile in profiles},
            links=options.links,
            default_link=options.default_link,
            horizon_s=options.horizon_s,
            staleness_s=options.staleness_s,
        )
        news = SimulatedCoordinator(
            event_queue=self._agenda,
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
        alone = options.coordination == "none"
        said = lines(profiles)
        self._workers: dict[str, Worker] = {}
        for number, location in enumerate(trace.locations):
            worker = Worker(
                location=location,
                cache=options.make_cache(number),
                lines=said,
                rules=rules,
                exec_slots=options.exec_slots,
                agenda=self._agenda,
                tally=self._tally,
                changed=_nobody if alone else news.changed,
            )
            self._workers[worker.replica] = worker
        self._routers = [
            Router(
                worker=worker,
                workers=self._workers,
                news=None if alone else news,
                rules=rules,
                payload_bytes=options.payload_bytes,
                agenda=self._agenda,
                tally=self._tally,
            )
            for worker in self._workers.values()
        ]
        for worker, router in zip(self._workers.values(), self._routers, strict=True):
            worker.before = router.catch_up
            worker.follower.view = router.view.cluster
            worker.cache.handle(ModelsKnown(profiles), 0.0)
            worker.look_ahead(0.0)
            if not alone:
                news.report(worker, 0.0)
        if options.coordination == "full":
            _Placer(news, self._workers, rules.profiles, self._agenda, options)

    def run(self, progress: Callable[[int], None]) -> None:
        trace, profiles, routers, run_until = self._trace, self._profiles, self._routers, self._agenda.run_until
        origins = trace.location if trace.location is not None else array("I", [0]) * len(trace)
        for number, (now, model, origin) in enumerate(zip(trace.arrival_s, trace.model, origins, strict=True)):
            run_until(now)
            routers[origin].request(number, profiles[model], now)
            if number % _STRIDE == _STRIDE - 1:
                progress(_STRIDE)
        # Reviews and rounds of placement never end by themselves.
        while self._tally.requests < len(trace):
            assert self._agenda.step(), "requests wait for something that never happens"
        progress(len(trace) % _STRIDE)

    def close(self) -> DiscreteEventResults:
        tally = self._tally
        for worker in self._workers.values():
            counters = worker.cache.counters
            tally.preloads += counters.preloads
            tally.wasted_preloads += counters.wasted_preloads
            tally.evictions += counters.evictions
            tally.unloads += counters.unloads
        return tally


class _Placer:
    """Places models every so often, with what the coordinator knows then."""

    def __init__(
        self,
        news: SimulatedCoordinator,
        workers: Mapping[str, Worker],
        profiles: Mapping[str, ModelProfile],
        agenda: EventQueue,
        options: DiscreteEventOptions,
    ) -> None:
        self._news = news
        self._workers = workers
        self._profiles = profiles
        self._agenda = agenda
        #: How many reports there were when there was nothing left to do, and until when time alone changes nothing.
        self._settled_at = -1
        self._settled_until_s = 0.0
        self._look_again_s = options.placement.withdraw_after_s
        # A round at the moment of a view, so that nobody sees more of the coordinator's future than the others.
        self._every_ticks = max(1, round(options.placement_every_s / options.report_every_s))
        self._plan_next(0)

    def _plan_next(self, tick: int) -> None:
        next_tick = (tick // self._every_ticks + 1) * self._every_ticks
        self._agenda.at(self._news.received_s(next_tick), self._round, next_tick)

    def _round(self, tick: int, now: float) -> None:
        news = self._news
        # Where nothing was reported since a round that changed nothing, rates have only fallen, and seldom unevenly.
        if news.sent != self._settled_at or now >= self._settled_until_s:
            commands = news.plan(tick)
            self._settled_at = -1 if commands else news.read
            self._settled_until_s = now + self._look_again_s
            for command in commands:
                self._workers[command.replica].follow(command, self._profiles[command.model_id], now)
        self._plan_next(tick)


def _nobody(worker: Worker, now: float) -> None:
    """Nobody is told."""
