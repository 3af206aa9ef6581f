"""When the coordinator places models, and which commands wait for which worker's report."""

from __future__ import annotations

from collections.abc import Mapping

from serve_app.core.cluster.commands import Command
from serve_app.core.cluster.reports import Demand, WorkerReport
from serve_app.core.coordination.rules import CoordinatorRules
from serve_app.core.links import Link
from serve_app.core.placement.controller import PlacementController


class PlacementSchedule:
    """Runs rounds of placement as reports come in, and queues their commands; does nothing where nothing is placed.

    Args:
        rules: until ``configure`` is called.
    """

    def __init__(self, rules: CoordinatorRules) -> None:
        self._rules = rules
        self._controller = None if rules.placement is None else PlacementController(rules.placement)
        #: When all workers have had the time to report, and when the last round was.
        self._all_reported_s: float | None = None
        self._planned_s: float | None = None
        #: Commands for the next report of each replica, and those for the report that came last.
        self._waiting: dict[str, list[Command]] = {}
        self._due: dict[str, tuple[Command, ...]] = {}

    def configure(self, rules: CoordinatorRules, links: Mapping[tuple[str, str], Link]) -> None:
        """Go on by other rules; ``links`` are all that were measured."""
        before, self._rules = self._rules, rules
        settings = rules.placement
        if settings == before.placement:
            return
        self._waiting.clear()
        if settings is None:
            self._controller = None
            return
        if self._controller is None:
            self._controller = PlacementController(settings)
        else:
            self._controller.configure(settings)
        self._controller.update_links(links)

    def update_links(self, links: Mapping[tuple[str, str], Link]) -> None:
        """Take in measured links."""
        if self._controller is not None:
            self._controller.update_links(links)

    def record(
        self, report: WorkerReport, demands: tuple[Demand, ...], workers: Mapping[str, WorkerReport], now: float
    ) -> None:
        """Count the demand of a report, hand over the models of a leaving worker, and run a round if one is due."""
        if self._controller is None:
            return
        self._controller.record(report.replica, demands, now)
        commands: tuple[Command, ...] = ()
        if report.leaving:
            commands = self._controller.hand_over(report, workers.values(), now)
        if self._is_round_due(now):
            self._planned_s = now
            commands += self.plan(workers, now)
        for command in commands:
            self._waiting.setdefault(command.replica, []).append(command)

    def plan(self, workers: Mapping[str, WorkerReport], now: float) -> tuple[Command, ...]:
        """Run a round now; its commands are not queued."""
        return () if self._controller is None else self._controller.plan(workers.values(), now)

    def release(self, replica: str) -> None:
        """Let the commands that wait for a worker be due with its present report."""
        if replica in self._waiting:
            self._due[replica] = tuple(self._waiting.pop(replica))
        elif self._due:
            self._due.pop(replica, None)

    def due(self, replica: str) -> tuple[Command, ...]:
        """The commands for the last report of a worker."""
        return self._due.get(replica, ())

    def may_leave(self, replica: str, workers: Mapping[str, WorkerReport], now: float) -> bool:
        """Whether nothing is left to hand over of a worker's models."""
        return self._controller is None or self._controller.may_leave(replica, workers, now)

    def deregister(self, replica: str) -> None:
        """Forget a worker that has gone."""
        self._waiting.pop(replica, None)
        self._due.pop(replica, None)
        if self._controller is not None:
            self._controller.deregister(replica)

    def _is_round_due(self, now: float) -> bool:
        if self._planned_s is not None and self._rules.placement is not None:
            return now - self._planned_s >= self._rules.placement.every_s
        if self._all_reported_s is None:
            # Before all workers have had the time to report, all copies would seem to be missing.
            self._all_reported_s = now + self._rules.stale_after_s
        return now >= self._all_reported_s
