"""Workers as placement sees them: as they will be once their commands have been carried out."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

from serve_app.core.catalog import ModelProfile
from serve_app.core.cluster.commands import Command, PreloadAt
from serve_app.core.cluster.reports import WorkerReport
from serve_app.core.placement.rules import PlacementRules
from serve_app.core.vocabulary import ModelState


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerState:
    """One worker, as placement sees it.

    Attributes:
        location: of the worker.
        replica: the worker's replica id.
        model_capacity_bytes: for models.
        used_bytes: once its commands have been carried out.
        exec_slots: executions at the same time.
        held: the models that it will hold then.
        cooling_down: models with a recent command. They are loaded again only if urgent or required, and unloaded again
            only for a required copy.
        just_ordered: models with a command that may still be under way: neither loaded nor unloaded again.
        overdue: models that should have been loaded by now, and are not.
        unevictable: models that stay where they are.
        primary_for: models whose last copy the worker answers for.
        idle: models that may go and have not been used for long.
        load_budget_bytes: what may be loaded in this round.
        evict_budget_bytes: what may be unloaded in this round.
    """

    location: str
    replica: str
    model_capacity_bytes: int
    used_bytes: int
    exec_slots: int
    held: Collection[str]
    cooling_down: Collection[str]
    just_ordered: Collection[str]
    overdue: Collection[str]
    unevictable: Collection[str]
    primary_for: Collection[str]
    idle: Collection[str]
    load_budget_bytes: float
    evict_budget_bytes: float


@dataclass(frozen=True, slots=True)
class _Order:
    issued_s: float
    is_preload: bool


@dataclass(frozen=True, slots=True)
class _ChurnBudget:
    """Bytes left to load and to unload at one worker; negative after a model larger than a round's share."""

    load_bytes: float
    evict_bytes: float


class WorkerTracker:
    """Remembers what reports do not say: recent commands, budgets that were exceeded, and the last use of each copy.

    Args:
        profiles: of all models.
        rules: of placement.
    """

    def __init__(self, profiles: Mapping[str, ModelProfile], rules: PlacementRules) -> None:
        self._profiles, self._rules = profiles, rules
        self._orders: dict[tuple[str, str], _Order] = {}
        self._budgets: dict[str, _ChurnBudget] = {}
        #: When each worker was last seen to use each of its models, or to have got it.
        self._used_s: dict[str, dict[str, float]] = {}

    def record_use(self, replica: str, model_id: str, now: float) -> None:
        """Take note that a worker has served a request for a model."""
        self._used_s.setdefault(replica, {})[model_id] = now

    def record_commands(self, commands: Iterable[Command], now: float) -> None:
        """Take note of commands that are issued."""
        for command in commands:
            self._orders[command.replica, command.model_id] = _Order(now, isinstance(command, PreloadAt))

    def record_budgets(self, replicas: Iterable[str], left: Iterable[tuple[float, float]]) -> None:
        """Take note of what a round has left of the budgets for loads and evictions."""
        for replica, (load_bytes, evict_bytes) in zip(replicas, left, strict=True):
            self._budgets[replica] = _ChurnBudget(load_bytes, evict_bytes)

    def states(
        self, reports: Iterable[WorkerReport], now: float, *, budget_share: float | None = None
    ) -> Sequence[WorkerState]:
        """All workers that are not leaving, by replica.

        Args:
            reports: the last one of every live worker.
            now: seconds.
            budget_share: share of a worker's memory that may be loaded and unloaded, whatever earlier rounds have left
                of theirs; None: a round's budget.
        """
        repeat_s = self._rules.repeat_s
        self._orders = {key: order for key, order in self._orders.items() if now - order.issued_s <= repeat_s}
        staying = sorted(
            (report for report in reports if not report.leaving and report.model_capacity_bytes > 0),
            key=lambda report: report.replica,
        )
        replicas = {report.replica for report in staying}
        for known in (self._used_s, self._budgets):
            for replica in known.keys() - replicas:
                del known[replica]
        orders: dict[str, dict[str, _Order]] = {}
        for (replica, model_id), order in self._orders.items():
            orders.setdefault(replica, {})[model_id] = order
        return [
            self._state(report, orders.get(report.replica, {}), self._budget(report, budget_share), now)
            for report in staying
        ]

    def _budget(self, report: WorkerReport, share: float | None) -> _ChurnBudget:
        if share is not None:
            return _ChurnBudget(report.model_capacity_bytes * share, report.model_capacity_bytes * share)
        share_bytes = report.model_capacity_bytes * self._rules.share_per_round
        left = self._budgets.get(report.replica, _ChurnBudget(share_bytes, share_bytes))
        return _ChurnBudget(
            min(share_bytes, left.load_bytes + share_bytes), min(share_bytes, left.evict_bytes + share_bytes)
        )

    def _state(
        self, report: WorkerReport, orders: Mapping[str, _Order], budget: _ChurnBudget, now: float
    ) -> WorkerState:
        just_ordered = {
            model_id for model_id, order in orders.items() if now - order.issued_s <= self._rules.patience_s
        }
        unevictable = {
            resident.model_id
            for resident in report.models.values()
            if resident.unevictable or resident.state is ModelState.LOADING
        }
        held, used_bytes = self._expected(report, {model_id: orders[model_id] for model_id in just_ordered})
        return WorkerState(
            location=report.location,
            replica=report.replica,
            model_capacity_bytes=report.model_capacity_bytes,
            used_bytes=used_bytes,
            exec_slots=report.exec_slots,
            held=held,
            cooling_down=orders.keys(),
            just_ordered=just_ordered,
            overdue={
                model_id
                for model_id, order in orders.items()
                if model_id not in just_ordered and order.is_preload and model_id not in report.models
            },
            unevictable=unevictable,
            primary_for=report.primary_for,
            idle=self._idle(report, now) - unevictable - just_ordered,
            load_budget_bytes=budget.load_bytes,
            evict_budget_bytes=budget.evict_bytes,
        )

    def _expected(self, report: WorkerReport, orders: Mapping[str, _Order]) -> tuple[Collection[str], int]:
        """The models and the used bytes once ``orders`` have been carried out."""
        held = dict.fromkeys(report.models, True)
        used_bytes = report.used_bytes + report.unaccounted_bytes
        for model_id, order in orders.items():
            if order.is_preload == (model_id in held) or model_id not in self._profiles:
                continue
            if order.is_preload:
                held[model_id] = True
                used_bytes += self._profiles[model_id].size_bytes
            else:
                del held[model_id]
                used_bytes -= self._profiles[model_id].size_bytes
        return held.keys(), used_bytes

    def _idle(self, report: WorkerReport, now: float) -> set[str]:
        """The models that the worker has not used for long."""
        known = self._used_s.get(report.replica, {})
        used_s = self._used_s[report.replica] = {
            model_id: now if resident.uses else known.get(model_id, now) for model_id, resident in report.models.items()
        }
        return {
            model_id
            for model_id, since_s in used_s.items()
            if now - since_s >= self._rules.withdraw_after_s and not report.models[model_id].uses
        }
