"""A worker in virtual time: one cache, its loads, its executions, its reports."""

from __future__ import annotations

import heapq
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Protocol

from serve_app.core.cache.decisions import (
    Action,
    Answer,
    Evict,
    Grant,
    Hit,
    Join,
    Load,
    Reject,
    RejectReason,
    StartExchange,
    StartLoad,
    StartShrink,
    Wait,
)
from serve_app.core.cache.events import (
    TICK,
    ExchangeEnded,
    ExchangeSuggested,
    ForwardCostsChanged,
    LoadEnded,
    PreloadSuggested,
    WithdrawSuggested,
)
from serve_app.core.cache.model_cache import ModelCache
from serve_app.core.catalog import ModelProfile
from serve_app.core.cluster.commands import Command, PreloadAt, WithdrawAt
from serve_app.core.cluster.reports import Demand, WorkerReport
from serve_app.core.coordination.worker_follower import WorkerFollower
from serve_app.core.queue_estimate import QueueEstimate
from serve_app.core.routing.dispatch import Absent, AttemptResult, Dispatch, Finished, Rejected
from serve_app.core.routing.rules import RoutingRules
from serve_app.core.vocabulary import ModelState, Outcome, ResidentModel
from serve_app.errors import DoesNotFit, StoreError, Unavailable
from serve_app.simulator.discrete_event.event_queue import EventQueue
from serve_app.simulator.discrete_event.results import DiscreteEventResults
from serve_app.simulator.forms import FormsInMemory

#: Rejections as the router takes them: the class of the error counts, as in ``serving/worker/model_manager.py``.
_REJECTED = {
    RejectReason.TOO_LARGE: Rejected(DoesNotFit("the model is larger than the memory")),
    RejectReason.QUEUE_FULL: Rejected(Unavailable("too many requests wait for memory")),
    RejectReason.LOAD_FAILED: Rejected(StoreError("the model cannot be loaded")),
}


class Sender(Protocol):
    """The router that sends a job, and takes in its result."""

    name: str

    def replied(self, job: Job, now: float) -> None:
        """``job.result`` has come."""


@dataclass(slots=True, eq=False)
class Job:
    """One request under way: what is asked, and what has become of it so far."""

    number: int
    model: ModelProfile
    sender: Sender
    arrived_s: float
    #: None where locations do not forward.
    dispatch: Dispatch | None = None
    #: Where it was sent last, whether it may be loaded there, and how long the answer takes to come back.
    there: SimulatedWorker | None = None
    only_if_resident: bool = False
    back_s: float = 0.0
    asked_s: float = 0.0
    outcome: Outcome = Outcome.HIT
    victims: tuple[str, ...] = ()
    #: The form that executes it, where models have several.
    form: ModelProfile | None = None
    #: What came of the last attempt.
    result: AttemptResult | None = None


@dataclass(slots=True, eq=False)
class _LoadUnderWay:
    model: ModelProfile
    ends_s: float
    jobs: list[Job]
    #: Routers that have ordered it for a request that they forwarded: each pins the model until it is loaded.
    orders: int = 0


#: A model's two rows in the reports, made once: while it loads, and when it is ready.
ReportRows = Mapping[str, Mapping[ModelState, ResidentModel]]


def report_rows(profiles: Iterable[ModelProfile]) -> ReportRows:
    """The rows of each model. The number of requests that use it decides nothing, and is left out."""
    return {
        model.model_id: {
            state: ResidentModel(
                model_id=model.model_id, state=state, size_bytes=model.size_bytes, uses=0, unevictable=False
            )
            for state in ModelState
        }
        for model in profiles
    }


class SimulatedWorker:
    """The one worker of a location.

    Args:
        location: its name.
        cache: of the worker.
        forms: in which its models are in memory; None: every model has one.
        report_rows: of all models.
        rules: for the cost of a forward.
        exec_slots: executions at the same time.
        event_queue: of the simulation.
        results: of the simulation.
        changed: is called when there is something new to report.

    Attributes:
        follower: builds its reports, and turns views into instructions.
        sync: is called before a request of another location, or a tick, to catch up with the coordinator.
    """

    def __init__(
        self,
        *,
        location: str,
        cache: ModelCache,
        forms: FormsInMemory | None = None,
        report_rows: ReportRows,
        rules: RoutingRules,
        exec_slots: int,
        event_queue: EventQueue,
        results: DiscreteEventResults,
        changed: Callable[[SimulatedWorker, float], None],
    ) -> None:
        self.location = location
        self.replica = f"{location}#0"
        self.cache = cache
        self._forms = forms
        #: Executions in each form, and forms that others have taken the place of, which leave when there are none.
        self._executing: Counter[ModelProfile] = Counter()
        self._former: set[ModelProfile] = set()
        self._report_rows = report_rows
        self._exec_slots = exec_slots
        self._event_queue = event_queue
        self._results = results
        self._changed = changed
        self.sync: Callable[[float], None] = _nothing
        self.follower = WorkerFollower(replica=self.replica, location=location, rules=rules)
        self._queue = QueueEstimate()
        #: When the executions under way end; no more than there are slots.
        self._slot_ends_s: list[float] = []
        self._loads: dict[str, _LoadUnderWay] = {}
        #: Requests, and models that a router has ordered, in the wait queue of the cache.
        self._waiting: dict[int, Job | ModelProfile] = {}
        self._next_tick_s = math.inf
        self._demand = self.follower.demand
        self._residents: dict[str, ResidentModel] = {}
        self._residents_lent = False
        self._silent = False
        self._reported_queue_s = 0.0

    # Requests

    def take(self, job: Job, now: float) -> None:
        """Take in a request."""
        model = job.model
        if job.back_s:
            self.sync(now)
        if job.only_if_resident and self.cache.state(model.model_id) is None:
            self._reply(job, Absent(self.replica, self.follower.next_sequence), now)
            return
        self._demand[job.sender.name, model.model_id] += 1
        self._note_change(now)
        job.asked_s = now
        answer = self.cache.request(model, now)
        if isinstance(answer, Wait):
            self._waiting[answer.ticket] = job
        else:
            if isinstance(answer, Load):
                self._apply(answer.actions(model), now)
            self._go_on(job, answer, now)
        self.start_preloads(now)

    def _go_on(self, job: Job, answer: Answer, now: float) -> None:
        self._results.queue_s += now - job.asked_s
        match answer:
            case Hit():
                job.outcome = Outcome.HIT
                self._execute(job, now)
            case Join():
                job.outcome = Outcome.JOIN
                load = self._loads[job.model.model_id]
                load.jobs.append(job)
                self._results.load_s += load.ends_s - now
            case Load(victims=victims):
                job.outcome, job.victims = Outcome.LOAD, victims
                self._loads[job.model.model_id].jobs.append(job)
                self._results.load_s += job.model.load_s
            case Reject(reason=reason):
                self._reply(job, _REJECTED[reason], now)

    def _execute(self, job: Job, now: float) -> None:
        model = job.model
        if self._forms is not None:
            job.form = model = self._forms.present(model.model_id)
            self._executing[model] += 1
        ends, exec_s = self._slot_ends_s, model.exec_s
        if ends and ends[0] <= now:
            end_s = now + exec_s
            heapq.heapreplace(ends, end_s)
        elif len(ends) < self._exec_slots:
            end_s = now + exec_s
            heapq.heappush(ends, end_s)
        else:
            self._results.queue_s += ends[0] - now
            end_s = ends[0] + exec_s
            heapq.heapreplace(ends, end_s)
        self._queue.add(exec_s)
        self._event_queue.at(end_s, self._executed, job)

    def _executed(self, job: Job, now: float) -> None:
        self._queue.remove((job.form or job.model).exec_s)
        if self._reported_queue_s:
            self._note_change(now)
        actions = self.cache.finish(job.model.model_id, now)
        if job.form is not None:
            self._apply(actions, now)
            actions = self._change_form(job.form, now)
        self._reply(job, Finished(self.replica, self.follower.next_sequence, job.victims), now)
        self._apply(actions, now)
        self.start_preloads(now)

    def _change_form(self, form: ModelProfile, now: float) -> tuple[Action, ...]:
        """An execution in this form has ended: that may be the end of the form, or a reason to go over to another."""
        assert self._forms is not None
        self._executing[form] -= 1
        if form in self._former and not self._executing[form]:
            self._former.remove(form)
            return self.cache.handle(ExchangeEnded(form.model_id, succeeded=True), now)
        other = self._forms.executed(form.model_id, form)
        return () if other is None else self.cache.handle(ExchangeSuggested(other), now)

    def _start_exchange(self, other: ModelProfile, now: float) -> None:
        self._results.form_change_s += other.load_s
        self._event_queue.at(now + other.load_s, self._exchanged, other)

    def _exchanged(self, other: ModelProfile, now: float) -> None:
        """Requests use the other form from now on; the former one leaves after those that use it."""
        assert self._forms is not None
        former = self._forms.present(other.model_id)
        self._forms.exchanged(other)
        if self._executing[former]:
            self._former.add(former)
        else:
            self._apply(self.cache.handle(ExchangeEnded(other.model_id, succeeded=True), now), now)
            self.start_preloads(now)

    def _start_shrink(self, smaller: ModelProfile, now: float) -> None:
        assert self._forms is not None
        self._forms.exchanged(smaller)
        self._results.form_change_s += smaller.load_s
        self._begin_load(smaller, now)

    def _reply(self, job: Job, result: AttemptResult, now: float) -> None:
        job.result = result
        if job.back_s:
            self._event_queue.at(now + job.back_s, job.sender.replied, job)
        else:
            job.sender.replied(job, now)

    def _apply(self, actions: tuple[Action, ...], now: float) -> None:
        """Carry out what the cache has decided, in order."""
        for action in actions:
            match action:
                case Evict():
                    del self._own_residents()[action.model_id]
                    self._loads.pop(action.model_id, None)
                    self._note_change(now)
                case StartLoad():
                    self._start_load(action.model, action.background, now)
                case StartExchange():
                    self._start_exchange(action.model, now)
                case StartShrink():
                    self._start_shrink(action.model, now)
                case Grant():
                    waiter = self._waiting.pop(action.ticket)
                    if isinstance(waiter, Job):
                        self._go_on(waiter, action.answer, now)
                    else:
                        self._continue_preload(waiter, action.answer, now)

    # Loads

    def preload(self, model: ModelProfile, now: float) -> None:
        """Load a model whose request was forwarded, for later requests; as ``Worker.preload`` of the live system.

        The cache counts a request, which it was, and the model waits for memory as a request does.
        """
        answer = self.cache.request(model, now)
        if isinstance(answer, Wait):
            self._waiting[answer.ticket] = model
            self._note_change(now)
        else:
            if isinstance(answer, Load):
                self._apply(answer.actions(model), now)
            self._continue_preload(model, answer, now)
        self.start_preloads(now)

    def _continue_preload(self, model: ModelProfile, answer: Answer, now: float) -> None:
        match answer:
            case Hit():
                self._apply(self.cache.finish(model.model_id, now), now)
            case Join():
                self._loads[model.model_id].orders += 1
            case Load():
                self._results.preload_s += model.load_s
                self._results.preload_bytes += model.size_bytes
                self._loads[model.model_id].orders += 1
            case Reject():
                pass

    def _start_load(self, model: ModelProfile, background: bool, now: float) -> None:
        if background:
            self._results.preload_s += model.load_s
            self._results.preload_bytes += model.size_bytes
        if self._forms is not None:
            self._forms.loaded(model.model_id)
        self._begin_load(model, now)

    def _begin_load(self, model: ModelProfile, now: float) -> None:
        load = _LoadUnderWay(model, now + model.load_s, [])
        self._own_residents()[model.model_id] = self._report_rows[model.model_id][ModelState.LOADING]
        self._loads[model.model_id] = load
        self._note_change(now)
        self._event_queue.at(load.ends_s, self._loaded, load)

    def _loaded(self, load: _LoadUnderWay, now: float) -> None:
        model_id = load.model.model_id
        if self._loads.get(model_id) is not load:
            # It was a preload that was evicted for a request.
            return
        del self._loads[model_id]
        self._own_residents()[model_id] = self._report_rows[model_id][ModelState.READY]
        self._note_change(now)
        actions = self.cache.handle(LoadEnded(model_id), now)
        for job in load.jobs:
            self._execute(job, now)
        self._apply(actions, now)
        for _ in range(load.orders):
            self._apply(self.cache.finish(model_id, now), now)
        self.start_preloads(now)

    def start_preloads(self, now: float) -> None:
        """Load in the background what the policy wants and placement suggests."""
        self._apply(self.cache.handle(TICK, now), now)
        self._set_timer(now)

    def _set_timer(self, now: float) -> None:
        # A tick that is due already waits for something to end, which is an event of its own.
        if now < self.cache.next_tick_s < self._next_tick_s:
            self._next_tick_s = self.cache.next_tick_s
            self._event_queue.at(self._next_tick_s, SimulatedWorker._tick_due, self)

    def _tick_due(self, now: float) -> None:
        if now >= self._next_tick_s:
            self._next_tick_s = math.inf
            self.sync(now)
            self.start_preloads(now)

    def carry_out(self, command: Command, model: ModelProfile, now: float) -> None:
        """Follow placement as far as no request is in the way."""
        match command:
            case WithdrawAt(model_id=model_id):
                actions = self.cache.handle(WithdrawSuggested(model_id), now)
                if actions:
                    self._apply(actions, now)
                    self.start_preloads(now)
            case PreloadAt(required=required):
                self._apply(self.cache.handle(PreloadSuggested(model, required), now), now)
                self._set_timer(now)

    def catch_up(self, now: float) -> None:
        """Act on what the view says now; commands come apart from it."""
        instructions = self.follower.review(self._residents)
        if instructions.forward_costs is not None:
            self._apply(self.cache.handle(ForwardCostsChanged(instructions.forward_costs), now), now)
        if instructions.primaries_changed:
            self._note_change(now)

    # Reports

    def _own_residents(self) -> dict[str, ResidentModel]:
        if self._residents_lent:
            self._residents, self._residents_lent = dict(self._residents), False
        return self._residents

    def _note_change(self, now: float) -> None:
        if self._silent:
            self._silent = False
            self._changed(self, now)

    def report(self) -> tuple[WorkerReport, tuple[Demand, ...]]:
        """The state of this worker now; the demand since the last one beside it, for the coordinator alone.

        Everything takes what the profile says, so there is nothing to measure.
        """
        self._residents_lent = self._silent = True
        self._reported_queue_s = self._queue.wait_s(self._exec_slots)
        report = self.follower.report(
            cache=self.cache,
            models=self._residents,
            loading=len(self._loads) + len(self._waiting),
            exec_slots=self._exec_slots,
            queue_s=self._reported_queue_s,
            inflight=self._queue.jobs,
        )
        return report, self.follower.take_demand()


def _nothing(now: float) -> None:
    """There is no coordinator to catch up with."""
