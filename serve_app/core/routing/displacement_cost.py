"""What later requests lose by the absence of models that others displace."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Mapping
from itertools import accumulate
from operator import itemgetter

from serve_app.core.catalog import ModelProfile
from serve_app.core.cluster.cluster_view import ClusterView
from serve_app.core.cluster.reports import WorkerReport
from serve_app.core.routing.rules import RoutingRules


def exec_s(model: ModelProfile, report: WorkerReport) -> float:
    """Seconds of one inference at a worker: measured, else from the profile."""
    return report.exec_s.get(model.model_id, model.exec_s)


def load_s(model: ModelProfile, report: WorkerReport) -> float:
    """Seconds of one load at a worker: measured, else from the profile."""
    return report.load_s.get(model.model_id, model.load_s)


def forward_costs(here: str, cluster: ClusterView, rules: RoutingRules) -> dict[str, float]:
    """Extra seconds of a small request forwarded to the nearest other holder, for every model that has one."""
    holders = [
        (rules.link(here, report.location).rtt_s, report.models)
        for report in cluster.workers.values()
        if report.location != here and not report.leaving
    ]
    costs: dict[str, float] = {}
    # The furthest first: a nearer one overwrites its costs, which is many times faster than to compare.
    for rtt_s, models in sorted(holders, key=lambda holder: -holder[0]):
        costs.update(dict.fromkeys(models, rtt_s))
    return costs


class DisplacementCosts:
    """What later requests lose at one worker, by the bytes that a load displaces: the least useful models go first.

    Args:
        report: of the worker.
        rates: requests per second at the location of the worker, by model.
        profiles: of all models; a model without one is taken for unevictable.
        holder_rtt_s: the round trip to the nearest holder of a model at another location; ``inf`` where there is none.
    """

    __slots__ = ("_bytes", "_lost_per_s")

    def __init__(
        self,
        report: WorkerReport,
        rates: Mapping[str, float],
        profiles: Mapping[str, ModelProfile],
        holder_rtt_s: Callable[[str], float],
    ) -> None:
        losses: list[tuple[float, float, int]] = []
        for model_id, resident in report.models.items() if rates else ():
            profile = profiles.get(model_id)
            if resident.unevictable or profile is None:
                continue
            lost_per_s = rates.get(model_id, 0.0)
            if lost_per_s:
                # Once the model is gone, each request is a load, or is forwarded to the nearest holder.
                lost_per_s *= min(load_s(profile, report), holder_rtt_s(model_id))
            losses.append((lost_per_s / resident.size_bytes, lost_per_s, resident.size_bytes))
        losses.sort(key=itemgetter(0))
        #: Sums over the models, the least useful first.
        self._bytes = list(accumulate(size_bytes for _, _, size_bytes in losses))
        self._lost_per_s = list(accumulate(lost_per_s for _, lost_per_s, _ in losses))

    def per_s(self, displaced_bytes: int) -> float:
        """Seconds that requests lose per second once ``displaced_bytes`` of models are gone."""
        if not self._bytes:
            return 0.0
        return self._lost_per_s[min(bisect_left(self._bytes, displaced_bytes), len(self._lost_per_s) - 1)]
