"""The worker: owns one memory-bounded model cache, runs inference, reports to the coordinator."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from weakref import WeakSet

from serve_app.core.cache.events import (
    CapacityChanged,
    CatalogChanged,
    ForwardCostsChanged,
    IdleChecked,
    ModelsKnown,
    PolicyChanged,
    PreloadSuggested,
    ProtectedChanged,
    UnloadRequested,
    WithdrawSuggested,
)
from serve_app.core.catalog import Catalog, PublishedModel
from serve_app.core.cluster.commands import Command, EvictAt, PreloadAt
from serve_app.core.cluster.reports import OutcomeCounts, ViewDelta, WorkerReport
from serve_app.core.coordination.rules import CoordinatorRules
from serve_app.core.coordination.worker_follower import WorkerFollower
from serve_app.core.memory_budget import MemoryBudget
from serve_app.core.policies.base import EvictionPolicy
from serve_app.core.queue_estimate import QueueEstimate
from serve_app.core.routing.rules import RoutingRules
from serve_app.core.vocabulary import ModelState, Outcome
from serve_app.errors import DeadlineExceeded, EdgeServeError, StoreError, Unavailable
from serve_app.serving.coordinator.client import CoordinatorClient
from serve_app.serving.metrics import WorkerMetrics
from serve_app.serving.periodic import every
from serve_app.serving.transport.messages import (
    FloatArray,
    InferenceRejected,
    InferenceResult,
    InferenceTask,
    NotResident,
    Reply,
)
from serve_app.serving.worker.model_host import Lease, ModelHost, RunnableModel
from serve_app.serving.worker.process_budget import ProcessBudget
from serve_app.tasks.image_classification import decode_image, preprocess

logger = logging.getLogger(__name__)

_SMOOTHING = 0.2


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerIdentity:
    """Which worker this is."""

    location: str
    replica: str


@dataclass(frozen=True, slots=True, kw_only=True)
class RetentionRules:
    """What a worker holds beside what its policy finds worth it.

    Attributes:
        preload: models that are loaded in the background at the start.
        min_copies: models of which there must be a number of copies in the cluster.
        idle_unload_s: a model that nobody has asked for in so long is unloaded; None: never.
        hand_over_s: how long a worker that is shut down waits for others to load its popular models.
    """

    preload: tuple[str, ...] = ()
    min_copies: Mapping[str, int] = field(default_factory=dict)
    idle_unload_s: float | None = None
    hand_over_s: float = 5.0


_NOTHING_ELSE = RetentionRules()


class Smoothed:
    """Exponentially smoothed seconds per model, beginning with the first measurement."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    def add(self, model_id: str, seconds: float) -> None:
        """Take in one measurement."""
        before = self.seconds.get(model_id, seconds)
        self.seconds[model_id] = before + _SMOOTHING * (seconds - before)


class Worker:
    """Serves inference from its cache; the authority on what that cache holds.

    Args:
        identity: location and replica.
        catalog: the models that may be asked for.
        host: the models in memory.
        exec_slots: inferences that run at the same time, each in a thread.
        link: the way to the coordinator.
        rules: links and horizon, for the price of losing a model.
        metrics: counters.
        memory: the memory of this process.
        max_pixels: the largest image that is decoded.
        holding: what it holds beside what its policy finds worth it.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        *,
        identity: WorkerIdentity,
        catalog: Catalog,
        host: ModelHost,
        exec_slots: int,
        link: CoordinatorClient,
        rules: RoutingRules,
        metrics: WorkerMetrics,
        memory: ProcessBudget,
        max_pixels: int,
        holding: RetentionRules = _NOTHING_ELSE,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._identity = identity
        self._catalog = catalog
        self._host = host
        self._exec_slots = exec_slots
        self._executors = ThreadPoolExecutor(exec_slots, thread_name_prefix="infer")
        #: The first execution of a model that was loaded may wait for the disk, and must not keep others from a thread.
        self._first_executors = ThreadPoolExecutor(exec_slots, thread_name_prefix="first")
        #: What has been executed since it was loaded.
        self._warm: WeakSet[RunnableModel] = WeakSet()
        self._link = link
        self._metrics = metrics
        self._memory = memory
        self._max_pixels = max_pixels
        self._holding = holding
        self._follower = WorkerFollower(
            replica=identity.replica, location=identity.location, rules=rules, min_copies=holding.min_copies
        )
        self._has_left = False
        self._report_every_s = 0.0
        self._clock = clock
        self._inflight = 0
        self._queue = QueueEstimate()
        self._exec_s = Smoothed()
        self._load_s = Smoothed()
        self._outcomes: dict[str, OutcomeCounts] = {}
        self._reporting: asyncio.Task[None] | None = None

    def start(self, report_every_s: float) -> None:
        """Begin to report, and to preload what is worth it; needs a running event loop."""
        self._host.handle(ModelsKnown(tuple(self._catalog.profiles().values())))
        self._preload_listed()
        self._report_every_s = report_every_s
        self._reporting = asyncio.get_running_loop().create_task(every(report_every_s, self._report))

    async def leave(self) -> None:
        """Hand popular models over and leave the directory; who asks nevertheless is still served."""
        if self._has_left:
            return
        self._has_left = True
        if self._reporting is not None:
            self._reporting.cancel()
        await self._hand_over()
        await self._link.deregister(self._identity.replica)

    async def stop(self) -> None:
        """Leave, and give all memory back."""
        await self.leave()
        # A request that was given up may still run in its thread, on the weights that would be taken away.
        for executors in (self._executors, self._first_executors):
            await asyncio.to_thread(executors.shutdown)
        self._host.close()

    async def infer(self, work: InferenceTask) -> Reply:
        """Run one inference; every failure that is not a fault of ours comes back as a value."""
        if work.model_id not in self._catalog:
            return self._not_in_store(work.model_id)
        model = self._catalog[work.model_id]
        if work.only_if_resident and self._host.cache.state(work.model_id) is None:
            return NotResident(replica=self._identity.replica, sequence=self._follower.next_sequence)
        self._inflight += 1
        try:
            async with asyncio.timeout(work.budget_s):
                return await self._infer(work, model)
        except TimeoutError:
            return InferenceRejected(
                error=DeadlineExceeded(f"model {work.model_id} did not answer before its deadline")
            )
        except EdgeServeError as error:
            return InferenceRejected(error=error)
        finally:
            self._inflight -= 1

    async def preload(self, model_id: str) -> None:
        """Load a model whose request was sent elsewhere, for the next ones that come."""
        if model_id not in self._catalog:
            return
        try:
            # Counts as a request, which it was: else the policy would take the model for one that nobody wants.
            self._host.release(await self._host.acquire(self._catalog[model_id].profile))
        except EdgeServeError as error:
            logger.info("model %s is not loaded in the background: %s", model_id, error)

    async def load(self, model_id: str) -> InferenceRejected | None:
        """Load a model by hand."""
        if model_id not in self._catalog:
            return self._not_in_store(model_id)
        try:
            await self._host.load(self._catalog[model_id].profile)
        except EdgeServeError as error:
            return InferenceRejected(error=error)
        return None

    async def unload(self, model_id: str) -> InferenceRejected | None:
        """Unload a model by hand."""
        try:
            self._host.handle(UnloadRequested(model_id))
        except EdgeServeError as error:
            return InferenceRejected(error=error)
        return None

    async def preload_pinned(self) -> None:
        """Bring the pinned models in before the first request; one that fails does not keep the worker down."""
        for model in self._catalog.models:
            if model.pinned:
                try:
                    await self._host.preload(model.profile)
                except EdgeServeError as error:
                    logger.error("pinned model %s is not loaded: %s", model.model_id, error)

    def reconfigure(
        self,
        *,
        catalog: Catalog,
        budget: MemoryBudget,
        policy: EvictionPolicy | None,
        rules: RoutingRules,
        holding: RetentionRules,
        coordination: CoordinatorRules,
    ) -> None:
        """Go on by another configuration; requests under way notice nothing.

        Args:
            catalog: the models that may be asked for now; others leave when they are idle.
            budget: for models and for executions; what is in use beyond it stays until it is idle.
            policy: a fresh one; None: that of before goes on.
            rules, holding: as at birth, but ``holding.preload`` is of no use any more.
            coordination: for the coordinator.

        Raises:
            ValueError: the pinned models need more memory; nothing has changed.
        """
        pinned = [model for model in catalog.models if model.pinned]
        held = {model.model_id: model.size_bytes for model in self._host.cache.models()}
        if sum(held.get(model.model_id, 0) for model in pinned) > budget.models_bytes:
            raise ValueError(f"{budget.models_bytes} bytes for models are less than what the pinned ones need")
        self._catalog, self._holding = catalog, holding
        self._follower.reconfigure(rules, holding.min_copies)
        self._host.handle(CatalogChanged(tuple(catalog.profiles().values()), [model.model_id for model in pinned]))
        self._host.handle(CapacityChanged(budget.models_bytes))
        self._memory.divide(budget)
        if policy is not None:
            self._host.handle(PolicyChanged(policy))
        for model in pinned:
            self._host.handle(PreloadSuggested(model.profile, required=True))
        self._link.configure(coordination)

    def _preload_listed(self) -> None:
        free_bytes = self._host.cache.capacity_bytes - self._host.cache.used_bytes
        for model_id in self._holding.preload:
            if model_id not in self._catalog:
                logger.error("model %s is to be preloaded, but not in the store", model_id)
            elif self._host.cache.state(model_id) is None:
                model = self._catalog[model_id].profile
                free_bytes -= model.size_bytes
                # What the policy preloads meanwhile makes way; but they must not displace each other.
                self._host.handle(PreloadSuggested(model, required=free_bytes >= 0))

    def _not_in_store(self, model_id: str) -> InferenceRejected:
        here = self._identity.location
        return InferenceRejected(error=StoreError(f"the store at {here} has no model {model_id}; publish it there"))

    def report(self) -> WorkerReport:
        """The state of this worker now. The demand since the last one goes with it, once."""
        cache = self._host.cache
        models = cache.models()
        report = self._follower.report(
            cache=cache,
            models={model.model_id: model for model in models},
            loading=sum(model.state is ModelState.LOADING for model in models) + cache.waiting,
            exec_slots=self._exec_slots,
            queue_s=self._queue.wait_s(self._exec_slots),
            inflight=self._inflight,
        )
        return replace(
            report,
            rss_bytes=self._memory.rss_bytes,
            base_bytes=self._memory.base_bytes,
            workspace_bytes=self._memory.workspace_bytes,
            unaccounted_bytes=self._memory.unaccounted_bytes,
            exec_s=dict(self._exec_s.seconds),
            # Where loads are short, the noise of executions may make the difference negative.
            load_s={model_id: max(0.0, seconds) for model_id, seconds in self._load_s.seconds.items()},
            outcomes=dict(self._outcomes),
            demand=self._follower.take_demand(),
        )

    async def _infer(self, work: InferenceTask, model: PublishedModel) -> InferenceResult:
        self._memory.require(model)
        decode_s = 0.0
        if isinstance(work.payload, bytes):
            # Decoded before anything is loaded: a bad image must not displace a good model.
            began_s = self._clock()
            batch = await asyncio.to_thread(self._decode, work.payload, model)
            decode_s = self._clock() - began_s
        else:
            batch = work.payload
        self._follower.demand[work.origin, work.model_id] += 1
        lease = await self._host.acquire(model.profile)
        logits, queue_s, exec_s = await self._execute(lease, batch, model)
        if lease.outcome is Outcome.LOAD:
            # What a load takes shows in part only now: the first execution touches every page of the weights.
            first_s = exec_s / len(batch) - self._exec_s.seconds.get(model.model_id, model.profile.exec_s)
            self._load_s.add(model.model_id, lease.load_s + first_s)
        else:
            self._exec_s.add(model.model_id, exec_s / len(batch))
        self._count(work.origin, lease.outcome)
        # Measuring takes a while, so the answer goes first.
        asyncio.get_running_loop().call_soon(self._metrics.executed, model.model_id, lease.wait_s + queue_s, exec_s)
        return InferenceResult(
            logits=logits,
            outcome=lease.outcome,
            queue_s=lease.wait_s + queue_s,
            load_s=lease.load_s,
            decode_s=decode_s,
            exec_s=exec_s,
            replica=self._identity.replica,
            sequence=self._follower.next_sequence,
            evicted=lease.evicted,
        )

    def _decode(self, payload: bytes, model: PublishedModel) -> FloatArray:
        return preprocess(decode_image(payload, self._max_pixels), model.image)[None]

    async def _execute(self, lease: Lease, batch: FloatArray, model: PublishedModel) -> tuple[FloatArray, float, float]:
        """Logits, seconds in the queue for a thread, seconds of execution; gives the lease back."""
        expected_s = self._exec_s.seconds.get(lease.model_id, model.profile.exec_s)
        asked_s = self._clock()

        loop = asyncio.get_running_loop()
        done: asyncio.Future[tuple[FloatArray, float, float]] = loop.create_future()

        def run() -> None:
            try:
                with self._memory.workspace(model.workspace_bytes):
                    began_s = self._clock()
                    result = lease.runnable.infer(batch), began_s - asked_s, self._clock() - began_s
            except BaseException as error:
                loop.call_soon_threadsafe(end, error)
            else:
                loop.call_soon_threadsafe(end, result)

        def end(result: tuple[FloatArray, float, float] | BaseException) -> None:
            # In any case: the thread of a cancelled request runs on, and its model must stay until it is done.
            self._executed(lease, expected_s)
            if done.cancelled():
                return
            if isinstance(result, BaseException):
                done.set_exception(result)
            else:
                self._warm.add(lease.runnable)
                done.set_result(result)

        self._queue.add(expected_s)
        executors = self._executors if lease.runnable in self._warm else self._first_executors
        try:
            job = executors.submit(run)
        except RuntimeError as error:
            # This worker is shut down, or the machine has no thread left; another worker may do better.
            self._executed(lease, expected_s)
            raise Unavailable(f"a worker of {self._identity.location} cannot run inferences: {error}") from error
        try:
            return await done
        except asyncio.CancelledError:
            if job.cancel():
                self._executed(lease, expected_s)
            raise

    def _executed(self, lease: Lease, expected_s: float) -> None:
        self._queue.remove(expected_s)
        self._host.release(lease)

    def _count(self, origin: str, outcome: Outcome) -> None:
        if origin != self._identity.location:
            outcome = Outcome.FORWARD
        before = self._outcomes.get(origin, OutcomeCounts())
        self._outcomes[origin] = before + OutcomeCounts(
            requests=1,
            hits=int(outcome is Outcome.HIT),
            joins=int(outcome is Outcome.JOIN),
            loads=int(outcome is Outcome.LOAD),
            forwards=int(outcome is Outcome.FORWARD),
        )

    async def _report(self) -> None:
        if self._holding.idle_unload_s is not None:
            self._host.handle(IdleChecked(self._clock() - self._holding.idle_unload_s))
        await self._memory.look(self._host, self._clock())
        await self._exchange()

    async def _exchange(self) -> ViewDelta | None:
        """Report, and act on the answer; None while the coordinator cannot be reached."""
        report, view = self.report(), self._follower.view
        self._measure(report)
        delta = await self._link.exchange(report, view.epoch, view.version)
        if delta is None:
            self._follower.return_demand(report.demand)
            return None
        held = {model.model_id: model for model in self._host.cache.models()}
        instructions = self._follower.apply(delta, held, self._clock())
        if instructions.forward_costs is not None:
            self._host.handle(ForwardCostsChanged(instructions.forward_costs))
        self._host.handle(ProtectedChanged(instructions.protect))
        for command in instructions.commands:
            self._follow(command)
        return delta

    def _follow(self, command: Command) -> None:
        """Do what placement advises, as far as no request is in the way; what is not done, it will see."""
        match command:
            case EvictAt(model_id=model_id):
                self._host.handle(WithdrawSuggested(model_id))
            case PreloadAt(model_id=model_id, required=required) if model_id in self._catalog:
                self._host.handle(PreloadSuggested(self._catalog[model_id].profile, required))
            case PreloadAt():
                logger.warning("placement wants model %s, which is not in the store here", command.model_id)

    async def _hand_over(self) -> None:
        """Say that this worker leaves, and wait until others hold what they were told to, but not for long."""
        self._follower.is_leaving = True
        if self._reporting is None or not self._link.up:
            return
        try:
            async with asyncio.timeout(self._holding.hand_over_s):
                while True:
                    delta = await self._exchange()
                    if delta is None or delta.may_leave:
                        return
                    await asyncio.sleep(self._report_every_s)
        except TimeoutError:
            logger.warning("not everything was handed over within %g s", self._holding.hand_over_s)

    def _measure(self, report: WorkerReport) -> None:
        self._metrics.used_bytes.set(report.used_bytes)
        self._metrics.capacity_bytes.set(report.capacity_bytes + report.workspace_bytes)
        self._metrics.workspace_bytes.set(report.workspace_bytes)
        self._metrics.unaccounted_bytes.set(report.unaccounted_bytes)
        self._metrics.base_bytes.set(report.base_bytes)
        self._metrics.resident_models.set(len(report.models))
        self._metrics.rss_bytes.set(report.rss_bytes)
