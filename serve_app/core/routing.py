"""Where a request runs: the option with the least expected latency, later requests included."""

from __future__ import annotations

import enum
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import cached_property

from serve_app.core.cache import ModelState
from serve_app.core.catalog import ModelProfile
from serve_app.core.knowledge import Knowledge, View
from serve_app.core.reports import WorkerReport


class Outcome(enum.StrEnum):
    """How a request was served, as the user is told."""

    HIT = "hit"
    JOIN = "join"
    LOAD = "load"
    FORWARD = "forward"


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
    """

    profiles: Mapping[str, ModelProfile]
    links: Mapping[tuple[str, str], Link]
    default_link: Link
    horizon_s: float

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

    | option  | expected latency                                           | costs later requests                |
    |---------|------------------------------------------------------------|-------------------------------------|
    | hit     | queue + exec                                               | nothing                             |
    | join    | rest of the load + queue + exec                            | nothing                             |
    | load    | load + queue + exec                                        | the absence of the victims          |
    | forward | link + queue there + exec, + load there if nobody holds it | being forwarded as well             |

    What later requests pay is counted over ``rules.horizon_s`` at today's rates. Where no live worker is known, the
    request goes to its own location: Serve may have a replica that has not reported yet, or will have one soon.
    """
    workers = [report for report in known.workers() if report.replica not in errand.avoid]
    workers = [report for report in workers if report.capacity_bytes >= errand.model.size_bytes] or workers
    local = [report for report in workers if report.location == errand.here]
    options = [_plan_here(errand.model, report, known, rules) for report in local]
    best = min(options, key=lambda plan: plan.cost_s, default=None)
    if best is not None and best.outcome is Outcome.HIT and best.wait_s <= rules.least_rtt_s:
        return best
    if errand.may_forward or best is None:
        options += [_plan_there(errand, report, known, rules) for report in workers if report.location != errand.here]
    return min(options, key=lambda plan: plan.cost_s, default=_plan_blindly(errand))


def forward_costs(here: str, view: View, rules: RoutingRules) -> dict[str, float]:
    """Extra seconds of a small request forwarded to the nearest other holder, for every model that has one."""
    costs: dict[str, float] = {}
    for report in view.workers.values():
        if report.location == here:
            continue
        rtt_s = rules.link(here, report.location).rtt_s
        for model_id in report.models:
            costs[model_id] = min(rtt_s, costs.get(model_id, rtt_s))
    return costs


def _plan_here(model: ModelProfile, report: WorkerReport, known: Knowledge, rules: RoutingRules) -> Plan:
    wait_s, loss_s = known.queue_s(report), 0.0
    match known.state(report, model.model_id):
        case ModelState.READY:
            outcome = Outcome.HIT
        case ModelState.LOADING:
            outcome = Outcome.JOIN
            # A load seen under way is half done, on average.
            wait_s += load_s(model, report) / 2
        case None:
            outcome = Outcome.LOAD
            wait_s += load_s(model, report)
            loss_s = _victims_loss_s(model, report, known.view, rules)
    expected_s = wait_s + exec_s(model, report)
    return Plan(
        outcome=outcome,
        location=report.location,
        replica=report.replica,
        wait_s=wait_s,
        expected_s=expected_s,
        cost_s=expected_s + loss_s,
    )


def _plan_there(errand: Errand, report: WorkerReport, known: Knowledge, rules: RoutingRules) -> Plan:
    model = errand.model
    link_s = rules.link(errand.here, report.location).seconds(errand.payload_bytes)
    wait_s = link_s + known.queue_s(report)
    loss_s = rules.horizon_s * known.view.rate(errand.here, model.model_id) * link_s
    held = known.state(report, model.model_id) is not None
    if not held:
        wait_s += load_s(model, report)
        loss_s += _victims_loss_s(model, report, known.view, rules)
    expected_s = wait_s + exec_s(model, report)
    return Plan(
        outcome=Outcome.FORWARD,
        location=report.location,
        replica=report.replica,
        wait_s=wait_s,
        expected_s=expected_s,
        cost_s=expected_s + loss_s,
        must_hold=held,
    )


def _plan_blindly(errand: Errand) -> Plan:
    wait_s = errand.model.load_s
    return Plan(
        outcome=Outcome.LOAD,
        location=errand.here,
        replica=None,
        wait_s=wait_s,
        expected_s=wait_s + errand.model.exec_s,
        cost_s=float("inf"),
    )


def _victims_loss_s(model: ModelProfile, report: WorkerReport, view: View, rules: RoutingRules) -> float:
    """Seconds that later requests at ``report.location`` lose because ``model`` displaces others there."""
    missing_bytes = report.used_bytes + model.size_bytes - report.capacity_bytes
    if missing_bytes <= 0:
        return 0.0
    elsewhere_s = forward_costs(report.location, view, rules)
    losses: list[tuple[float, int]] = []
    for resident in report.models.values():
        profile = rules.profiles.get(resident.model_id)
        if resident.pinned or profile is None:
            continue
        again_s = load_s(profile, report)
        lost_s = min(again_s, elsewhere_s.get(resident.model_id, again_s))
        losses.append((view.rate(report.location, resident.model_id) * lost_s, resident.size_bytes))
    losses.sort(key=lambda loss: loss[0] / loss[1])
    lost_per_s = 0.0
    for per_s, size_bytes in losses:
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
