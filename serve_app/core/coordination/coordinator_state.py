"""The coordinator's state machine: events in, versioned deltas out. No I/O, no clock.

``CoordinatorState`` is longer than other classes: its events and reads share one version and nearly all its fields.
Directory, subscriptions, links, popularity and placement are classes of their own.
"""

from __future__ import annotations

from collections.abc import Mapping

from serve_app.core.cluster.commands import Command
from serve_app.core.cluster.directory import Directory
from serve_app.core.cluster.popularity import Popularity
from serve_app.core.cluster.reports import Demand, ViewDelta, WorkerReport
from serve_app.core.coordination.change_log import ChangeLog, MeasuredLinks
from serve_app.core.coordination.events import (
    Event,
    LinksMeasured,
    Reader,
    ReaderSeen,
    RulesChanged,
    TimePassed,
    WorkerLeft,
    WorkerReported,
)
from serve_app.core.coordination.placement_schedule import PlacementSchedule
from serve_app.core.coordination.rules import CoordinatorRules, DeltaLimits
from serve_app.core.coordination.subscription import Subscription
from serve_app.core.links import HERE, Link

_DEFAULT_LIMITS = DeltaLimits()


class CoordinatorState:
    """The last report of every live worker, the popularity of models at each location, and the readers' subscriptions.

    ``handle`` alone changes the state; ``delta`` and ``snapshot`` only read it.

    | event                               | effect                                                             |
    |-------------------------------------|--------------------------------------------------------------------|
    | any                                 | replicas without a report for ``stale_after_s`` leave the directory |
    | ``WorkerReported``, first           | the replica joins the directory                                    |
    | with a higher sequence              | replaces the last report; its demand counts                        |
    | with no higher sequence             | ignored: it was overtaken on the way                               |
    | the first one that is leaving       | its models are ordered where they will be missing                  |
    | the last round is long enough ago   | a round of placement                                               |
    | ``WorkerLeft``                      | the replica leaves the directory                                   |
    | ``LinksMeasured``                   | the links replace what was known of them                           |
    | ``ReaderSeen``                      | in a large cluster, the reader's subscription is brought up to date |
    | ``RulesChanged``                    | newer rules replace the present ones                               |
    | the cluster becomes large or small  | deltas become partial, or whole again                              |

    Commands wait for the next report of their worker. A new coordinator has an empty directory under a new ``epoch``,
    which the next round of reports fills.

    In a small cluster every reader gets every report. In a large one a reader gets the reports of its own location, and
    of the workers in the location's ``Subscription`` what changes decisions: so deltas do not grow with the cluster.

    All changes that one event makes get the same version, one above the last.

    Args:
        epoch: differs for every life of the coordinator; readers drop what they knew when it changes.
        rules: until newer ones come.
        limits: of the deltas.
        popularity: what counts the demand that routers see; None: a ``Popularity``.
    """

    def __init__(
        self,
        *,
        epoch: str,
        rules: CoordinatorRules,
        limits: DeltaLimits = _DEFAULT_LIMITS,
        popularity: Popularity | None = None,
    ) -> None:
        self._epoch = epoch
        self._rules = rules
        self._limits = limits
        self._version = 0
        self._directory = Directory(limits.changes)
        #: When each replica reported last, longest ago first.
        self._reported_s: dict[str, float] = {}
        self._departed: ChangeLog[str] = ChangeLog()
        #: Readers with an older version get everything.
        self._oldest_delta_version = 0
        self._is_large = False
        #: By location; only in a large cluster.
        self._subscriptions: dict[str | None, Subscription] = {}
        self._links = MeasuredLinks()
        self._popularity = Popularity(rules.half_life_s) if popularity is None else popularity
        self._forget_s = 0.0
        self._placement = PlacementSchedule(rules)

    # Events

    def handle(self, event: Event, now: float) -> None:
        """Take in an event.

        Args:
            event: what has happened.
            now: seconds; never runs backwards.
        """
        version = self._version + 1
        has_changed = self._expire(now, version)
        match event:
            case WorkerReported():
                has_changed |= self._record(event, now, version)
            case ReaderSeen():
                has_changed |= self._subscribe(event.reader, now, version)
            case LinksMeasured(links=links):
                has_changed |= self._update_links(links, version)
            case WorkerLeft(replica=replica):
                has_changed |= self._deregister(replica, version)
            case RulesChanged(rules=rules):
                self._configure(rules, now)
            case TimePassed():
                pass
        if has_changed:
            self._version = version
        if now >= self._forget_s:
            self._forget_s = now + self._rules.half_life_s
            self._popularity.forget(now)

    def exchange(self, report: WorkerReport, epoch: str, version: int, now: float) -> ViewDelta:
        """Take in a worker's report and answer it: the event and the read of every report."""
        reader = Reader(report.location, report.replica, epoch, version)
        self.handle(WorkerReported(report, None, reader), now)
        return self.delta(reader, now)

    def _record(self, event: WorkerReported, now: float, version: int) -> bool:
        report = event.report
        known = self._directory.workers.get(report.replica)
        has_changed = known is None or report.sequence > known.sequence
        if has_changed:
            demands = report.demand if event.demand is None else event.demand
            self._take_in(report, demands, known is None, now, version)
        self._placement.release(report.replica)
        if event.reader is not None:
            has_changed |= self._subscribe(event.reader, now, version)
        return has_changed

    def _take_in(
        self, report: WorkerReport, demands: tuple[Demand, ...], is_new: bool, now: float, version: int
    ) -> None:
        replica, reported_s, subscriptions = report.replica, self._reported_s, self._subscriptions
        touched = self._directory.record(report, version)
        if is_new:
            self._departed.pop(replica, None)
            self._update_mode(version)
        else:
            del reported_s[replica]
        reported_s[replica] = now
        if touched and (subscription := subscriptions.get(report.location)) is not None:
            for model_id in touched:
                if model_id in report.models:
                    subscription.request(model_id, version)
        add = self._popularity.add
        for demand in demands:
            add(demand.location, demand.model_id, demand.count, now)
            if (subscription := subscriptions.get(demand.location)) is not None:
                subscription.request(demand.model_id, version)
        self._placement.record(report, demands, self._directory.workers, now)

    def _subscribe(self, reader: Reader, now: float, version: int) -> bool:
        if not self._is_large:
            return False
        location = reader.location
        subscription = self._subscriptions.get(location)
        is_new = subscription is None
        if subscription is None:
            subscription = self._subscriptions[location] = Subscription(
                location, self._directory, self._limits, self._rtt_s, version
            )
        has_changed = is_new
        if reader.replica is not None and not subscription.admit(
            reader.replica, now, knows_nothing=reader.epoch != self._epoch
        ):
            return has_changed
        if is_new and location is not None:
            workers = self._directory.workers
            held = [
                model_id for replica in self._directory.replicas_at(location) for model_id in workers[replica].models
            ]
            for model_id in (*self._popularity.rates_of(location, now), *held):
                subscription.request(model_id, version)
        has_changed |= subscription.refresh_nearest(version, now)
        if reader.replica is None and subscription.are_rates_due(now):
            popularity = self._popularity
            rates = popularity.rates(now) if location is None else {location: popularity.rates_of(location, now)}
            subscription.set_rates(rates, version, now)
            has_changed = True
        return has_changed

    def _update_links(self, links: Mapping[tuple[str, str], Link], version: int) -> bool:
        if not links:
            return False
        self._links.update(links, version)
        self._placement.update_links(links)
        return True

    def _expire(self, now: float, version: int) -> bool:
        has_changed = False
        while self._reported_s:
            replica, reported_s = next(iter(self._reported_s.items()))
            if now - reported_s <= self._rules.stale_after_s:
                break
            has_changed |= self._deregister(replica, version)
        return has_changed

    def _deregister(self, replica: str, version: int) -> bool:
        report = self._directory.workers.get(replica)
        if report is None:
            return False
        self._directory.deregister(replica)
        del self._reported_s[replica]
        self._placement.deregister(replica)
        if (subscription := self._subscriptions.get(report.location)) is not None:
            subscription.deregister(replica)
        self._departed.add(replica, version)
        self._oldest_delta_version = max(self._oldest_delta_version, self._departed.trim(self._limits.departed))
        self._update_mode(version)
        return True

    def _update_mode(self, version: int) -> None:
        """Go between whole and partial deltas; a reader of partial ones begins again once they are whole."""
        is_large = len(self._directory.workers) > self._limits.small_cluster
        if self._is_large and not is_large:
            self._subscriptions.clear()
            self._oldest_delta_version = version
        self._is_large = is_large

    def _configure(self, rules: CoordinatorRules, now: float) -> None:
        if rules.issued <= self._rules.issued:
            return
        self._rules = rules
        self._popularity.change(rules.half_life_s, now)
        self._placement.configure(rules, self._links.links)

    def plan(self, now: float) -> tuple[Command, ...]:
        """Run a round of placement now, beside those that reports bring about; the caller delivers the commands."""
        return self._placement.plan(self._directory.workers, now)

    # Reads

    def delta(self, reader: Reader, now: float) -> ViewDelta:
        """What a reader does not know yet; a reader without a subscription gets all workers.

        Args:
            reader: with the version that it has.
            now: seconds; rates are as of then.
        """
        replica, workers = reader.replica, self._directory.workers
        commands: tuple[Command, ...] = ()
        may_leave = True
        if replica is not None:
            commands = self._placement.due(replica)
            if replica in workers and workers[replica].leaving:
                may_leave = self._placement.may_leave(replica, workers, now)
        subscription = self._subscriptions.get(reader.location)
        if subscription is not None:
            return self._partial(reader, subscription, commands, may_leave)
        full = self._is_outdated(reader, self._oldest_delta_version)
        since = -1 if full else reader.version
        return ViewDelta(
            epoch=self._epoch,
            version=self._version,
            full=full,
            workers=tuple(
                [entry.without_demand() for entry in self._directory.entries.values() if entry.reported_version > since]
            ),
            gone=() if full else self._gone(since),
            rates=self._popularity.rates(now),
            links=self._links.since(reader.location, since),
            commands=commands,
            may_leave=may_leave,
        )

    def _partial(
        self, reader: Reader, subscription: Subscription, commands: tuple[Command, ...], may_leave: bool
    ) -> ViewDelta:
        replica = reader.replica
        if replica is not None and not subscription.is_reading(replica):
            return ViewDelta(
                epoch=reader.epoch,
                version=reader.version,
                full=False,
                partial=True,
                workers=(),
                gone=(),
                rates=None,
                commands=commands,
                may_leave=may_leave,
            )
        full = self._is_outdated(reader, max(self._oldest_delta_version, subscription.oldest_delta_version))
        since = -1 if full else reader.version
        workers, changes = subscription.workers_and_changes(replica, since)
        return ViewDelta(
            epoch=self._epoch,
            version=self._version,
            full=full,
            partial=True,
            workers=tuple(workers),
            changes=tuple(changes),
            gone=() if full else self._gone(since),
            unsubscribed=() if full else subscription.unsubscribed(since),
            # Workers decide nothing by rates.
            rates=subscription.rates if replica is None and subscription.rates_version > since else None,
            links=self._links.since(reader.location, since),
            commands=commands,
            may_leave=may_leave,
        )

    def snapshot(self, now: float) -> ViewDelta:
        """Every report and all rates, for a reader that keeps nothing."""
        return ViewDelta(
            epoch=self._epoch,
            version=self._version,
            full=True,
            workers=tuple(entry.without_demand() for entry in self._directory.entries.values()),
            gone=(),
            rates=self._popularity.rates(now),
        )

    def rates(self, now: float) -> Mapping[str, Mapping[str, float]]:
        """Requests per second of every model at every location."""
        return self._popularity.rates(now)

    @property
    def pairs(self) -> int:
        """Number of pairs of location and model with a rate."""
        return self._popularity.pairs

    @property
    def directory(self) -> Directory:
        """The last report of every live worker; to be read only."""
        return self._directory

    def subscription(self, location: str | None) -> Subscription | None:
        """The subscription of a location, if there is one; to be read only."""
        return self._subscriptions.get(location)

    @property
    def links(self) -> Mapping[tuple[str, str], Link]:
        """Every link that has been measured."""
        return self._links.links

    def _is_outdated(self, reader: Reader, oldest_version: int) -> bool:
        return reader.epoch != self._epoch or not oldest_version <= reader.version <= self._version

    def _rtt_s(self, here: str, there: str) -> float:
        link = self._links.links.get((here, there))
        if link is None:
            placement = self._rules.placement
            link = HERE if placement is None else placement.routing.link(here, there)
        return link.rtt_s

    def _gone(self, since: int) -> tuple[str, ...]:
        return tuple(reversed(self._departed.since(since)))
