"""Placement as the coordinator runs it: hears reports, plans every so often, and sees that who leaves leaves nothing.

The simulator's coordinator is another one, but it plans with this.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from serve_app.core.cluster.commands import Command, PreloadAt
from serve_app.core.cluster.reports import Demand, WorkerReport
from serve_app.core.links import Link
from serve_app.core.placement.demand import DemandTracker
from serve_app.core.placement.orders import Placement
from serve_app.core.placement.rules import PlacementRules
from serve_app.core.routing.rules import RoutingRules
from serve_app.core.vocabulary import ModelState


class Planner:
    """What placement knows beyond the reports: who asks for what, and what has been handed over.

    Args:
        routing: profiles and links.
        rules: how eager to be.
        payload_bytes: of a typical request.
        min_copies: models of which there must be several copies.
        before: who planned by other rules until now; what it has heard is kept.
    """

    def __init__(
        self,
        routing: RoutingRules,
        rules: PlacementRules,
        *,
        payload_bytes: int,
        min_copies: Mapping[str, int] | None = None,
        before: Planner | None = None,
    ) -> None:
        self._rules = rules
        self._placement = Placement(routing, rules, payload_bytes=payload_bytes, min_copies=min_copies)
        self._interests: DemandTracker = (
            before._interests if before else DemandTracker(rules.half_life_s, rules.crowd_half_life_s)
        )
        #: What others were told to load when a worker said that it leaves, and when.
        self._handed_over: dict[str, tuple[float, tuple[PreloadAt, ...]]] = before._handed_over if before else {}

    def measured(self, links: Mapping[tuple[str, str], Link]) -> None:
        """These ways take so long, as a router has measured."""
        self._placement.measured(links)

    def hear(self, replica: str, demands: Iterable[Demand], now: float) -> None:
        """A worker has served these requests."""
        for demand in demands:
            self._interests.add(demand.location, demand.model_id, demand.count, now)
            self._placement.used(replica, demand.model_id, now)

    def plan(self, reports: Iterable[WorkerReport], now: float) -> tuple[Command, ...]:
        """One round."""
        interests = self._interests
        return self._placement.round(
            reports, interests.steady(now), now, crowds=interests.crowds(now), over=interests.over(now)
        )

    def hand_over(self, leaving: WorkerReport, reports: Iterable[WorkerReport], now: float) -> tuple[Command, ...]:
        """What others are to load because a worker leaves; nothing if that was said already."""
        if leaving.replica in self._handed_over:
            return ()
        commands = self._placement.hand_over(leaving, reports, self._interests.steady(now), now)
        orders = tuple(command for command in commands if isinstance(command, PreloadAt))
        self._handed_over[leaving.replica] = now, orders
        return commands

    def may_leave(self, replica: str, reports: Mapping[str, WorkerReport], now: float) -> bool:
        """Whether what others were told to load because this worker leaves is there, or will not be."""
        given_s, orders = self._handed_over.get(replica, (now, ()))
        return now - given_s > self._rules.patience_s or all(_is_done(order, reports) for order in orders)

    def departed(self, replica: str) -> None:
        """A worker is gone."""
        self._handed_over.pop(replica, None)


def _is_done(order: PreloadAt, reports: Mapping[str, WorkerReport]) -> bool:
    report = reports.get(order.replica)
    if report is None or report.leaving:
        return True
    resident = report.models.get(order.model_id)
    return resident is not None and resident.state is ModelState.READY
