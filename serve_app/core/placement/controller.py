"""Placement as the coordinator runs it: which models should be where, and the commands that bring them there.

A location pays nothing for a request whose model is there, else the load or the latency to the nearest holder,
whichever is less. A copy is worth what all locations would pay less, per second, with it. Copies are placed greedily by
worth per byte, each in free memory or in the place of copies that are worth clearly less. Before that come required
copies, of the catalog or because a flash crowd is more than the holders can serve. After it, copies are withdrawn that
are not used and would not be missed. All of it is advice: a worker unloads nothing that is in use.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

from serve_app.core.cluster.commands import Command, PreloadAt
from serve_app.core.cluster.reports import Demand, WorkerReport
from serve_app.core.links import Link
from serve_app.core.placement.demand import DemandTracker
from serve_app.core.placement.latency_matrix import LatencyMatrix
from serve_app.core.placement.rules import PlacementSettings
from serve_app.core.placement.solver import PlacementRound
from serve_app.core.placement.tables import PlacementGoals
from serve_app.core.placement.worker_states import WorkerState, WorkerTracker
from serve_app.core.vocabulary import ModelState


class PlacementController:
    """Counts demand, issues each round's commands, and sees that the models of a leaving worker are handed over.

    Args:
        settings: until ``configure`` is called.
    """

    def __init__(self, settings: PlacementSettings) -> None:
        rules = settings.rules
        self._demand = DemandTracker(rules.half_life_s, rules.flash_crowd_half_life_s)
        #: When a leaving worker's models were handed over, and what other workers were ordered to load.
        self._handed_over: dict[str, tuple[float, tuple[PreloadAt, ...]]] = {}
        self.configure(settings)

    def configure(self, settings: PlacementSettings) -> None:
        """Place by other settings from now on; demand and hand-overs are kept, commands under way are forgotten."""
        routing = settings.routing
        self._profiles = routing.profiles
        self._rules = settings.rules
        self._min_copies = settings.min_copies
        self._latencies = LatencyMatrix(routing.links, routing.default_link, settings.payload_bytes)
        self._workers = WorkerTracker(routing.profiles, settings.rules)

    def update_links(self, links: Mapping[tuple[str, str], Link]) -> None:
        """Take in links that a router has measured."""
        self._latencies.update(links)

    def record(self, replica: str, demands: Iterable[Demand], now: float) -> None:
        """Count the requests that a worker has served."""
        for demand in demands:
            self._demand.add(demand.location, demand.model_id, demand.count, now)
            self._workers.record_use(replica, demand.model_id, now)

    def plan(self, reports: Iterable[WorkerReport], now: float) -> tuple[Command, ...]:
        """Run a round with the demand that was counted."""
        demand = self._demand
        return self.round(
            reports, demand.steady(now), now, flash_crowds=demand.flash_crowds(now), over=demand.over(now)
        )

    def round(
        self,
        reports: Iterable[WorkerReport],
        rates: Mapping[str, Mapping[str, float]],
        now: float,
        *,
        flash_crowds: Mapping[str, Mapping[str, float]] | None = None,
        over: frozenset[str] = frozenset(),
    ) -> tuple[Command, ...]:
        """Run a round with a given demand.

        Args:
            reports: the last one of every live worker.
            rates: steady requests per second of every model by users of every location.
            now: seconds; never runs backwards.
            flash_crowds: requests per second of this moment, of models whose requests randomness does not explain.
            over: models whose flash crowd has gone; copies of them may be withdrawn.

        Returns:
            The changes; none where nothing would be clearly better.
        """
        workers = self._workers.states(reports, now)
        if not workers:
            return ()
        flash_crowds = flash_crowds or {}
        merged, urgent = self._merged(rates, flash_crowds)
        goals = PlacementGoals(
            rates=merged, copies=self._required_copies(flash_crowds, workers), urgent=urgent, withdraw=over
        )
        work = PlacementRound(workers, goals, self._profiles, self._rules, self._latencies)
        commands = work.commands()
        self._workers.record_budgets([worker.replica for worker in workers], work.budgets_left())
        self._workers.record_commands(commands, now)
        return commands

    def hand_over(self, leaving: WorkerReport, reports: Iterable[WorkerReport], now: float) -> tuple[Command, ...]:
        """What other workers should load because one leaves; nothing if that was said already.

        More may move at once than in a round.
        """
        if leaving.replica in self._handed_over:
            return ()
        commands: tuple[Command, ...] = ()
        workers = self._workers.states(reports, now, budget_share=self._rules.hand_over_share)
        if workers:
            models = frozenset(leaving.models)
            goals = PlacementGoals(rates=self._demand.steady(now), copies=self._min_copies, urgent=models, only=models)
            commands = PlacementRound(workers, goals, self._profiles, self._rules, self._latencies).commands()
            self._workers.record_commands(commands, now)
        orders = tuple(command for command in commands if isinstance(command, PreloadAt))
        self._handed_over[leaving.replica] = now, orders
        return commands

    def may_leave(self, replica: str, reports: Mapping[str, WorkerReport], now: float) -> bool:
        """Whether all that others were ordered to load because this worker leaves is loaded, or will not be."""
        handed_over = self._handed_over.get(replica)
        if handed_over is None:
            return True
        issued_s, orders = handed_over
        return now - issued_s > self._rules.patience_s or all(_is_settled(order, reports) for order in orders)

    def deregister(self, replica: str) -> None:
        """Forget a worker that has gone."""
        self._handed_over.pop(replica, None)

    def _merged(
        self, rates: Mapping[str, Mapping[str, float]], flash_crowds: Mapping[str, Mapping[str, float]]
    ) -> tuple[Mapping[str, Mapping[str, float]], frozenset[str]]:
        """Rates, with those of flash crowds that pay for a load before they may have gone; and the latter's models."""
        merged, urgent = dict(rates), set()
        if not any(flash_crowds.values()):
            return merged, frozenset()
        longest_s = self._latencies.longest_s
        for location, flash_crowd in flash_crowds.items():
            asked = dict(merged.get(location, {}))
            for model_id, per_s in flash_crowd.items():
                profile = self._profiles.get(model_id)
                if profile is None or per_s <= asked.get(model_id, 0.0):
                    continue
                saved_s = per_s * self._rules.flash_crowd_payback_s * min(profile.load_s, longest_s)
                if saved_s >= profile.load_s:
                    asked[model_id] = per_s
                    urgent.add(model_id)
            merged[location] = asked
        return merged, frozenset(urgent)

    def _required_copies(
        self, flash_crowds: Mapping[str, Mapping[str, float]], workers: Sequence[WorkerState]
    ) -> Mapping[str, int]:
        """The number of copies of models that need several, or one though they may not be asked for."""
        copies = dict(self._min_copies)
        busy = self._rules.busy_share * sum(worker.exec_slots for worker in workers) / len(workers)
        for model_id in {model_id for asked in flash_crowds.values() for model_id in asked} & self._profiles.keys():
            per_s = sum(asked.get(model_id, 0.0) for asked in flash_crowds.values())
            needed = math.ceil(per_s * self._profiles[model_id].exec_s / busy)
            if needed > 1:
                copies[model_id] = max(copies.get(model_id, 0), min(needed, len(workers)))
        return copies


def _is_settled(order: PreloadAt, reports: Mapping[str, WorkerReport]) -> bool:
    report = reports.get(order.replica)
    if report is None or report.leaving:
        return True
    resident = report.models.get(order.model_id)
    return resident is not None and resident.state is ModelState.READY
