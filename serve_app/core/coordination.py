"""The coordinator's state machine: reports in, versioned view out. No I/O, no clock."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field

from serve_app.core.commands import Command
from serve_app.core.links import Link
from serve_app.core.placement_rules import PlacementRules
from serve_app.core.planning import Planner
from serve_app.core.popularity import Popularity
from serve_app.core.reports import ViewDelta, WorkerReport
from serve_app.core.routing import RoutingRules


@dataclass(frozen=True, slots=True, kw_only=True)
class PlacementSettings:
    """What a coordinator needs in order to place models.

    Attributes:
        routing: profiles and links.
        every_s: period of the rounds.
        payload_bytes: of a typical request.
        min_copies: models of which there must be several copies.
        rules: how eager to be.
    """

    routing: RoutingRules
    every_s: float
    payload_bytes: int
    min_copies: Mapping[str, int] = field(default_factory=dict)
    rules: PlacementRules = field(default_factory=PlacementRules)


@dataclass(frozen=True, slots=True, kw_only=True)
class CoordinatorRules:
    """How a coordinator works, as those who need it have been configured.

    Attributes:
        issued: grows with every configuration; the newest one counts.
        half_life_s: after how long a request counts half towards popularity.
        stale_after_s: after how long a silent replica is taken for dead.
        placement: None where nothing is to be placed.
    """

    issued: int = 0
    half_life_s: float
    stale_after_s: float
    placement: PlacementSettings | None = None


class CoordinatorState:
    """Knows every live worker's last report and how popular each model is at each location.

    | event                          | effect                                                          |
    |--------------------------------|-----------------------------------------------------------------|
    | first report of a replica      | it joins the directory                                          |
    | report with a higher sequence  | replaces the last one; its demand counts towards popularity     |
    | report with no higher sequence | ignored: it was overtaken on the way                            |
    | the first one that is leaving  | its models are ordered where they will be missed                |
    | no report for ``stale_after_s``| the replica leaves the directory                                |
    | measured links                 | replace what was known of these links                           |

    Rounds of placement take place when a report comes in and the last one is long enough ago. Their commands wait for
    the next report of the worker that they are for. A report of a worker that is leaving has its models placed at once.

    A coordinator that starts anew has an empty directory under a new ``epoch``; the next round of reports fills it.

    Args:
        epoch: differs for every life of the coordinator; readers drop what they knew when it changes.
        rules: how to work, until ``configure`` says otherwise.
    """

    #: Dead replicas that are remembered for readers that lag behind; whoever lags further reads everything anew.
    MAX_DEPARTED = 1000

    def __init__(self, *, epoch: str, rules: CoordinatorRules) -> None:
        self._epoch = epoch
        self._rules = rules
        self._popularity = Popularity(rules.half_life_s)
        self._planner = _planner(rules, None)
        self._planned_s: float | None = None
        self._commands: dict[str, list[Command]] = {}
        self._version = 0
        self._reports: dict[str, WorkerReport] = {}
        self._heard_s: dict[str, float] = {}
        self._changed: dict[str, int] = {}
        self._departed: dict[str, int] = {}
        self._complete_since = 0
        self._links: dict[tuple[str, str], Link] = {}
        self._links_changed: dict[tuple[str, str], int] = {}

    def configure(self, rules: CoordinatorRules, now: float) -> None:
        """Work by these rules from now on, if they are newer than those that are known."""
        if rules.issued <= self._rules.issued:
            return
        before, self._rules = self._rules, rules
        self._popularity.change(rules.half_life_s, now)
        if rules.placement != before.placement:
            self._planner = _planner(rules, self._planner)
            if self._planner is not None:
                self._planner.measured(self._links)
            self._commands.clear()

    def handle(self, report: WorkerReport, now: float) -> None:
        """Take in one worker's report (``now`` in seconds)."""
        self.expire(now)
        known = self._reports.get(report.replica)
        if known is not None and report.sequence <= known.sequence:
            return
        self._version += 1
        self._reports[report.replica] = dataclasses.replace(report, demand=())
        self._heard_s[report.replica] = now
        self._changed[report.replica] = self._version
        self._departed.pop(report.replica, None)
        for demand in report.demand:
            self._popularity.add(demand.location, demand.model_id, demand.count, now)
        self._plan(report, now)

    def answer(self, report: WorkerReport, epoch: str, version: int, now: float) -> ViewDelta:
        """Take in a worker's report; answer with what it does not know yet, and what it should do."""
        self.handle(report, now)
        return dataclasses.replace(
            self.view(epoch, version, now, report.location),
            commands=tuple(self._commands.pop(report.replica, ())),
            may_leave=self._planner is None or self._planner.may_leave(report.replica, self._reports, now),
        )

    def measured(self, links: Mapping[tuple[str, str], Link]) -> None:
        """A router has measured the ways from its location."""
        if links:
            self._version += 1
            self._links |= links
            self._links_changed |= dict.fromkeys(links, self._version)
            if self._planner is not None:
                self._planner.measured(links)

    def expire(self, now: float) -> None:
        """Drop the replicas that have been silent for too long."""
        for replica, heard_s in list(self._heard_s.items()):
            if now - heard_s > self._rules.stale_after_s:
                self.depart(replica)

    def depart(self, replica: str) -> None:
        """Drop a replica that is known to be gone; unknown ones are ignored."""
        if replica not in self._reports:
            return
        self._version += 1
        del self._reports[replica], self._heard_s[replica], self._changed[replica]
        self._commands.pop(replica, None)
        if self._planner is not None:
            self._planner.departed(replica)
        self._departed[replica] = self._version
        if len(self._departed) > self.MAX_DEPARTED:
            self._complete_since = self._departed.pop(next(iter(self._departed)))

    def _plan(self, report: WorkerReport, now: float) -> None:
        planner, settings = self._planner, self._rules.placement
        if planner is None or settings is None:
            return
        planner.hear(report.replica, report.demand, now)
        commands: tuple[Command, ...] = ()
        if report.leaving:
            commands = planner.hand_over(self._reports[report.replica], self._reports.values(), now)
        if self._planned_s is None:
            # Not before everybody who is there has had the time to say so: all copies would seem to be missing.
            self._planned_s = now + self._rules.stale_after_s - settings.every_s
        if now - self._planned_s >= settings.every_s:
            self._planned_s = now
            commands += planner.plan(self._reports.values(), now)
        for command in commands:
            self._commands.setdefault(command.replica, []).append(command)

    def view(self, epoch: str, version: int, now: float, location: str | None = None) -> ViewDelta:
        """What a reader of ``location`` that last saw ``version`` of ``epoch`` does not know yet."""
        self.expire(now)
        full = epoch != self._epoch or not self._complete_since <= version <= self._version
        since = -1 if full else version
        return ViewDelta(
            epoch=self._epoch,
            version=self._version,
            full=full,
            workers=tuple(self._reports[replica] for replica, changed in self._changed.items() if changed > since),
            gone=() if full else tuple(replica for replica, changed in self._departed.items() if changed > since),
            rates=self.rates(now),
            links={
                way: self._links[way]
                for way, changed in self._links_changed.items()
                if changed > since and way[0] == location
            },
        )

    def holders(self, model_id: str) -> tuple[str, ...]:
        """The live replicas that hold a model or are loading it."""
        return tuple(replica for replica, report in self._reports.items() if model_id in report.models)

    def holder_counts(self) -> dict[str, int]:
        """How many live replicas hold each model."""
        counts: dict[str, int] = {}
        for report in self._reports.values():
            for model_id in report.models:
                counts[model_id] = counts.get(model_id, 0) + 1
        return counts

    @property
    def links(self) -> Mapping[tuple[str, str], Link]:
        """Every way that has been measured."""
        return self._links

    def rates(self, now: float) -> dict[str, dict[str, float]]:
        """Requests per second of every model at every location."""
        return self._popularity.rates(now)


def _planner(rules: CoordinatorRules, before: Planner | None) -> Planner | None:
    settings = rules.placement
    if settings is None:
        return None
    return Planner(
        settings.routing,
        settings.rules,
        payload_bytes=settings.payload_bytes,
        min_copies=settings.min_copies,
        before=before,
    )
