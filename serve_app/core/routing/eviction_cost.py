"""What later requests lose by the absence of models that others displace."""

from __future__ import annotations

import math
from bisect import bisect_left
from itertools import accumulate
from operator import itemgetter

from serve_app.core.catalog import ModelProfile
from serve_app.core.cluster.cluster_view import ClusterView
from serve_app.core.cluster.reports import WorkerReport
from serve_app.core.links import Topology
from serve_app.core.routing.router_view import RouterView
from serve_app.core.routing.rules import RoutingRules


def exec_s(model: ModelProfile, report: WorkerReport) -> float:
    """Seconds of one inference there: measured, else from the profile."""
    return report.exec_s.get(model.model_id, model.exec_s)


def load_s(model: ModelProfile, report: WorkerReport) -> float:
    """Seconds of one load there: measured, else from the profile."""
    return report.load_s.get(model.model_id, model.load_s)


def forward_costs(here: str, view: ClusterView, rules: RoutingRules) -> dict[str, float]:
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


def prepare(known: RouterView, here: str, rules: RoutingRules, ways: Topology) -> None:
    """Work out what the next choice of a location would have to: who is near, and what its own models are worth.

    A choice does not need it, but is faster, and goes by the ways as they were measured until now.
    """
    known.look_around(here, ways)
    for report in known.at(here):
        known.unevictable_bytes(report)
        _losses(report, known, rules, ways)


def victims_loss_s(
    model: ModelProfile, report: WorkerReport, known: RouterView, rules: RoutingRules, ways: Topology
) -> float:
    """Seconds that later requests at ``report.location`` lose because ``model`` displaces others there.

    Args:
        model: what would be loaded.
        report: into this worker.
        known: the cluster.
        rules: for the choice.
        ways: what is known of the ways from the worker's location.
    """
    missing_bytes = report.used_bytes + report.unaccounted_bytes + model.size_bytes - report.model_capacity_bytes
    if missing_bytes <= 0:
        return 0.0
    pinned_bytes = known.unevictable_bytes(report)
    if pinned_bytes and (resident := report.models.get(model.model_id)) is not None and resident.unevictable:
        pinned_bytes -= resident.size_bytes
    if model.size_bytes > report.model_capacity_bytes - pinned_bytes:
        return math.inf
    if not known.view.rates.get(report.location):
        return 0.0
    return _losses(report, known, rules, ways).per_s(missing_bytes) * rules.horizon_s


class _Losses:
    """What is lost at one worker if so many bytes must go: the least worthy first."""

    __slots__ = ("_lost_per_s", "_until_bytes", "report", "rules", "ways")

    def __init__(self, report: WorkerReport, known: RouterView, rules: RoutingRules, ways: Topology) -> None:
        self.report, self.rules, self.ways = report, rules, ways
        self._until_bytes: list[int] = []
        self._lost_per_s: list[float] = []
        rates = known.view.rates.get(report.location)
        if not rates:
            return
        nearby = known.nearby(report.location, ways)
        losses: list[tuple[float, float, int]] = []
        for model_id, resident in report.models.items():
            profile = rules.profiles.get(model_id)
            if resident.unevictable or profile is None:
                continue
            per_s = rates.get(model_id, 0.0)
            if per_s:
                # Once it is gone, each request is a load, or is forwarded to the nearest holder.
                per_s *= min(load_s(profile, report), nearby.rtt_s(known.view.holders(model_id)))
            losses.append((per_s / resident.size_bytes, per_s, resident.size_bytes))
        losses.sort(key=itemgetter(0))
        self._until_bytes = list(accumulate(size_bytes for _, _, size_bytes in losses))
        self._lost_per_s = list(accumulate(per_s for _, per_s, _ in losses))

    def per_s(self, missing_bytes: int) -> float:
        """Seconds lost per second."""
        if not self._until_bytes:
            return 0.0
        return self._lost_per_s[min(bisect_left(self._until_bytes, missing_bytes), len(self._lost_per_s) - 1)]


def _losses(report: WorkerReport, known: RouterView, rules: RoutingRules, ways: Topology) -> _Losses:
    losses = known.worked_out.get(report.replica)
    if (
        not isinstance(losses, _Losses)
        or losses.report is not report
        or losses.rules is not rules
        or losses.ways is not ways
    ):
        losses = known.worked_out[report.replica] = _Losses(report, known, rules, ways)
    return losses
