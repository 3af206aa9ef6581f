"""Where a request runs: the option with the least expected latency, later requests included."""

from __future__ import annotations

import enum
import math
from bisect import bisect_left
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from heapq import nsmallest
from itertools import accumulate
from operator import attrgetter, itemgetter
from typing import Protocol

from serve_app.core.answers import ModelState
from serve_app.core.catalog import ModelProfile
from serve_app.core.keepers import rank
from serve_app.core.knowledge import Knowledge, View
from serve_app.core.links import HERE, Link
from serve_app.core.reports import WorkerReport


class Outcome(enum.StrEnum):
    """How a request was served, as the user is told."""

    HIT = "hit"
    JOIN = "join"
    LOAD = "load"
    FORWARD = "forward"


#: What a request becomes at its own location, by the state of its model there.
_OUTCOMES_HERE = {ModelState.READY: Outcome.HIT, ModelState.LOADING: Outcome.JOIN, None: Outcome.LOAD}


class Ways(Protocol):
    """What is known of the ways between locations: as configured (``RoutingRules``), or as measured (``LinkTable``)."""

    def link(self, here: str, there: str) -> Link:
        """The way from one location to another, or within one."""


@dataclass(frozen=True, kw_only=True)
class RoutingRules:
    """What the choice depends on besides the state of the cluster.

    ``links`` are as configured, in either direction. ``horizon_s``: how far ahead today's popularity is trusted when a
    load is weighed against forwarding every time. ``staleness_s``: how old what is known of other locations may be; a
    shorter queue there counts only if it is shorter by more than that.
    """

    profiles: Mapping[str, ModelProfile]
    links: Mapping[tuple[str, str], Link]
    default_link: Link
    horizon_s: float
    staleness_s: float = 0.0

    def link(self, here: str, there: str) -> Link:
        """The link between two locations, in either direction; nothing within one."""
        if here == there:
            return HERE
        return self.links.get((here, there)) or self.links.get((there, here)) or self.default_link

    def with_links(self, measured: Mapping[tuple[str, str], Link]) -> RoutingRules:
        """These rules with links as they were measured, where they were."""
        return replace(self, links={**self.links, **measured})


class Forwarding(enum.StrEnum):
    """Whether a request may run at another location."""

    AUTO = "auto"
    #: Only where it was sent.
    NEVER = "never"
    #: Wherever the model is, if it is anywhere: loaded only if nobody has it.
    PREFER = "prefer"


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """One option: run on ``replica`` of ``location``, begin after ``wait_s`` and be done after ``expected_s`` seconds.

    ``cost_s`` ranks the options: the expected latency and what the choice costs later requests. ``must_hold`` is set
    where the option is worth taking only if the model is still there. ``preload`` names the replica here that should
    load the model in the background meanwhile.
    """

    outcome: Outcome
    location: str
    replica: str | None
    wait_s: float
    expected_s: float
    cost_s: float
    must_hold: bool = False
    preload: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Errand:
    """What is to be placed: a request for ``model`` by a user of ``here``.

    ``avoid`` names the replicas that have failed this very request already.
    """

    model: ModelProfile
    here: str
    payload_bytes: int = 0
    forwarding: Forwarding = Forwarding.AUTO
    avoid: Collection[str] = ()


def choose(errand: Errand, known: Knowledge, rules: RoutingRules, ways: Ways | None = None) -> Plan:
    """The best way to serve one request.

    | option                 | expected latency                | costs later requests                     |
    |------------------------|---------------------------------|------------------------------------------|
    | hit                    | queue + exec                    | nothing                                  |
    | join                   | rest of the load + queue + exec | nothing                                  |
    | load                   | load + queue + exec             | the absence of victims                   |
    | forward                | link + queue there + exec       | being forwarded as well                  |
    | forward now, load here | link + queue there + exec       | the absence of victims, and being        |
    | in the background      |                                 | forwarded until the model has come       |

    What later requests pay is counted over ``rules.horizon_s`` at today's rates; where the model can never fit, that
    is without end. Where a load is worth its time, it is done in the background if a holder answers sooner.

    Only holders are forwarded to, as long as a worker here can take the model without a queue that is clearly longer:
    a second copy elsewhere would displace others there. Where no live worker is known, the request goes to its own
    location: Serve may have a replica that has not reported yet, or will have one soon.

    Args:
        errand: the request.
        known: the cluster.
        rules: for the choice.
        ways: what is known of the ways; as configured by default.
    """
    return _Choice(errand, known, rules, ways or rules).best()


class _Option:
    """A plan in the making."""

    __slots__ = ("cost_s", "expected_s", "must_hold", "outcome", "report", "wait_s")

    def __init__(self, outcome: Outcome, report: WorkerReport, wait_s: float, expected_s: float, cost_s: float) -> None:
        self.outcome = outcome
        self.report = report
        self.wait_s = wait_s
        self.expected_s = expected_s
        self.cost_s = cost_s
        self.must_hold = False

    def plan(self, preload: str | None = None, cost_s: float | None = None) -> Plan:
        """As it is carried out."""
        return Plan(
            outcome=self.outcome,
            location=self.report.location,
            replica=self.report.replica,
            wait_s=self.wait_s,
            expected_s=self.expected_s,
            cost_s=self.cost_s if cost_s is None else cost_s,
            must_hold=self.must_hold,
            preload=preload,
        )


class _Choice:
    """One choice, with what every option of it needs."""

    __slots__ = ("_errand", "_known", "_local", "_model", "_rules", "_run_s", "_way_s", "_ways")

    #: Of more workers than ``MANY`` at other locations only ``LOOKED_AT`` are considered: the nearest holders; of those
    #: that would have to load the model, others for each model.
    MANY = 16
    LOOKED_AT = 4

    def __init__(self, errand: Errand, known: Knowledge, rules: RoutingRules, ways: Ways) -> None:
        self._errand = errand
        self._model = errand.model
        self._known = known
        self._rules = rules
        self._ways = ways
        here: Sequence[WorkerReport] = known.at(errand.here)
        if errand.avoid:
            here = [report for report in here if report.replica not in errand.avoid]
        self._run_s = max([exec_s(self._model, report) for report in here]) if here else 0.0
        self._way_s = ways.link(errand.here, errand.here).seconds(errand.payload_bytes) if here else 0.0
        #: The best that this location offers.
        self._local: _Option | None = None
        for report in here:
            option = self._here(report)
            if self._local is None or option.cost_s < self._local.cost_s:
                self._local = option

    def best(self) -> Plan:
        local, errand = self._local, self._errand
        if local is None:
            there = self._best_elsewhere()
            return _plan_blindly(errand) if there is None else there.plan()
        if errand.forwarding is Forwarding.NEVER or (
            local.outcome is Outcome.HIT and local.wait_s - self._way_s <= self._rules.staleness_s
        ):
            return local.plan()
        there = self._best_elsewhere()
        if there is None:
            return local.plan()
        prefer = errand.forwarding is Forwarding.PREFER and local.outcome is Outcome.LOAD
        if prefer or there.cost_s < local.cost_s:
            return there.plan()
        return self._in_background(local, there) if local.outcome is Outcome.LOAD else local.plan()

    def _here(self, report: WorkerReport) -> _Option:
        state = self._known.state(report, self._model.model_id)
        load_wait_s, loss_s = self._until_ready(state, report)
        wait_s = self._way_s + self._known.queue_s(report) + load_wait_s
        expected_s = wait_s + self._run_s
        return _Option(_OUTCOMES_HERE[state], report, wait_s, expected_s, expected_s + loss_s)

    def _best_elsewhere(self) -> _Option | None:
        """The best that other locations offer.

        Of those that would load the model, all are as good whose difference may be older than the news: if every router
        took the one that looked best, all would take the same. Instead each model has an order of its own.
        """
        options = self._elsewhere()
        if not options:
            return None
        best = min(options, key=_cost_s)
        if best.must_hold:
            return best
        limit_s = best.cost_s + self._rules.staleness_s
        alike = [option for option in options if not option.must_hold and option.cost_s <= limit_s]
        return min(alike, key=lambda option: rank(self._model.model_id, option.report.replica))

    def _elsewhere(self) -> list[_Option]:
        """What other locations offer; of those that do not hold the model, only to be rid of a long queue here."""
        errand, known, model_id = self._errand, self._known, self._model.model_id
        if errand.forwarding is Forwarding.NEVER:
            return []
        may_load = self._local is None or self._local.cost_s == math.inf
        if self._local is not None and errand.forwarding is Forwarding.AUTO:
            may_load = may_load or self._is_busy(self._local)
        there = [
            report
            for report in known.maybe_holding(model_id)
            if report.location != errand.here and report.replica not in errand.avoid
        ]
        if len(there) > self.MANY:
            there = nsmallest(
                self.LOOKED_AT, there, key=lambda report: self._ways.link(errand.here, report.location).rtt_s
            )
        options = [
            self._there(report, state) for report in there if (state := known.state(report, model_id)) is not None
        ]
        if may_load:
            options += [self._there(report, None) for report in self._others()]
        return options

    def _others(self) -> list[WorkerReport]:
        """Workers of other locations that would have to load the model; all of them if it cannot be loaded here."""
        errand, known, model_id = self._errand, self._known, self._model.model_id
        workers = known.workers()
        if len(workers) > self.MANY and self._local is not None and self._local.cost_s < math.inf:
            first = rank(model_id, errand.here) % len(workers)
            workers = [*workers[first:], *workers[:first]][: self.LOOKED_AT]
        return [
            report
            for report in workers
            if report.location != errand.here
            and report.replica not in errand.avoid
            and known.state(report, model_id) is None
        ]

    def _is_busy(self, local: _Option) -> bool:
        """Whether a request waits here clearly longer than it would if it were the only one."""
        others_s = self._known.queue_s(local.report)
        if local.outcome is Outcome.LOAD:
            others_s += load_s(self._model, local.report) * (self._turns(local.report) - 1)
        return others_s > self._rules.staleness_s

    def _there(self, report: WorkerReport, state: ModelState | None) -> _Option:
        errand, model, known, rules, local = self._errand, self._model, self._known, self._rules, self._local
        load_wait_s, loss_s = self._until_ready(state, report)
        queue_s, run_s = known.queue_s(report), exec_s(model, report)
        if local is not None:
            queue_here_s = known.queue_s(local.report)
            queue_s = _believed(queue_s, queue_here_s, queue_here_s - rules.staleness_s)
            # Execution times are noisy: only twice as fast is faster, and only if it was measured.
            measured = model.model_id in report.exec_s
            run_s = _believed(run_s, self._run_s, self._run_s / 2) if measured else self._run_s
        way_s = self._ways.link(errand.here, report.location).seconds(errand.payload_bytes)
        wait_s = way_s + queue_s + load_wait_s
        later_s = 0.0
        if local is None or local.outcome is Outcome.LOAD:
            rate = known.view.rate(errand.here, model.model_id)
            later_s = rules.horizon_s * rate * max(0.0, way_s - self._way_s)
        option = _Option(Outcome.FORWARD, report, wait_s, wait_s + run_s, wait_s + run_s + loss_s + later_s)
        option.must_hold = state is not None
        return option

    def _in_background(self, local: _Option, there: _Option) -> Plan:
        """``local``, a load worth its time; in the background if this request is answered sooner by a holder."""
        rate = self._known.view.rate(self._errand.here, self._model.model_id)
        # Requests that come before the load has ended are forwarded as well.
        meanwhile_s = rate * load_s(self._model, local.report) * (there.expected_s - self._run_s)
        if not there.must_hold or there.expected_s + meanwhile_s >= local.expected_s:
            return local.plan()
        return there.plan(local.report.replica, local.cost_s - local.expected_s + there.expected_s)

    def _until_ready(self, state: ModelState | None, report: WorkerReport) -> tuple[float, float]:
        """Seconds until the model is in memory there, and what later requests lose by its victims' absence."""
        if state is ModelState.READY:
            return 0.0, 0.0
        if state is ModelState.LOADING:
            # A load seen under way is half done, on average.
            return load_s(self._model, report) / 2, 0.0
        loss_s = _victims_loss_s(self._model, report, self._known, self._rules)
        return load_s(self._model, report) * self._turns(report), loss_s

    def _turns(self, report: WorkerReport) -> int:
        """How many loads, one after the other, it takes until a model that would be loaded there now has come."""
        return 1 + self._known.loading(report) // report.load_slots


def forward_costs(here: str, view: View, rules: RoutingRules) -> dict[str, float]:
    """Extra seconds of a small request forwarded to the nearest other holder, for every model that has one."""
    holders = [
        (rules.link(here, report.location).rtt_s, report.models)
        for report in view.workers.values()
        if report.location != here and not report.leaving
    ]
    costs: dict[str, float] = {}
    # The furthest first: whoever is nearer overwrites it, which is many times faster than to compare.
    for rtt_s, models in sorted(holders, key=lambda holder: -holder[0]):
        costs.update(dict.fromkeys(models, rtt_s))
    return costs


_cost_s = attrgetter("cost_s")


def _believed(there_s: float, here_s: float, threshold_s: float) -> float:
    """What is known from afar is better than what is here only if it is so by a clear margin.

    Otherwise all routers would send everything to whichever location looked best half a second ago.
    """
    return there_s if there_s < threshold_s else max(there_s, here_s)


def _plan_blindly(errand: Errand) -> Plan:
    wait_s = errand.model.load_s
    return Plan(
        outcome=Outcome.LOAD,
        location=errand.here,
        replica=None,
        wait_s=wait_s,
        expected_s=wait_s + errand.model.exec_s,
        cost_s=math.inf,
    )


def prepare(known: Knowledge, here: str, rules: RoutingRules) -> None:
    """Work out after news what the first choice of a location would have to: what its workers' models are worth.

    Only to be faster; a choice does not depend on it.
    """
    for report in known.at(here):
        _losses(report, known, rules)


class _Losses:
    """What is lost at one worker if so many bytes must go: the least worthy first."""

    __slots__ = ("_lost_per_s", "_until_bytes", "pinned_bytes", "report", "rules")

    def __init__(self, report: WorkerReport, known: Knowledge, rules: RoutingRules) -> None:
        self.report, self.rules = report, rules
        #: What no request can displace.
        self.pinned_bytes = sum([resident.size_bytes for resident in report.models.values() if resident.pinned])
        self._until_bytes: list[int] = []
        self._lost_per_s: list[float] = []
        rates = known.view.rates.get(report.location)
        if not rates:
            return
        losses: list[tuple[float, float, int]] = []
        for model_id, resident in report.models.items():
            profile = rules.profiles.get(model_id)
            if resident.pinned or profile is None:
                continue
            per_s = rates.get(model_id, 0.0)
            if per_s:
                again_s = load_s(profile, report)
                per_s *= min(again_s, _forward_s(model_id, report.location, known.view, rules, again_s))
            losses.append((per_s / resident.size_bytes, per_s, resident.size_bytes))
        losses.sort(key=itemgetter(0))
        self._until_bytes = list(accumulate(size_bytes for _, _, size_bytes in losses))
        self._lost_per_s = list(accumulate(per_s for _, per_s, _ in losses))

    def per_s(self, missing_bytes: int) -> float:
        """Seconds lost per second."""
        if not self._until_bytes:
            return 0.0
        return self._lost_per_s[min(bisect_left(self._until_bytes, missing_bytes), len(self._lost_per_s) - 1)]


def _losses(report: WorkerReport, known: Knowledge, rules: RoutingRules) -> _Losses:
    losses = known.worked_out.get(report.replica)
    if not isinstance(losses, _Losses) or losses.report is not report or losses.rules is not rules:
        losses = known.worked_out[report.replica] = _Losses(report, known, rules)
    return losses


def _forward_s(model_id: str, here: str, view: View, rules: RoutingRules, otherwise_s: float) -> float:
    """Extra seconds of a small request forwarded to the nearest holder at another location."""
    ways_s = [
        rules.link(here, report.location).rtt_s
        for report in map(view.workers.__getitem__, view.holders(model_id))
        if report.location != here and not report.leaving
    ]
    return min(ways_s, default=otherwise_s)


def _victims_loss_s(model: ModelProfile, report: WorkerReport, known: Knowledge, rules: RoutingRules) -> float:
    """Seconds that later requests at ``report.location`` lose because ``model`` displaces others there."""
    missing_bytes = report.used_bytes + report.unaccounted_bytes + model.size_bytes - report.capacity_bytes
    if missing_bytes <= 0:
        return 0.0
    losses = _losses(report, known, rules)
    resident = report.models.get(model.model_id)
    pinned_bytes = losses.pinned_bytes - (resident.size_bytes if resident is not None and resident.pinned else 0)
    if model.size_bytes > report.capacity_bytes - pinned_bytes:
        return math.inf
    return losses.per_s(missing_bytes) * rules.horizon_s


def exec_s(model: ModelProfile, report: WorkerReport) -> float:
    """Seconds of one inference there: measured, else from the profile."""
    return report.exec_s.get(model.model_id, model.exec_s)


def load_s(model: ModelProfile, report: WorkerReport) -> float:
    """Seconds of one load there: measured, else from the profile."""
    return report.load_s.get(model.model_id, model.load_s)
