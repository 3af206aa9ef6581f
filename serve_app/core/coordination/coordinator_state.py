"""The coordinator's state machine: reports in, versioned view out. No I/O, no clock."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from serve_app.core.cluster.commands import Command
from serve_app.core.cluster.directory import Directory
from serve_app.core.cluster.popularity import Popularity
from serve_app.core.cluster.reports import ViewDelta, WorkerChange, WorkerReport
from serve_app.core.coordination.rules import CoordinatorRules
from serve_app.core.coordination.subscription import Subscription
from serve_app.core.links import HERE, Link
from serve_app.core.placement.controller import Planner


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

    While there are few workers, every reader gets every report. Then a reader gets those of its own location, and of
    its ``Subscription`` what changes decisions: news do not grow with the cluster. One of no location is told of all.

    Args:
        epoch: differs for every life of the coordinator; readers drop what they knew when it changes.
        rules: how to work, until ``configure`` says otherwise.
        whole_up_to: so many workers are few.
    """

    #: What is few: everybody's whole reports are then not much more than what else a reader gets.
    WHOLE_UP_TO = 8
    #: How often a worker is told of others where there are many: it sends them no requests, as routers do.
    WORKERS_READ_EVERY_S = 2.0
    #: How often rates are told where there are many workers: of one location, and of all.
    RATES_EVERY_S = 2.0
    ALL_RATES_EVERY_S = 10.0

    #: Dead replicas that are remembered for readers that lag behind; whoever lags further reads everything anew.
    MAX_DEPARTED = 1000

    def __init__(self, *, epoch: str, rules: CoordinatorRules, whole_up_to: float = WHOLE_UP_TO) -> None:
        self._epoch = epoch
        self._whole_up_to = whole_up_to
        self._rules = rules
        self._popularity = Popularity(rules.half_life_s)
        self._planner = _planner(rules, None)
        self._planned_s: float | None = None
        self._commands: dict[str, list[Command]] = {}
        self._version = 0
        self._reports = Directory()
        #: Those heard longest ago first; the last departed last.
        self._heard_s: dict[str, float] = {}
        self._departed: dict[str, int] = {}
        self._complete_since = 0
        #: By location; empty while there are few workers.
        self._scopes: dict[str | None, Subscription] = {}
        self._links: dict[tuple[str, str], Link] = {}
        #: By location, the last ones last.
        self._links_changed: dict[str, dict[tuple[str, str], int]] = {}

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
        news = self._reports.hear(report, self._version)
        self._heard_s.pop(report.replica, None)
        self._heard_s[report.replica] = now
        self._departed.pop(report.replica, None)
        for model_id in news:
            if model_id in report.models:
                self._follow(report.location, model_id)
        for demand in report.demand:
            self._popularity.add(demand.location, demand.model_id, demand.count, now)
            self._follow(demand.location, demand.model_id)
        self._plan(report, now)

    def answer(self, report: WorkerReport, epoch: str, version: int, now: float) -> ViewDelta:
        """Take in a worker's report; answer with what it does not know yet, and what it should do."""
        self.handle(report, now)
        commands = tuple(self._commands.pop(report.replica, ()))
        may_leave = self._planner is None or self._planner.may_leave(report.replica, self._reports, now)
        if self._is_large():
            entry = self._reports.entries[report.replica]
            if epoch != self._epoch or entry.read_s is None or now - entry.read_s >= self.WORKERS_READ_EVERY_S:
                entry.read_s = now
                return self._scoped(epoch, version, now, report.location, report.replica, commands, may_leave)
            return ViewDelta(
                epoch=epoch,
                version=version,
                full=False,
                workers=(),
                gone=(),
                rates=None,
                scoped=True,
                commands=commands,
                may_leave=may_leave,
            )
        delta = self.view(epoch, version, now, report.location)
        return dataclasses.replace(delta, commands=commands, may_leave=may_leave)

    def measured(self, links: Mapping[tuple[str, str], Link]) -> None:
        """A router has measured the ways from its location."""
        if links:
            self._version += 1
            self._links |= links
            for way in links:
                changed = self._links_changed.setdefault(way[0], {})
                changed.pop(way, None)
                changed[way] = self._version
            if self._planner is not None:
                self._planner.measured(links)

    def expire(self, now: float) -> None:
        """Drop the replicas that have been silent for too long."""
        while self._heard_s:
            replica, heard_s = next(iter(self._heard_s.items()))
            if now - heard_s <= self._rules.stale_after_s:
                return
            self.depart(replica)

    def depart(self, replica: str) -> None:
        """Drop a replica that is known to be gone; unknown ones are ignored."""
        if replica not in self._reports:
            return
        self._version += 1
        self._reports.depart(replica)
        del self._heard_s[replica]
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
        if self._is_large():
            return self._scoped(epoch, version, now, location)
        full = epoch != self._epoch or not self._complete_since <= version <= self._version
        since = -1 if full else version
        return ViewDelta(
            epoch=self._epoch,
            version=self._version,
            full=full,
            workers=tuple(entry.plain() for entry in self._reports.entries.values() if entry.changed > since),
            gone=() if full else self._gone(since),
            rates=self.rates(now),
            links=self._new_links(location, since),
        )

    def everything(self, now: float) -> ViewDelta:
        """Every report and all rates, whoever asks; for a reader that keeps nothing."""
        self.expire(now)
        return ViewDelta(
            epoch=self._epoch,
            version=self._version,
            full=True,
            workers=tuple(entry.plain() for entry in self._reports.entries.values()),
            gone=(),
            rates=self.rates(now),
        )

    @property
    def rated(self) -> int:
        """Of how many pairs of location and model there are rates."""
        return self._popularity.pairs

    def _is_large(self) -> bool:
        """Whether news are by scope; who has read them the other way reads everything anew."""
        is_large = len(self._reports) > self._whole_up_to
        if not is_large and self._scopes:
            self._scopes.clear()
            self._version += 1
            self._complete_since = self._version
        return is_large

    def _scoped(
        self,
        epoch: str,
        version: int,
        now: float,
        location: str | None,
        replica: str | None = None,
        commands: tuple[Command, ...] = (),
        may_leave: bool = True,
    ) -> ViewDelta:
        """What a reader of ``location`` does not know yet of what matters there; ``replica``: it is this worker."""
        scope = self._scope(location, now, rates=replica is None)
        full = epoch != self._epoch or not max(self._complete_since, scope.complete_since) <= version <= self._version
        since = -1 if full else version
        workers, changes = self._news(scope, location, replica, since)
        return ViewDelta(
            epoch=self._epoch,
            version=self._version,
            full=full,
            scoped=True,
            workers=tuple(workers),
            changes=tuple(changes),
            gone=() if full else self._gone(since),
            beyond=() if full else scope.beyond(since),
            # Workers decide nothing by them.
            rates=scope.rates if replica is None and scope.rates_at > since else None,
            links=self._new_links(location, since),
            commands=commands,
            may_leave=may_leave,
        )

    def _news(
        self, scope: Subscription, location: str | None, reader: str | None, since: int
    ) -> tuple[list[WorkerReport], list[WorkerChange]]:
        entries = self._reports.entries
        if location is None:
            told = [entry for entry in entries.values() if entry.told_at > since]
            return (
                [entry.summary(None) for entry in told if entry.whole_at > since],
                [entry.change(since) for entry in told if entry.whole_at <= since],
            )
        own = [entries[replica] for replica in self._reports.at(location) if replica != reader]
        workers = [entry.plain() for entry in own if entry.changed > since]
        names = scope.models
        joined = scope.joined(since)
        workers += [entries[replica].summary(names) for replica in joined if replica in entries]
        changes: list[WorkerChange] = []
        for entry in scope.told(since):
            if entry.whole_at > since:
                if entry.report.replica not in joined:
                    workers.append(entry.summary(names))
            elif not joined or entry.report.replica not in joined:
                changes.append(entry.change(since))
        # Of those who were peers before anybody here asked for this.
        for model_id in scope.new_models(since):
            for replica in scope.peers.keys() & self._reports.holders(model_id):
                entry = entries[replica]
                if max(scope.peers[replica], entry.whole_at) <= since:
                    changes.append(entry.of(model_id))
        return workers, changes

    def _scope(self, location: str | None, now: float, *, rates: bool) -> Subscription:
        scope = self._scopes.get(location)
        if scope is None:
            self._version += 1
            scope = self._scopes[location] = Subscription(location or "", self._reports, self._version)
            if location is not None:
                held = [
                    model_id for replica in self._reports.at(location) for model_id in self._reports[replica].models
                ]
                for model_id in (*self._popularity.rates_of(location, now), *held):
                    scope.follow(model_id, self._version, self._way_s)
        if location is not None and scope.look(self._version + 1, now, self._way_s):
            self._version += 1
        every_s = self.ALL_RATES_EVERY_S if location is None else self.RATES_EVERY_S
        if rates and (scope.rated_s is None or now - scope.rated_s >= every_s):
            self._version += 1
            scope.rated_s, scope.rates_at = now, self._version
            scope.rates = self.rates(now) if location is None else {location: self._popularity.rates_of(location, now)}
        return scope

    def _follow(self, location: str, model_id: str) -> None:
        scope = self._scopes.get(location)
        if scope is not None:
            scope.follow(model_id, self._version, self._way_s)

    def _way_s(self, here: str, there: str) -> float:
        link = self._links.get((here, there))
        if link is None:
            placement = self._rules.placement
            link = HERE if placement is None else placement.routing.link(here, there)
        return link.rtt_s

    def _gone(self, since: int) -> tuple[str, ...]:
        gone = []
        for replica, version in reversed(self._departed.items()):
            if version <= since:
                break
            gone.append(replica)
        return tuple(reversed(gone))

    def _new_links(self, location: str | None, since: int) -> dict[tuple[str, str], Link]:
        links: dict[tuple[str, str], Link] = {}
        if location is not None:
            for way, changed in reversed(self._links_changed.get(location, {}).items()):
                if changed <= since:
                    break
                links[way] = self._links[way]
        return links

    def holders(self, model_id: str) -> tuple[str, ...]:
        """The live replicas that hold a model or are loading it."""
        return tuple(self._reports.holders(model_id))

    def holder_counts(self) -> dict[str, int]:
        """How many live replicas hold each model."""
        return {model_id: len(self._reports.holders(model_id)) for model_id in self._reports.held()}

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
