"""The coordinator in virtual time: reports reach it, and views and commands leave it, after their time on the way."""

from __future__ import annotations

import copy
import math
from collections import deque
from collections.abc import Iterator, Mapping

from serve_app.core.cluster.commands import Command
from serve_app.core.cluster.popularity import DecayedRate, Popularity
from serve_app.core.cluster.reports import ViewDelta
from serve_app.core.coordination.coordinator_state import CoordinatorState
from serve_app.core.coordination.events import Reader, WorkerReported
from serve_app.core.coordination.rules import CoordinatorRules, DeltaLimits
from serve_app.core.placement.rules import PlacementSettings
from serve_app.simulator.discrete_event.event_queue import EventQueue
from serve_app.simulator.discrete_event.worker import SimulatedWorker


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


class LaggedPopularity(Popularity):
    """``Popularity`` for the many readers of a simulation, each of which looks at few of the rates it is given.

    A live reader gets all rates as numbers. Here rates are computed when they are looked at, as of the moment when they
    were given: rates that readers may still look at are copied before they change. Nothing is forgotten, as a trace
    ends.
    """

    def __init__(self, half_life_s: float) -> None:
        super().__init__(half_life_s)
        self._lent: set[str] = set()
        self._given_s = -math.inf
        self._given: dict[str, Rates] = {}

    def add(self, location: str, model_id: str, count: int, now: float) -> None:
        """Count ``count`` requests for ``model_id`` that users of ``location`` sent."""
        self._given_s = -math.inf
        rates = self._rates.get(location, {})
        if location in self._lent or not rates:
            self._lent.discard(location)
            rates = self._rates[location] = dict(rates)
        known = rates.get(model_id)
        # Readers that were given the old one still look at it.
        rate = DecayedRate(self._half_life_s) if known is None else copy.copy(known)
        rate.add(now, count)
        rates[model_id] = rate

    def rates(self, now: float) -> Mapping[str, Mapping[str, float]]:
        """Requests per second of every model at every location, as of ``now``."""
        if now != self._given_s:
            self._lent.update(self._rates)
            self._given_s, self._given = now, {location: Rates(rates, now) for location, rates in self._rates.items()}
        return self._given

    def forget(self, now: float) -> None:
        """Keep everything."""


class SimulatedCoordinator:
    """The live coordinator's state machine, and the time that messages to and from it take.

    All messages take the same time, so the state machine itself may lag: reports lie in an inbox until a view or a
    round of placement is asked for, as of a moment when they have come. Views and rounds share their moments, which are
    those of the simulation; so the simulation asks for rounds of placement, which the live coordinator begins itself.

    Args:
        event_queue: of the simulation.
        report_every_s: period of reports and views.
        delay_s: from a location to the coordinator, or back.
        half_life_s: of the popularity in the views.
        placement: None: nothing is placed.

    Attributes:
        sent: number of reports that were sent.
        read: number of them that the state machine has taken in.
    """

    def __init__(
        self,
        *,
        event_queue: EventQueue,
        report_every_s: float,
        delay_s: float,
        half_life_s: float,
        placement: PlacementSettings | None,
    ) -> None:
        self._state = CoordinatorState(
            epoch="simulated",
            # A silent worker has nothing new to report, so no worker is ever taken for dead.
            rules=CoordinatorRules(half_life_s=half_life_s, stale_after_s=math.inf, placement=placement),
            limits=DeltaLimits(small_cluster=math.inf),
            popularity=LaggedPopularity(half_life_s),
        )
        self._event_queue = event_queue
        self._report_every_s = report_every_s
        self._delay_s = delay_s
        self.sent = 0
        self.read = 0
        self._inbox: deque[tuple[float, WorkerReported]] = deque()

    # Reports

    def changed(self, worker: SimulatedWorker, now: float) -> None:
        """Let a worker that has something new to report do so when its next report is due."""
        next_s = (math.floor(now / self._report_every_s) + 1) * self._report_every_s
        self._event_queue.at(next_s, self.report, worker)

    def report(self, worker: SimulatedWorker, now: float) -> None:
        """Send a worker's report."""
        report, demand = worker.report()
        self.sent += 1
        self._inbox.append((now + self._delay_s, WorkerReported(report, demand)))

    # Views

    def tick(self, now: float) -> int:
        """The number of the last view that has reached all readers by ``now``; negative before the first."""
        return math.floor((now - 2 * self._delay_s) / self._report_every_s - 0.5)

    def received_s(self, tick: int) -> float:
        """When readers have the view of that number."""
        return (tick + 0.5) * self._report_every_s + 2 * self._delay_s

    def view(self, epoch: str, version: int, tick: int) -> ViewDelta:
        """The view of that number, for a reader that knows ``version``; numbers never fall."""
        as_of_s = self._catch_up(tick)
        return self._state.delta(Reader(None, None, epoch, version), as_of_s)

    def plan(self, tick: int) -> tuple[Command, ...]:
        """A round of placement, with what the coordinator knows as of the view of that number."""
        return self._state.plan(self._catch_up(tick))

    def _catch_up(self, tick: int) -> float:
        as_of_s = self.received_s(tick) - self._delay_s
        inbox = self._inbox
        while inbox and inbox[0][0] <= as_of_s:
            came_s, reported = inbox.popleft()
            self.read += 1
            self._state.handle(reported, came_s)
        return as_of_s
