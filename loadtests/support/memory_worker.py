"""A worker as a location has it, alone in this process: no Ray, no router, no coordinator."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from serve_app.config.catalog import load_catalog
from serve_app.config.edge import EdgeSettings, load_edge
from serve_app.config.environment import ca_bundle, downloads_dir
from serve_app.config.units import parse_size
from serve_app.core.cache.model_cache import ModelCache
from serve_app.core.catalog import Catalog, PublishedModel
from serve_app.core.coordination.rules import CoordinatorRules
from serve_app.core.memory_budget import MemoryBudget, divide
from serve_app.core.policies.registry import make_policy
from serve_app.core.routing.rules import RoutingRules
from serve_app.errors import StoreError
from serve_app.models.loader import ModelLoader
from serve_app.models.process_memory import give_back_free_memory, keep_freed_memory, process_memory
from serve_app.models.publishing.publish_catalog import publish
from serve_app.models.runtimes.environment import environments
from serve_app.models.sources.fetcher import Fetcher
from serve_app.models.threads import expect_parallel, use_threads
from serve_app.models.warm_up import warm_up
from serve_app.serving.coordinator.client import CoordinatorClient
from serve_app.serving.metrics import WorkerMetrics
from serve_app.serving.transport.messages import InferenceRejected, InferenceResult, InferenceTask
from serve_app.serving.worker.model_manager import ModelManager
from serve_app.serving.worker.process_budget import ProcessBudget
from serve_app.serving.worker.settings import WorkerIdentity
from serve_app.serving.worker.worker import Worker
from serve_app.store.model_store import ModelStore, Selection
from serve_app.tasks.tensors import Tensors, probe

_BUDGET_S = 60.0
_EDGE = Path("deploy/edge.yaml")
#: Requests of other sizes would leave little of the rate of loads.
_LONGEST_S = 0.1


class _NoCoordinator(CoordinatorClient):
    """A coordinator that cannot be reached."""

    async def exchange(self, news: Any, epoch: str, version: int) -> None:
        """Nothing new."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Bench:
    """A worker, its parts, and the models that fit into its memory, with inputs of several sizes for each."""

    worker: Worker
    manager: ModelManager
    memory: ProcessBudget
    store: ModelStore
    selection: Selection
    models: tuple[PublishedModel, ...]
    inputs: dict[str, list[Tensors]]
    slots: int
    rng: random.Random

    def faster(self, model: PublishedModel) -> Sequence[PublishedModel]:
        """Return the forms that a model goes over to, one after the other."""
        return self.selection.catalog.faster.get(model.model_id, ())

    async def infer(self, model: PublishedModel) -> str:
        """Run one inference of any size; return the form that ran it; raises what the worker refuses it with."""
        return await self._infer(model, self.rng.choice(self.inputs[model.model_id]))

    async def infer_all(self, model: PublishedModel) -> None:
        """Run one inference of every size; raises what the worker refuses one with."""
        for payload in self.inputs[model.model_id]:
            await self._infer(model, payload)

    async def _infer(self, model: PublishedModel, payload: Tensors) -> str:
        work = InferenceTask(model_id=model.model_id, origin="here", payload=payload, budget_s=_BUDGET_S)
        reply = await self.worker.infer(work)
        if isinstance(reply, InferenceRejected):
            raise reply.error
        assert isinstance(reply, InferenceResult)
        return reply.form

    def weights(self, model: PublishedModel) -> Path:
        """Its largest file, which has its weights."""
        manifest = self.store.read(self.selection.manifests[model.model_id])
        return max((self.store.blob_path(file.name) for file in manifest.files), key=lambda path: path.stat().st_size)


def publish_missing(catalog: Path) -> None:
    """Put those models of a catalog into the store of ``deploy/edge.yaml`` that it does not have.

    Raises:
        StoreError: one could not be published.
    """
    settings = load_edge(_EDGE)
    expect_parallel(settings.worker.parallel_inferences)
    fetcher = Fetcher(downloads_dir(), ca_bundle=ca_bundle())
    report = publish(ModelStore(settings.store), load_catalog(catalog), fetcher=fetcher)
    if report.failures:
        raise StoreError("; ".join(f"{failure.model_id}: {failure.message}" for failure in report.failures))


@asynccontextmanager
async def bench(
    memory: str,
    *,
    preloads: int,
    release_page_cache: bool,
    models_of: Path | None = None,
    policy: str | None = None,
) -> AsyncIterator[Bench]:
    """A worker with the settings and the models of ``deploy/edge.yaml``, but so much memory.

    Args:
        memory: of the worker.
        preloads: background loads at the same time.
        release_page_cache: whether evicted files leave the page cache.
        models_of: a catalog whose models it has instead.
        policy: another one than that of the settings.

    Raises:
        StoreError: no model is published that fits.
    """
    settings = load_edge(_EDGE)
    keep_freed_memory()
    use_threads(settings.worker.threads_per_inference, settings.worker.parallel_inferences)
    store = ModelStore(settings.store)
    # Compiled forms too, where they have been made.
    selection = store.select(load_catalog(models_of or settings.catalog), environments=environments())
    catalog = selection.catalog
    loader = ModelLoader(store, release_page_cache=release_page_cache)
    loader.select(selection.manifests)
    for key in selection.manifests:
        loader.prepare(key)
    await asyncio.to_thread(warm_up, loader, catalog)
    slots = settings.worker.parallel_inferences
    budget = divide(parse_size(memory), catalog.models, slots)
    worker_memory = ProcessBudget(budget, read=process_memory, give_back=give_back_free_memory)
    models = tuple(
        model
        for model in catalog.models
        if model.profile.size_bytes <= budget.model_capacity_bytes and model.workspace_bytes <= budget.workspace_bytes
    )
    if not models:
        raise StoreError("no model is published that fits; run edgeserve publish, or give more memory")
    metrics = WorkerMetrics("here", "here-1")
    manager = _make_manager(settings, budget, preloads, loader, metrics, policy)
    worker = _make_worker(settings, catalog, manager, worker_memory, metrics)
    worker.start(settings.coordinator.report_every)
    try:
        yield Bench(
            worker=worker,
            manager=manager,
            memory=worker_memory,
            store=store,
            selection=selection,
            models=models,
            inputs={model.model_id: _inputs(model, budget) for model in models},
            slots=slots,
            rng=random.Random(0),
        )
    finally:
        await worker.stop()


def _inputs(model: PublishedModel, budget: MemoryBudget) -> list[Tensors]:
    """Valid inputs by the contract of a model: at its least sizes, and at the others that it was measured at."""
    least = tuple(axis.smallest for axis in model.contract.axes)
    others = [
        cost.sizes
        for cost in model.costs
        if cost.sizes != least and cost.exec_s <= _LONGEST_S and cost.workspace_bytes <= budget.workspace_bytes
    ]
    return [probe(model.contract, sizes) for sizes in (least, *others)]


def _make_manager(
    settings: EdgeSettings,
    budget: MemoryBudget,
    preloads: int,
    loader: ModelLoader,
    metrics: WorkerMetrics,
    policy: str | None,
) -> ModelManager:
    name, parameters = (policy, {}) if policy else (settings.policy.name, settings.policy.parameters)
    return ModelManager(
        cache=ModelCache(
            capacity_bytes=budget.capacity_bytes,
            workspace_bytes=budget.workspace_bytes,
            policy=make_policy(name, random.Random(0), **parameters),
            max_loads=settings.worker.parallel_loads,
            max_preloads=preloads,
        ),
        backend=loader,
        loaders=ThreadPoolExecutor(settings.worker.parallel_loads),
        preloaders=ThreadPoolExecutor(max(1, preloads)),
        clock=time.monotonic,
        call_at=asyncio.get_running_loop().call_at,
        observer=metrics,
    )


def _make_worker(
    settings: EdgeSettings, catalog: Catalog, manager: ModelManager, memory: ProcessBudget, metrics: WorkerMetrics
) -> Worker:
    coordination = CoordinatorRules(
        half_life_s=settings.coordinator.popularity_half_life, stale_after_s=settings.coordinator.stale_after
    )
    return Worker(
        identity=WorkerIdentity(location="here", replica="here-1"),
        catalog=catalog,
        manager=manager,
        exec_slots=settings.worker.parallel_inferences,
        coordinator=_NoCoordinator(coordination),
        rules=RoutingRules(
            profiles=catalog.profiles(),
            links={},
            default_link=settings.core_default_link(),
            horizon_s=settings.coordinator.horizon,
        ),
        metrics=metrics,
        process_budget=memory,
        max_pixels=settings.limits.image_pixels,
    )
