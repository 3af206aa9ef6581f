"""A worker's exchange with the coordinator: reports and measurements out, instructions in."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping
from dataclasses import replace

from serve_app.core.cache.events import (
    ForwardCostsChanged,
    IdleChecked,
    PreloadSuggested,
    ProtectedChanged,
    WithdrawSuggested,
)
from serve_app.core.catalog import Catalog, ModelProfile
from serve_app.core.cluster.commands import Command, PreloadAt, WithdrawAt
from serve_app.core.cluster.reports import OutcomeCounts, ViewDelta, WorkerReport
from serve_app.core.coordination.worker_follower import WorkerFollower
from serve_app.core.routing.rules import RoutingRules
from serve_app.core.vocabulary import ModelState, Outcome
from serve_app.serving.coordinator.client import CoordinatorClient
from serve_app.serving.metrics import WorkerMetrics
from serve_app.serving.periodic import every
from serve_app.serving.worker.executor import InferenceExecutor
from serve_app.serving.worker.model_manager import Lease, ModelManager
from serve_app.serving.worker.process_budget import ProcessBudget
from serve_app.serving.worker.settings import RetentionRules, WorkerIdentity

logger = logging.getLogger(__name__)

_SMOOTHING = 0.2

#: Models whose files are looked at with every report, in turn.
_CHECKED = 16


class Smoothed:
    """Seconds per model, smoothed by measurement rather than, as ``DecayedRate``, by time."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    def add(self, model_id: str, seconds: float) -> None:
        """Take in one measurement; the first one counts in full."""
        before = self.seconds.get(model_id, seconds)
        self.seconds[model_id] = before + _SMOOTHING * (seconds - before)


class Measurements:
    """What a worker measures of its requests.

    Args:
        location: of the worker.

    Attributes:
        inflight: requests under way.
        exec_s: seconds of one inference.
        load_s: seconds of one load.
        outcomes: by the location whose users sent the requests.
    """

    def __init__(self, location: str) -> None:
        self._location = location
        self.inflight = 0
        self.exec_s = Smoothed()
        self.load_s = Smoothed()
        self.outcomes: dict[str, OutcomeCounts] = {}

    def expected_exec_s(self, model: ModelProfile) -> float:
        """Seconds of one inference: measured, else from the profile."""
        return self.exec_s.seconds.get(model.model_id, model.exec_s)

    def add(self, model: ModelProfile, origin: str, lease: Lease, exec_s: float) -> None:
        """Take in a request that was served; ``exec_s`` is for one input of its batch."""
        if lease.outcome is Outcome.LOAD:
            # A part of the load shows only now: the first execution touches every page of the weights.
            self.load_s.add(model.model_id, lease.load_s + exec_s - self.expected_exec_s(model))
        else:
            self.exec_s.add(model.model_id, exec_s)
        outcome = lease.outcome if origin == self._location else Outcome.FORWARD
        before = self.outcomes.get(origin, OutcomeCounts())
        self.outcomes[origin] = before + OutcomeCounts(
            requests=1,
            hits=int(outcome is Outcome.HIT),
            joins=int(outcome is Outcome.JOIN),
            loads=int(outcome is Outcome.LOAD),
            forwards=int(outcome is Outcome.FORWARD),
        )


class WorkerReporter:
    """Reports to the coordinator, and carries out what it answers.

    Args:
        identity: of the worker.
        catalog: the models that may be requested.
        manager: the models in memory.
        executor: of inferences.
        budget: of the process.
        coordinator: the client of it.
        rules: for the cost of a forward.
        retention: what the worker holds beside what is worth it to its policy.
        metrics: gauges.
        clock: monotonic seconds.

    Attributes:
        measured: what requests have shown.
        unusable: models that cannot be loaded here, and why.
    """

    def __init__(
        self,
        *,
        identity: WorkerIdentity,
        catalog: Catalog,
        manager: ModelManager,
        executor: InferenceExecutor,
        budget: ProcessBudget,
        coordinator: CoordinatorClient,
        rules: RoutingRules,
        retention: RetentionRules,
        metrics: WorkerMetrics,
        clock: Callable[[], float],
    ) -> None:
        self._replica = identity.replica
        self._catalog, self._retention = catalog, retention
        self._manager = manager
        self._executor = executor
        self._budget = budget
        self._coordinator = coordinator
        self._metrics = metrics
        self._clock = clock
        self.measured = Measurements(identity.location)
        self._follower = WorkerFollower(
            replica=identity.replica, location=identity.location, rules=rules, min_copies=retention.min_copies
        )
        self._report_every_s = 0.0
        self._reporting: asyncio.Task[None] | None = None
        self._has_left = False
        self.unusable: Mapping[str, str] = {}
        self._checked = 0

    @property
    def next_sequence(self) -> int:
        """The number of the next report."""
        return self._follower.next_sequence

    def count_demand(self, origin: str, model_id: str) -> None:
        """Count a request by users of ``origin``; the next report includes it."""
        self._follower.demand[origin, model_id] += 1

    def start(self, report_every_s: float) -> None:
        """Begin to report; needs a running event loop."""
        self._report_every_s = report_every_s
        self._reporting = asyncio.get_running_loop().create_task(every(report_every_s, self.report_once))

    def reconfigure(self, catalog: Catalog, rules: RoutingRules, retention: RetentionRules) -> None:
        """Go on by another configuration."""
        self._catalog, self._retention = catalog, retention
        self._follower.reconfigure(rules, retention.min_copies)

    async def report_once(self) -> None:
        """Unload idle models, look for broken files, update what models may take, and exchange a report."""
        if self._retention.idle_unload_s is not None:
            self._manager.handle(IdleChecked(self._clock() - self._retention.idle_unload_s))
        self._check_some()
        await self._budget.update(self._manager, self._clock())
        await self._exchange()

    async def leave(self) -> None:
        """Hand popular models over and leave the directory."""
        if self._has_left:
            return
        self._has_left = True
        if self._reporting is not None:
            self._reporting.cancel()
        await self._hand_over()
        await self._coordinator.deregister(self._replica)

    def report(self) -> WorkerReport:
        """Build a report of the worker as it is now; the demand since the last report goes with it, once."""
        cache, measured = self._manager.cache, self.measured
        models = cache.models()
        report = self._follower.report(
            cache=cache,
            models={model.model_id: model for model in models},
            loading=sum(model.state is ModelState.LOADING for model in models) + cache.waiting,
            exec_slots=self._executor.slots,
            queue_s=self._executor.queue_s,
            inflight=measured.inflight,
        )
        return replace(
            report,
            rss_bytes=self._budget.rss_bytes,
            base_bytes=self._budget.base_bytes,
            exec_s=dict(measured.exec_s.seconds),
            # The noise of executions may make the difference for a short load negative.
            load_s={model_id: max(0.0, seconds) for model_id, seconds in measured.load_s.seconds.items()},
            outcomes=dict(measured.outcomes),
            demand=self._follower.take_demand(),
            unusable={**self.unusable, **cache.failures},
        )

    def _check_some(self) -> None:
        """Find files that are missing or truncated before a request does, and those that are whole again."""
        models = self._catalog.models
        if self._checked >= len(models):
            self._checked = 0
        self._manager.recheck(model.model_id for model in models[self._checked : self._checked + _CHECKED])
        self._checked += _CHECKED

    async def _exchange(self) -> ViewDelta | None:
        """Report and carry out the answer; None while the coordinator cannot be reached."""
        report, view = self.report(), self._follower.view
        self._set_gauges(report)
        delta = await self._coordinator.exchange(report, view.epoch, view.version)
        if delta is None:
            self._follower.return_demand(report.demand)
            return None
        held = {model.model_id: model for model in self._manager.cache.models()}
        instructions = self._follower.apply(delta, held, self._clock())
        if instructions.forward_costs is not None:
            self._manager.handle(ForwardCostsChanged(instructions.forward_costs))
        self._manager.handle(ProtectedChanged(instructions.protect))
        for command in instructions.commands:
            self._carry_out(command)
        return delta

    def _carry_out(self, command: Command) -> None:
        """Follow placement as far as no request is in the way; later reports show what was not done."""
        match command:
            case WithdrawAt(model_id=model_id):
                self._manager.handle(WithdrawSuggested(model_id))
            case PreloadAt(model_id=model_id, required=required) if model_id in self._catalog:
                self._manager.handle(PreloadSuggested(self._catalog[model_id].profile, required))
            case PreloadAt():
                logger.warning("placement orders model %s, which is not in the store here", command.model_id)

    async def _hand_over(self) -> None:
        """Report as leaving, and wait until others hold what they were ordered to load, but not for long."""
        self._follower.is_leaving = True
        if self._reporting is None or not self._coordinator.up:
            return
        try:
            async with asyncio.timeout(self._retention.hand_over_s):
                while True:
                    delta = await self._exchange()
                    if delta is None or delta.may_leave:
                        return
                    await asyncio.sleep(self._report_every_s)
        except TimeoutError:
            logger.warning("not everything was handed over within %g s", self._retention.hand_over_s)

    def _set_gauges(self, report: WorkerReport) -> None:
        metrics = self._metrics
        metrics.used_bytes.set(report.used_bytes)
        metrics.capacity_bytes.set(report.capacity_bytes)
        metrics.workspace_bytes.set(report.workspace_bytes)
        metrics.unaccounted_bytes.set(report.unaccounted_bytes)
        metrics.base_bytes.set(report.base_bytes)
        metrics.resident_models.set(len(report.models))
        metrics.rss_bytes.set(report.rss_bytes)
