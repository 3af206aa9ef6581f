"""What the coordinator is told, and what it tells, each after its time on the way."""

from __future__ import annotations

import copy
import math
from collections import deque
from collections.abc import Iterator, Mapping

from serve_app.core.cluster.commands import Command
from serve_app.core.cluster.popularity import DecayedRate
from serve_app.core.cluster.reports import Demand, ViewDelta, WorkerReport
from serve_app.core.coordination.coordinator_state import CoordinatorState
from serve_app.core.coordination.rules import CoordinatorRules
from serve_app.core.placement.controller import Planner
from serve_app.simulator.discrete_event.event_queue import EventQueue
from serve_app.simulator.discrete_event.worker import Worker


class Rates(Mapping[str, float]):
    """Requests per second of each model at one location as of a moment, computed when they are looked at."""

    __slots__ = ("_as_of_s", "_rates")

    def __init__(self, rates: Mapping[str, DecayedRate], as_of_s: float) -> None:
        self._rates = rates
        self._as_of_s = as_of_s

    def __getitem__(self, model_id: str) -> float:
        return self._rates[model_id].per_s(self._as_of_s)

    def get(self, model_id: str, default: float = 0.0) -> float:  # type: ignore[override]
        """As ``__getitem__``, where most models were never asked for."""
        rate = self._rates.get(model_id)
        return default if rate is None else rate.per_s(self._as_of_s)

    def __iter__(self) -> Iterator[str]:
        return iter(self._rates)

    def __len__(self) -> int:
        return len(self._rates)


class LaggedPopularity:
    """``Popularity`` for readers that look at few of very many rates: what they were given stays as it was."""

    def __init__(self, half_life_s: float) -> None:
        self._half_life_s = half_life_s
        self._rates: dict[str, dict[str, DecayedRate]] = {}
        self._lent: set[str] = set()

    def add(self, demand: Demand, now: float) -> None:
        """Count what users of a location have asked for."""
        rates = self._rates.get(demand.location, {})
        if demand.location in self._lent or not rates:
            self._lent.discard(demand.location)
            rates = self._rates[demand.location] = dict(rates)
        known = rates.get(demand.model_id)
        # Those who hold the old one still look at it.
        rate = DecayedRate(self._half_life_s) if known is None else copy.copy(known)
        rate.add(now, demand.count)
        rates[demand.model_id] = rate

    def rates(self, now: float) -> dict[str, Mapping[str, float]]:
        """Requests per second of every model at every location."""
        self._lent.update(self._rates)
        return {location: Rates(rates, now) for location, rates in self._rates.items()}


class SimulatedCoordinator:
    """The coordinator and the ways to it and from it.

    Everything is late by the same time, so the coordinator itself may lag: reports lie in its inbox until somebody asks
    for a view, or places models, as of a moment when they have come.

    Args:
        agenda: of the simulation.
        report_every_s: period of reports and views.
        delay_s: one way between a location and the coordinator.
        half_life_s: of the popularity in the views.
        planner: places models; None where nobody does.
    """

    def __init__(
        self,
        *,
        agenda: EventQueue,
        report_every_s: float,
        delay_s: float,
        half_life_s: float,
        planner: Planner | None,
    ) -> None:
        # Silence means that nothing has changed, so nobody is ever taken for dead.
        self.state = CoordinatorState(
            epoch="simulated",
            rules=CoordinatorRules(half_life_s=half_life_s, stale_after_s=math.inf),
            whole_up_to=math.inf,
        )
        self._agenda = agenda
        self._report_every_s = report_every_s
        self._delay_s = delay_s
        #: Reports that were sent, and those of them that the coordinator has come to.
        self.sent = 0
        self.read = 0
        self._inbox: deque[tuple[float, WorkerReport, tuple[Demand, ...]]] = deque()
        self._popularity = LaggedPopularity(half_life_s)
        self._planner = planner
        self._rates_tick = -1
        self._rates: Mapping[str, Mapping[str, float]] = {}

    # Reports

    def changed(self, worker: Worker, now: float) -> None:
        """A worker has something new to say, and says so when it reports next."""
        next_s = (math.floor(now / self._report_every_s) + 1) * self._report_every_s
        self._agenda.at(next_s, self.report, worker)

    def report(self, worker: Worker, now: float) -> None:
        """A worker reports."""
        report, demand = worker.report()
        self.sent += 1
        self._inbox.append((now + self._delay_s, report, demand))

    # Views

    def tick(self, now: float) -> int:
        """The number of the last view that everybody has got by ``now``; negative before the first."""
        return math.floor((now - 2 * self._delay_s) / self._report_every_s - 0.5)

    def received_s(self, tick: int) -> float:
        """When readers have the view of that number."""
        return (tick + 0.5) * self._report_every_s + 2 * self._delay_s

    def view(self, epoch: str, version: int, tick: int) -> ViewDelta:
        """The view of that number, for a reader that knows ``version``; numbers never fall."""
        as_of_s = self._catch_up(tick)
        if tick != self._rates_tick:
            self._rates_tick, self._rates = tick, self._popularity.rates(as_of_s)
        delta = self.state.view(epoch, version, as_of_s)
        return ViewDelta(
            epoch=delta.epoch,
            version=delta.version,
            full=delta.full,
            workers=delta.workers,
            gone=delta.gone,
            rates=self._rates,
        )

    def plan(self, tick: int) -> tuple[Command, ...]:
        """A round of placement, with what the coordinator knows as of the view of that number."""
        as_of_s = self._catch_up(tick)
        return self._planner.plan(self.state.view("", 0, as_of_s).workers, as_of_s) if self._planner else ()

    def _catch_up(self, tick: int) -> float:
        as_of_s = self.received_s(tick) - self._delay_s
        inbox = self._inbox
        while inbox and inbox[0][0] <= as_of_s:
            came_s, report, demands = inbox.popleft()
            self.read += 1
            self.state.handle(report, came_s)
            if self._planner is not None:
                self._planner.hear(report.replica, demands, came_s)
            for demand in demands:
                self._popularity.add(demand, came_s)
        return as_of_s
