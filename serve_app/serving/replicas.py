"""The classes that Ray Serve runs: a router and a worker, each composed from its configuration.

No ``from __future__ import annotations`` here: Serve reads the annotations of these classes.
"""

import asyncio
import contextlib
import gc
import logging
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from fastapi import FastAPI
from ray import serve

from serve_app.config.edge import EdgeSettings
from serve_app.config.environment import sockets_dir
from serve_app.core.cache.model_cache import ModelCache
from serve_app.core.catalog import Catalog
from serve_app.core.forms import key_of_tier
from serve_app.core.memory_budget import MemoryBudget
from serve_app.errors import ConfigError, EdgeServeError
from serve_app.models.process_memory import give_back_free_memory, keep_freed_memory, process_memory
from serve_app.models.runtimes.environment import environments
from serve_app.serving import ray_internals
from serve_app.serving.api import fast_path
from serve_app.serving.api.http_app import build_http_app
from serve_app.serving.api.metrics_scrape import MetricsScraper
from serve_app.serving.api.request_reader import HttpSettings
from serve_app.serving.coordinator.client import CoordinatorClient
from serve_app.serving.metrics import RouterMetrics, WorkerMetrics
from serve_app.serving.replica_config import ReplicaConfig
from serve_app.serving.router.router import Router
from serve_app.serving.transport.local_rpc import LocalRpcServer
from serve_app.serving.transport.messages import InferenceRejected, InferenceTask, Reply
from serve_app.serving.transport.worker_client import ServeWorkerPool
from serve_app.serving.version_watcher import VersionWatcher
from serve_app.serving.worker.machine import usable_cores
from serve_app.serving.worker.model_manager import ModelManager
from serve_app.serving.worker.process_budget import ProcessBudget
from serve_app.serving.worker.settings import WorkerIdentity
from serve_app.serving.worker.worker import Worker
from serve_app.store.model_store import ModelStore

logger = logging.getLogger(__name__)


class WorkerReplica:
    """A worker replica: a ``Worker`` and its parts."""

    async def __init__(self, config: ReplicaConfig) -> None:  # type: ignore[misc]
        _log_to_serve()
        keep_freed_memory()
        self._config = config
        self._identity = _identity(config)
        self._changing = asyncio.Lock()
        self._store = ModelStore(config.settings.store)
        self._loader = _make_loader(config.settings, self._store)
        self._versions = VersionWatcher(self._store.projects, config.project, self._go_on, self._served)
        catalog = self._prepare_models(config)
        await self._warm_up(catalog)
        self._worker = self._make_worker(catalog)
        self._local_rpc = LocalRpcServer(self._worker.infer)
        await self._open_local_rpc()
        await self._worker.preload_pinned()
        self._worker.start(config.settings.coordinator.report_every)
        self._versions.start()
        _keep_from_garbage_collection()

    def _prepare_models(self, config: ReplicaConfig) -> Catalog:
        """Return the models in the store of this node, those that answer prepared for loading."""
        selection = self._store.select(config.entries, config.project, config.versions, environments())
        self._loader.select(selection.manifests)
        unusable = dict(selection.catalog.problems)
        for model in selection.catalog.answering():
            try:
                self._loader.prepare(model.model_id)
            except Exception as error:
                # A factory may fail in any way, and one unusable model must not keep the others from being served.
                logger.exception("model %s cannot be served", model.model_id)
                is_foreseen = isinstance(error, EdgeServeError)
                unusable[model.model_id] = str(error) if is_foreseen else f"{type(error).__name__}: {error}"
        for form in (each for forms in selection.catalog.faster.values() for each in forms):
            # What its library takes belongs to what the process takes without any model.
            with contextlib.suppress(EdgeServeError):
                self._loader.prepare(key_of_tier(form.model_id, form.profile.tier))
        self._unusable = unusable
        return selection.catalog

    async def _warm_up(self, catalog: Catalog) -> None:
        from serve_app.models.warm_up import warm_up

        await asyncio.to_thread(warm_up, self._loader, catalog)

    def _make_worker(self, catalog: Catalog) -> Worker:
        config, identity = self._config, self._identity
        metrics = WorkerMetrics(identity.location, identity.replica)
        budget = config.memory_budget(catalog)
        return Worker(
            identity=identity,
            catalog=catalog,
            manager=self._make_manager(_make_cache(config, catalog, budget, identity.replica), metrics),
            exec_slots=config.settings.worker.parallel_inferences,
            coordinator=_make_client(config, catalog),
            rules=config.routing_rules(catalog),
            retention=config.retention_rules(catalog),
            metrics=metrics,
            process_budget=_make_process_budget(budget),
            max_pixels=config.settings.limits.image_pixels,
            find_blob=self._store.blob_path,
            unusable=self._unusable,
            look_for_versions=self._versions.look,
            # Who wants several threads for every inference has chosen them.
            cores=usable_cores() if config.settings.worker.threads_per_inference == 1 else 1,
        )

    def _make_manager(self, cache: ModelCache, metrics: WorkerMetrics) -> ModelManager:
        worker = self._config.settings.worker
        return ModelManager(
            cache=cache,
            backend=self._loader,
            loaders=ThreadPoolExecutor(worker.parallel_loads, thread_name_prefix="load"),
            # An executor has at least one thread; without preloads that thread never starts.
            preloaders=ThreadPoolExecutor(max(1, worker.parallel_preloads), thread_name_prefix="preload"),
            clock=time.monotonic,
            call_at=asyncio.get_running_loop().call_at,
            observer=metrics,
        )

    async def _open_local_rpc(self) -> None:
        try:
            await self._local_rpc.open(sockets_dir(), self._identity.replica)
        except OSError as error:
            logger.warning("routers of this host reach this worker through Serve, which takes longer: %s", error)

    async def reconfigure(self, user_config: Any) -> None:
        """Called by Serve after the constructor and at every change of the configuration."""
        config = ReplicaConfig.from_json(user_config)
        if config == self._config:
            return
        await self._versions.follow(config.project)
        await self._go_on(config)
        logger.info("going on with the new configuration")

    async def _go_on(self, config: ReplicaConfig | None = None) -> None:
        """Go on with another configuration, or with other versions of the models."""
        async with self._changing:
            config = config or self._config
            catalog = await asyncio.to_thread(self._prepare_models, config)
            is_other_policy = config.settings.policy != self._config.settings.policy
            try:
                self._worker.reconfigure(
                    catalog=catalog,
                    budget=config.memory_budget(catalog),
                    policy=config.eviction_policy(self._identity.replica) if is_other_policy else None,
                    rules=config.routing_rules(catalog),
                    retention=config.retention_rules(catalog),
                    coordination=config.coordinator_rules(catalog, self._store.projects.written_ns(config.project)),
                    unusable=self._unusable,
                )
            except ValueError as error:
                # An exception would have Serve replace this replica by one that cannot take the configuration either.
                logger.error("going on with the configuration of before: %s", error)
                return
            self._config = config

    def _served(self) -> tuple[str, ...]:
        return tuple(entry.model_id for entry in self._config.entries)

    async def infer(self, task: InferenceTask, replica: str | None = None) -> Reply:
        """``Worker.infer``; ``replica`` is for ``NamedReplicaRequestRouter``."""
        return await self._worker.infer(task)

    async def ping(self, payload: bytes) -> None:
        """Return at once: the caller measures the round trip."""

    async def preload(self, model_id: str, replica: str | None = None) -> None:
        """``Worker.preload``; ``replica`` is for ``NamedReplicaRequestRouter``."""
        await self._worker.preload(model_id)

    async def load(self, model_id: str) -> InferenceRejected | None:
        """``Worker.load``."""
        return await self._worker.load(model_id)

    async def unload(self, model_id: str, replica: str | None = None) -> InferenceRejected | None:
        """``Worker.unload``; ``replica`` is for ``NamedReplicaRequestRouter``."""
        return await self._worker.unload(model_id)

    async def __del__(self) -> None:
        self._versions.stop()
        # Serve has drained its own calls by now. While the worker leaves, routers stop sending it requests.
        await self._worker.leave()
        await self._local_rpc.close()
        await self._worker.stop()


class RouterReplica:
    """A router replica: a ``Router`` and its parts, behind HTTP.

    Args:
        config: of the location, or of the gateway.
        token: requests must carry it; None: any request is served.
        worker: the handle to the location's workers, which makes Serve deploy them with the router.
    """

    def __init__(self, config: ReplicaConfig, token: str | None, worker: Any = None) -> None:
        _log_to_serve()
        keep_freed_memory()
        settings = config.settings
        self._store = ModelStore(settings.store)
        catalog = self._store.select(config.entries, config.project, config.versions, environments()).catalog
        self._config = config
        self._token = token
        self._versions = VersionWatcher(self._store.projects, config.project, self._go_on, self._served)
        self._changing = asyncio.Lock()
        self._router = Router(
            catalog=catalog,
            locations=tuple(settings.locations),
            home=config.location or settings.gateway_location,
            stands_in=config.location is None,
            rules=config.routing_rules(catalog),
            pool=ServeWorkerPool(sockets_dir()),
            coordinator=_make_client(config, catalog),
            metrics=RouterMetrics(serve.get_replica_context().replica_id.unique_id),
            request_time_s=settings.limits.request_time,
            max_inflight=settings.limits.inflight,
        )

    def __serve_build_asgi_app__(self) -> FastAPI:
        """Called by Serve on the replica's event loop, after the constructor."""
        settings = self._config.settings
        self._router.start(settings.coordinator.report_every, self._config.location or "gateway")
        self._versions.start()
        http = HttpSettings(
            location=self._config.location,
            default_location=settings.gateway_location,
            limits=settings.limits,
            token=self._token,
        )
        app = build_http_app(self._router, http, MetricsScraper().scrape)
        fast_path.register(app.fast_path)
        _keep_from_garbage_collection()
        return app

    async def reconfigure(self, user_config: Any) -> None:
        """Called by Serve after the constructor and at every change of the configuration."""
        config = ReplicaConfig.from_json(user_config)
        if config == self._config:
            return
        await self._versions.follow(config.project)
        await self._go_on(config)
        logger.info("going on with the new configuration")

    async def _go_on(self, config: ReplicaConfig | None = None) -> None:
        """Go on with another configuration, or with other versions of the models."""
        async with self._changing:
            config = config or self._config
            selection = await asyncio.to_thread(
                self._store.select, config.entries, config.project, config.versions, environments()
            )
            catalog = selection.catalog
            self._router.reconfigure(
                catalog,
                tuple(config.settings.locations),
                config.routing_rules(catalog),
                config.coordinator_rules(catalog, self._store.projects.written_ns(config.project)),
            )
            self._config = config

    def _served(self) -> tuple[str, ...]:
        return tuple(entry.model_id for entry in self._config.entries)

    async def __del__(self) -> None:
        self._versions.stop()
        # Serve has drained its own requests by now, but those of the fast path bypass it.
        await self._router.drained()


def _log_to_serve() -> None:
    """Have the loggers of this package write to the log of this replica."""
    package_logger = logging.getLogger("serve_app")
    package_logger.handlers = ray_internals.serve_log_handlers()
    package_logger.setLevel(logging.INFO)
    package_logger.propagate = False


def _keep_from_garbage_collection() -> None:
    """Spare what the process has made by now, which stays: collections would look at it again and again, amid hits."""
    gc.collect()
    gc.freeze()


def _identity(config: ReplicaConfig) -> WorkerIdentity:
    """Return the name of this worker; raises ``ConfigError`` if its application does not have its location's name."""
    location, context = config.worker_location(), serve.get_replica_context()
    if location != context.app_name:
        raise ConfigError(f"application {context.app_name!r} must have the name of its location, {location!r}")
    return WorkerIdentity(location=location, replica=context.replica_id.unique_id)


def _make_client(config: ReplicaConfig, catalog: Catalog) -> CoordinatorClient:
    return CoordinatorClient(config.coordinator_rules(catalog), config.location)


def _make_loader(settings: EdgeSettings, store: ModelStore) -> Any:
    # Imported here: the process of a router must not load torch.
    from serve_app.models.loader import ModelLoader
    from serve_app.models.threads import use_threads

    use_threads(settings.worker.threads_per_inference, settings.worker.parallel_inferences)
    return ModelLoader(store, release_page_cache=settings.worker.release_page_cache)


def _make_cache(config: ReplicaConfig, catalog: Catalog, budget: MemoryBudget, replica: str) -> ModelCache:
    worker = config.settings.worker
    return ModelCache(
        capacity_bytes=budget.capacity_bytes,
        workspace_bytes=budget.workspace_bytes,
        policy=config.eviction_policy(replica),
        max_loads=worker.parallel_loads,
        max_preloads=worker.parallel_preloads,
        max_waiting=config.settings.limits.waiting,
        failure_memory_s=worker.failure_memory,
        pinned=[model.model_id for model in catalog.models if model.pinned],
    )


def _make_process_budget(budget: MemoryBudget) -> ProcessBudget:
    return ProcessBudget(budget, read=process_memory, give_back=give_back_free_memory)
