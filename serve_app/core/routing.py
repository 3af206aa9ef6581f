"""Where a request runs: the option with the least expected latency, later requests included."""

from __future__ import annotations

import enum
import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import cached_property
from operator import itemgetter

from serve_app.core.answers import ModelState
from serve_app.core.catalog import ModelProfile
from serve_app.core.knowledge import Knowledge, View
from serve_app.core.reports import WorkerReport


class Outcome(enum.StrEnum):
    """How a request was served, as the user is told."""

    HIT = "hit"
    JOIN = "join"
    LOAD = "load"
    FORWARD = "forward"


#: What a request becomes at its own location, by the state of its model there.
_OUTCOMES_HERE = {ModelState.READY: Outcome.HIT, ModelState.LOADING: Outcome.JOIN, None: Outcome.LOAD}


@dataclass(frozen=True, slots=True, kw_only=True)
class Link:
    """The way from one location to another: round trip in seconds, bandwidth in bytes per second."""

    rtt_s: float
    bytes_per_s: float

    def seconds(self, payload_bytes: int) -> float:
        """Extra time of a request with ``payload_bytes`` over this link."""
        return self.rtt_s + payload_bytes / self.bytes_per_s


@dataclass(frozen=True, kw_only=True)
class RoutingRules:
    """What the choice depends on besides the state of the cluster.

    ``horizon_s``: how far ahead today's popularity is trusted when a load is weighed against forwarding every time.
    ``staleness_s``: how old what is known of other locations may be; a shorter queue there counts only if it is
    shorter by more than that.
    """

    profiles: Mapping[str, ModelProfile]
    links: Mapping[tuple[str, str], Link]
    default_link: Link
    horizon_s: float
    staleness_s: float = 0.0

    def link(self, here: str, there: str) -> Link:
        """The link between two locations, in either direction."""
        return self.links.get((here, there)) or self.links.get((there, here)) or self.default_link

    @cached_property
    def least_rtt_s(self) -> float:
        """No forward can be faster than this."""
        return min([self.default_link.rtt_s, *(link.rtt_s for link in self.links.values())])


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """One option: run on ``replica`` of ``location``, begin after ``wait_s`` and be done after ``expected_s`` seconds.

    ``cost_s`` ranks the options: the expected latency and what the choice costs later requests. ``must_hold`` is set
    where the option is worth taking only if the model is still there.
    """

    outcome: Outcome
    location: str
    replica: str | None
    wait_s: float
    expected_s: float
    cost_s: float
    must_hold: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Errand:
    """What is to be placed: a request for ``model`` by a user of ``here``.

    ``avoid`` names the replicas that have failed this very request already.
    """

    model: ModelProfile
    here: str
    payload_bytes: int = 0
    may_forward: bool = True
    avoid: Collection[str] = ()


def choose(errand: Errand, known: Knowledge, rules: RoutingRules) -> Plan:
    """The best way to serve one request.

    | option  | expected latency                | costs later requests    |
    |---------|---------------------------------|-------------------------|
    | hit     | queue + exec                    | nothing                 |
    | join    | rest of the load + queue + exec | nothing                 |
    | load    | load + queue + exec             | the absence of victims  |
    | forward | link + queue there + exec       | being forwarded as well |

    What later requests pay is counted over ``rules.horizon_s`` at today's rates; where the model can never fit, that
    is without end. Only holders are forwarded to, as long as a worker here can take the model: a second copy elsewhere
    would displace others there. Where no live worker is known, the request goes to its own location: Serve may have a
    replica that has not reported yet, or will have one soon.
    """
    workers = [report for report in known.workers() if report.replica not in errand.avoid]
    here = [report for report in workers if report.location == errand.here]
    run_s = max((exec_s(errand.model, report) for report in here), default=None)
    best, local = min(
        ((_plan_here(errand.model, run_s, report, known, rules), report) for report in here if run_s is not None),
        key=lambda option: option[0].cost_s,
        default=(None, None),
    )
    if best is not None and best.outcome is Outcome.HIT and best.wait_s <= rules.least_rtt_s + rules.staleness_s:
        return best
    options = [best] if best is not None else []
    if errand.may_forward:
        must_hold = best is not None and best.cost_s < math.inf
        options += [
            _plan_there(errand, report, local, run_s, known, rules)
            for report in workers
            if report.location != errand.here and not (must_hold and known.state(report, errand.model.model_id) is None)
        ]
    return min(options, key=lambda plan: plan.cost_s, default=_plan_blindly(errand))


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


def _plan_here(model: ModelProfile, run_s: float, report: WorkerReport, known: Knowledge, rules: RoutingRules) -> Plan:
    state = known.state(report, model.model_id)
    load_wait_s, loss_s = _until_ready(state, model, report, known, rules)
    wait_s = known.queue_s(report) + load_wait_s
    expected_s = wait_s + run_s
    return Plan(
        outcome=_OUTCOMES_HERE[state],
        location=report.location,
        replica=report.replica,
        wait_s=wait_s,
        expected_s=expected_s,
        cost_s=expected_s + loss_s,
    )


def _plan_there(
    errand: Errand,
    report: WorkerReport,
    local: WorkerReport | None,
    run_here_s: float | None,
    known: Knowledge,
    rules: RoutingRules,
) -> Plan:
    model = errand.model
    state = known.state(report, model.model_id)
    load_wait_s, loss_s = _until_ready(state, model, report, known, rules)
    queue_s, run_s = known.queue_s(report), exec_s(model, report)
    if local is not None and run_here_s is not None:
        queue_here_s = known.queue_s(local)
        queue_s = _believed(queue_s, queue_here_s, queue_here_s - rules.staleness_s)
        # Execution times are noisy: only twice as fast is faster, and only if it was measured.
        measured = model.model_id in report.exec_s
        run_s = _believed(run_s, run_here_s, run_here_s / 2) if measured else run_here_s
    link_s = rules.link(errand.here, report.location).seconds(errand.payload_bytes)
    wait_s = link_s + queue_s + load_wait_s
    later_s = rules.horizon_s * known.view.rate(errand.here, model.model_id) * link_s
    return Plan(
        outcome=Outcome.FORWARD,
        location=report.location,
        replica=report.replica,
        wait_s=wait_s,
        expected_s=wait_s + run_s,
        cost_s=wait_s + run_s + loss_s + later_s,
        must_hold=state is not None,
    )


def _believed(there_s: float, here_s: float, threshold_s: float) -> float:
    """What is known from afar is better than what is here only if it is so by a clear margin.

    Otherwise all routers would send everything to whichever location looked best half a second ago.
    """
    return there_s if there_s < threshold_s else max(there_s, here_s)


def _until_ready(
    state: ModelState | None, model: ModelProfile, report: WorkerReport, known: Knowledge, rules: RoutingRules
) -> tuple[float, float]:
    """Seconds until the model is in memory there, and seconds that later requests lose by its victims' absence."""
    match state:
        case ModelState.READY:
            return 0.0, 0.0
        case ModelState.LOADING:
            # A load seen under way is half done, on average.
            return load_s(model, report) / 2, 0.0
        case None:
            return load_s(model, report), _victims_loss_s(model, report, known.view, rules)


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


def _victims_loss_s(model: ModelProfile, report: WorkerReport, view: View, rules: RoutingRules) -> float:
    """Seconds that later requests at ``report.location`` lose because ``model`` displaces others there."""
    missing_bytes = report.used_bytes + model.size_bytes - report.capacity_bytes
    if missing_bytes <= 0:
        return 0.0
    if not report.can_hold(model):
        return math.inf
    elsewhere_s = forward_costs(report.location, view, rules)
    rates: Mapping[str, float] = view.rates.get(report.location, {})
    losses: list[tuple[float, float, int]] = []
    # The longest loop of a choice: what is rarely asked for is most of what is resident.
    for model_id, resident in report.models.items():
        profile = rules.profiles.get(model_id)
        if resident.pinned or profile is None:
            continue
        per_s = rates.get(model_id, 0.0)
        if per_s:
            again_s = load_s(profile, report)
            per_s *= min(again_s, elsewhere_s.get(model_id, again_s))
        losses.append((per_s / resident.size_bytes, per_s, resident.size_bytes))
    losses.sort(key=itemgetter(0))
    lost_per_s = 0.0
    for _, per_s, size_bytes in losses:
        if missing_bytes <= 0:
            break
        lost_per_s += per_s
        missing_bytes -= size_bytes
    return lost_per_s * rules.horizon_s


def exec_s(model: ModelProfile, report: WorkerReport) -> float:
    """Seconds of one inference there: measured, else from the profile."""
    return report.exec_s.get(model.model_id, model.exec_s)


def load_s(model: ModelProfile, report: WorkerReport) -> float:
    """Seconds of one load there: measured, else from the profile."""
    return report.load_s.get(model.model_id, model.load_s)
