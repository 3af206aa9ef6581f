"""The worker: owns one memory-bounded model cache and serves inferences from it."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from types import MappingProxyType

from serve_app.core.cache.events import (
    CapacityChanged,
    CatalogChanged,
    ContentChanged,
    ExchangeSuggested,
    PolicyChanged,
    PreloadSuggested,
    UnloadRequested,
)
from serve_app.core.catalog import Catalog, PublishedModel
from serve_app.core.cluster.reports import WorkerReport
from serve_app.core.coordination.rules import CoordinatorRules
from serve_app.core.forms import FormChanges
from serve_app.core.joined_executions import Joinable
from serve_app.core.memory_budget import MemoryBudget
from serve_app.core.policies.base import EvictionPolicy
from serve_app.core.routing.rules import RoutingRules
from serve_app.core.versions import split_key
from serve_app.errors import DeadlineExceeded, EdgeServeError, ModelChanged, StoreError
from serve_app.serving.coordinator.client import CoordinatorClient
from serve_app.serving.metrics import WorkerMetrics
from serve_app.serving.transport.messages import (
    InferenceRejected,
    InferenceResult,
    InferenceTask,
    NotResident,
    Reply,
)
from serve_app.serving.worker.execution import Execution
from serve_app.serving.worker.executor import InferenceExecutor
from serve_app.serving.worker.model_manager import Lease, ModelManager
from serve_app.serving.worker.process_budget import ProcessBudget
from serve_app.serving.worker.reporter import WorkerReporter
from serve_app.serving.worker.settings import RetentionRules, WorkerIdentity
from serve_app.tasks.base import RawInput, Solution, TaskModel
from serve_app.tasks.registry import solve
from serve_app.tasks.tensors import Tensors, complete

logger = logging.getLogger(__name__)

_NO_RETENTION = RetentionRules()


class Worker:
    """Serves inference from its cache; the authority on what that cache holds.

    Args:
        identity: location and replica.
        catalog: the models that may be requested.
        manager: the models in memory.
        exec_slots: inferences that run at the same time, each in a thread.
        coordinator: the client of it.
        rules: for the cost of a forward.
        metrics: of the worker.
        process_budget: the memory of this process.
        max_pixels: the largest image that is decoded.
        find_blob: returns the path of a file in the store, by its name.
        retention: what it holds beside what is worth it to its policy.
        unusable: models that cannot be loaded here, and why.
        look_for_versions: reconfigures the worker if other versions have been published.
        cores: for one inference where nothing else runs.
        clock: monotonic seconds.

    Attributes:
        executor: runs its inferences.
    """

    def __init__(
        self,
        *,
        identity: WorkerIdentity,
        catalog: Catalog,
        manager: ModelManager,
        exec_slots: int,
        coordinator: CoordinatorClient,
        rules: RoutingRules,
        metrics: WorkerMetrics,
        process_budget: ProcessBudget,
        max_pixels: int,
        find_blob: Callable[[str], Path] = Path,
        retention: RetentionRules = _NO_RETENTION,
        unusable: Mapping[str, str] = MappingProxyType({}),
        look_for_versions: Callable[[], Awaitable[None]] | None = None,
        cores: int = 1,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._identity = identity
        self._catalog = catalog
        self._form_changes = FormChanges(catalog.faster)
        self._manager = manager
        self._coordinator = coordinator
        self._metrics = metrics
        self._budget = process_budget
        self._max_pixels = max_pixels
        self._find_blob = find_blob
        self._look_for_versions = look_for_versions or _nothing_new
        self._preload_at_start = retention.preload
        self._clock = clock
        self.executor = InferenceExecutor(
            slots=exec_slots,
            budget=process_budget,
            release=manager.release,
            name=identity.location,
            clock=clock,
            cores=cores,
        )
        self._reporter = WorkerReporter(
            identity=identity,
            catalog=catalog,
            manager=manager,
            executor=self.executor,
            budget=process_budget,
            coordinator=coordinator,
            rules=rules,
            retention=retention,
            metrics=metrics,
            clock=clock,
        )
        self._reporter.unusable = unusable
        self._measured = self._reporter.measured

    # Life

    async def preload_pinned(self) -> None:
        """Bring the pinned models in before the first request; one that fails does not keep the worker down."""
        for model in self._catalog.models:
            if model.pinned:
                try:
                    await self._manager.preload(model.profile)
                except EdgeServeError as error:
                    logger.error("pinned model %s is not loaded: %s", model.model_id, error)

    def start(self, report_every_s: float) -> None:
        """Begin to report, and to preload what is worth it; needs a running event loop."""
        self._manager.handle(_offered(self._catalog))
        self._preload_listed()
        self._reporter.start(report_every_s)

    async def leave(self) -> None:
        """Hand popular models over and leave the directory; requests that come nevertheless are still served."""
        await self._reporter.leave()

    async def stop(self) -> None:
        """Leave, and give all memory back."""
        await self.leave()
        # A canceled request may still run in its thread, on weights that must stay until it ends.
        await asyncio.to_thread(self.executor.shutdown)
        self._manager.close()

    def report(self) -> WorkerReport:
        """Build a report of the worker as it is now; the demand since the last report goes with it, once."""
        return self._reporter.report()

    async def report_once(self) -> None:
        """Report to the coordinator now, beside the rhythm of reports; see ``WorkerReporter.report_once``."""
        await self._reporter.report_once()

    def reconfigure(
        self,
        *,
        catalog: Catalog,
        budget: MemoryBudget,
        policy: EvictionPolicy | None,
        rules: RoutingRules,
        retention: RetentionRules,
        coordination: CoordinatorRules,
        unusable: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        """Go on by another configuration; requests under way are not affected.

        Args:
            catalog: the models that may be requested now; others leave when they are idle.
            budget: for models and for executions; what is in use beyond it stays until it is idle.
            policy: a fresh one; None: the present one goes on.
            rules, retention: as at birth, but ``retention.preload`` has no effect any more.
            coordination: for the coordinator.
            unusable: models that cannot be loaded here, and why.

        Raises:
            ValueError: the pinned models need more memory; nothing has changed.
        """
        pinned = [model for model in catalog.models if model.pinned]
        held = {model.model_id: model.size_bytes for model in self._manager.cache.models()}
        if sum(held.get(model.model_id, 0) for model in pinned) > budget.model_capacity_bytes:
            raise ValueError(f"{budget.model_capacity_bytes} bytes for models are less than what the pinned ones need")
        self._catalog = catalog
        self._form_changes = FormChanges(catalog.faster)
        self._reporter.unusable = unusable
        self._reporter.reconfigure(catalog, rules, retention)
        self._manager.handle(_offered(catalog))
        self._manager.handle(CapacityChanged(budget.capacity_bytes, budget.workspace_bytes))
        self._budget.divide(budget)
        if policy is not None:
            self._manager.handle(PolicyChanged(policy))
        for model in (*pinned, *self._successors()):
            self._manager.handle(PreloadSuggested(model.profile, required=True))
        self._coordinator.configure(coordination)

    def _successors(self) -> list[PublishedModel]:
        """Return the versions that are to answer from now on, of models of which another version is in memory."""
        held = {split_key(model.model_id)[0] for model in self._manager.cache.models()}
        return [
            model
            for model in self._catalog.answering()
            if model.name in held and self._manager.cache.state(model.model_id) is None
        ]

    def _preload_listed(self) -> None:
        free_bytes = self._manager.cache.model_capacity_bytes - self._manager.cache.used_bytes
        for name in self._preload_at_start:
            models = self._catalog.named(name)
            if not models:
                logger.error("model %s is to be preloaded, but not in the store", name)
            elif self._manager.cache.state(models[0].model_id) is None:
                model = models[0].profile
                free_bytes -= model.size_bytes
                # They may displace what the policy preloads meanwhile, but not each other.
                self._manager.handle(PreloadSuggested(model, required=free_bytes >= 0))

    # Requests

    async def infer(self, work: InferenceTask) -> Reply:
        """Run one inference; a failure that is no fault of the worker's comes back as a value."""
        if work.model_id not in self._catalog:
            # The router may have seen a new version first.
            await self._look_for_versions()
            if work.model_id not in self._catalog:
                return self._not_in_store(work.model_id)
        model = self._catalog[work.model_id]
        if work.only_if_resident and self._manager.cache.state(work.model_id) is None:
            return NotResident(replica=self._identity.replica, sequence=self._reporter.next_sequence)
        self._measured.inflight += 1
        try:
            async with asyncio.timeout(work.budget_s):
                try:
                    return await self._infer(work, model)
                except ModelChanged:
                    # What is in memory must not answer; what is in the store may, if it was published again.
                    self._manager.handle(ContentChanged(work.model_id))
                    return await self._infer(work, model)
        except TimeoutError:
            return InferenceRejected(
                error=DeadlineExceeded(f"model {work.model_id} did not answer before its deadline")
            )
        except EdgeServeError as error:
            return InferenceRejected(error=error)
        finally:
            self._measured.inflight -= 1

    async def _infer(self, work: InferenceTask, model: PublishedModel) -> InferenceResult:
        began_s, solution = self._clock(), None
        until_s = began_s + work.budget_s
        if isinstance(work.payload, RawInput):
            # Before anything is loaded: bad input must not displace a good model.
            solution, inputs, sizes = await asyncio.to_thread(self._begin, work.payload, model)
        else:
            inputs, sizes = complete(work.payload, model.contract)
        decode_s = self._clock() - began_s if solution is not None else 0.0
        cost = model.cost(sizes)
        self._budget.require(model, cost.workspace_bytes)
        # Times are kept for the least sizes; how many times longer these take is known from publishing.
        times_longer = model.times_longer(sizes)
        self._reporter.count_demand(work.origin, work.model_id)
        lease = await self._manager.acquire(model.profile)
        least_s = self._measured.expected_exec_s(model.profile)
        done = await self.executor.execute(
            lease,
            Execution(contract=model.contract, inputs=inputs, solution=solution),
            least_s=least_s,
            times_longer=times_longer,
            workspace_bytes=cost.workspace_bytes,
            joinable=self._joinable(model, lease, sizes, least_s, until_s),
        )
        executed, times_longer = done.result, done.times_longer * done.result.executions
        self._measured.add(model.profile, work.origin, lease, done.exec_s / times_longer)
        self._change_form(model, lease, times_longer * done.share)
        queue_s = lease.wait_s + done.queue_s
        # Metrics take a while, so the answer goes first.
        form = lease.runnable.form
        asyncio.get_running_loop().call_soon(
            self._metrics.executed, model.model_id, form, queue_s, done.exec_s, done.requests
        )
        return InferenceResult(
            outputs=executed.outputs,
            answer=executed.answer,
            outcome=lease.outcome,
            queue_s=queue_s,
            load_s=lease.load_s,
            decode_s=decode_s,
            exec_s=done.exec_s,
            replica=self._identity.replica,
            sequence=self._reporter.next_sequence,
            evicted=lease.evicted,
            form=form,
        )

    def _joinable(
        self, model: PublishedModel, lease: Lease, sizes: tuple[int, ...], least_s: float, until_s: float
    ) -> Joinable | None:
        """Return what decides with which other requests this one may be executed; None: with none."""
        forms = (model, *self._catalog.faster.get(model.model_id, ()))
        in_memory = next((each for each in forms if each.form == lease.runnable.form), model)
        if not in_memory.joined_elements:
            return None
        joinable = Joinable(model=in_memory, sizes=sizes, least_s=least_s, until_s=until_s)
        return joinable if joinable.rows < joinable.most_rows else None

    def _change_form(self, model: PublishedModel, lease: Lease, times: float) -> None:
        """Let a model that was executed in another form than its fastest go over to a faster one, once it pays."""
        profile = self._form_changes.executed(model, lease.runnable.form, times)
        if profile is not None:
            self._manager.handle(ExchangeSuggested(profile))

    def _begin(self, raw: RawInput, model: PublishedModel) -> tuple[Solution, Tensors, tuple[int, ...]]:
        """Start the task of a model, up to the inputs of its first execution."""
        known = TaskModel(
            model_id=model.name,
            contract=model.contract,
            task=model.task,
            max_pixels=self._max_pixels,
            tokenizer=self._find_blob(model.task.tokenizer) if model.task.tokenizer else None,
        )
        solution = solve(raw, known)
        return solution, *complete(next(solution), model.contract)

    # Loads

    async def preload(self, model_id: str) -> None:
        """Load a model whose request was sent elsewhere, for the requests that will follow."""
        if model_id not in self._catalog:
            return
        try:
            # Counts as a request, as it was one: else the model would be without demand in the eyes of the policy.
            self._manager.release(await self._manager.acquire(self._catalog[model_id].profile))
        except EdgeServeError as error:
            logger.info("model %s is not loaded in the background: %s", model_id, error)

    async def load(self, model_id: str) -> InferenceRejected | None:
        """Load a model on an operator's request."""
        if model_id not in self._catalog:
            return self._not_in_store(model_id)
        try:
            await self._manager.load(self._catalog[model_id].profile)
        except EdgeServeError as error:
            return InferenceRejected(error=error)
        return None

    async def unload(self, model_id: str) -> InferenceRejected | None:
        """Unload a model on an operator's request."""
        try:
            self._manager.handle(UnloadRequested(model_id))
        except EdgeServeError as error:
            return InferenceRejected(error=error)
        return None

    def _not_in_store(self, model_id: str) -> InferenceRejected:
        here = self._identity.location
        return InferenceRejected(error=StoreError(f"the store at {here} has no model {model_id}; publish it there"))


def _offered(catalog: Catalog) -> CatalogChanged:
    """Return what a cache must know of a catalog."""
    current = {name: catalog.named(name)[0].model_id for name in catalog.names}
    answering = {model.model_id for model in catalog.answering()}
    return CatalogChanged(
        tuple(catalog.profiles().values()),
        [model.model_id for model in catalog.models if model.pinned],
        {model.model_id: current[model.name] for model in catalog.models if model.model_id not in answering},
    )


async def _nothing_new() -> None:
    """Find no other versions."""
