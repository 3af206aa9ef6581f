"""What Ray Serve runs: the router and the worker, composed from configuration."""

import asyncio
import logging
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from fastapi import FastAPI
from ray import serve

from serve_app.config.environment import sockets_dir
from serve_app.core.cache.model_cache import ModelCache
from serve_app.core.catalog import Catalog
from serve_app.errors import ConfigError
from serve_app.serving import ray_internals
from serve_app.serving.api import fast_path
from serve_app.serving.api.http_app import build_http_app
from serve_app.serving.api.metrics_scrape import MetricsScraper
from serve_app.serving.api.request_reader import HttpSettings
from serve_app.serving.metrics import RouterMetrics, WorkerMetrics
from serve_app.serving.replica_config import ReplicaConfig
from serve_app.serving.router.router import Router
from serve_app.serving.transport.local_rpc import LocalRpcServer
from serve_app.serving.transport.worker_client import ServeWorkerPool
from serve_app.serving.worker.model_host import ModelHost
from serve_app.serving.worker.process_budget import ProcessBudget
from serve_app.serving.worker.worker import Worker, WorkerIdentity
from serve_app.store.model_store import ModelStore

logger = logging.getLogger(__name__)


def _log_with_serve() -> None:
    """Have the loggers of this package write to the log of this replica."""
    ours = logging.getLogger("serve_app")
    ours.handlers = ray_internals.serve_log_handlers()
    ours.setLevel(logging.INFO)
    ours.propagate = False


class WorkerReplica:
    """One worker replica: a ``Worker`` with its parts put together."""

    async def __init__(self, deployed: ReplicaConfig) -> None:  # type: ignore[misc]
        # Here and not above: the router's process must not pay for torch.
        from serve_app.models.loader import ModelLoader, use_threads
        from serve_app.models.process_memory import give_back_free_memory, process_memory
        from serve_app.models.warm_up import warm_up

        _log_with_serve()
        settings, location = deployed.settings, deployed.location
        context = serve.get_replica_context()
        if location is None or location != context.app_name:
            raise ConfigError(f"application {context.app_name!r} must have the name of its location, {location!r}")
        use_threads(settings.worker.threads_per_inference)
        self._deployed = deployed
        self._loader = loader = ModelLoader(
            ModelStore(settings.store), release_page_cache=settings.worker.release_page_cache
        )
        catalog = self._prepared(deployed)
        await asyncio.to_thread(warm_up, loader, catalog)
        self._replica = replica = context.replica_id.unique_id
        metrics = WorkerMetrics(location, replica)
        budget = deployed.budget(catalog)
        cache = ModelCache(
            capacity_bytes=budget.models_bytes,
            policy=deployed.policy(replica),
            max_loads=settings.worker.parallel_loads,
            max_preloads=settings.worker.parallel_preloads,
            max_waiting=settings.limits.waiting,
            failure_memory_s=settings.worker.failure_memory,
            pinned=[model.model_id for model in catalog.models if model.pinned],
        )
        self._worker = Worker(
            identity=WorkerIdentity(location=location, replica=replica),
            catalog=catalog,
            host=ModelHost(
                cache=cache,
                backend=loader,
                loaders=ThreadPoolExecutor(settings.worker.parallel_loads, thread_name_prefix="load"),
                # Without preloads it starts no thread; an executor of none does not exist.
                preloaders=ThreadPoolExecutor(max(1, settings.worker.parallel_preloads), thread_name_prefix="preload"),
                clock=time.monotonic,
                call_at=asyncio.get_running_loop().call_at,
                observer=metrics,
            ),
            exec_slots=settings.worker.parallel_inferences,
            link=deployed.link(catalog),
            rules=deployed.rules(catalog),
            holding=deployed.holding(),
            metrics=metrics,
            memory=ProcessBudget(budget, read=process_memory, give_back=give_back_free_memory),
            max_pixels=settings.limits.image_pixels,
        )
        self._exchange = LocalRpcServer(self._worker.infer)
        try:
            await self._exchange.open(sockets_dir(), replica)
        except OSError as error:
            logger.warning("routers of this host must take the long way, by Serve: %s", error)
        await self._worker.preload_pinned()
        self._worker.start(settings.coordinator.report_every)

    def _prepared(self, deployed: ReplicaConfig) -> Catalog:
        """The models of this node's store, each ready to be loaded."""
        catalog = deployed.catalog()
        for model in catalog.models:
            try:
                self._loader.prepare(model.model_id)
            except Exception:
                # A factory may fail in any way, and one unusable model must not keep the others from being served.
                logger.exception("model %s cannot be served", model.model_id)
        return catalog

    async def reconfigure(self, user_config: Any) -> None:
        """Called by Serve, once after the constructor and whenever the configuration has changed."""
        deployed = ReplicaConfig.from_json(user_config)
        if deployed == self._deployed:
            return
        catalog = await asyncio.to_thread(self._prepared, deployed)
        other_policy = deployed.settings.policy != self._deployed.settings.policy
        try:
            self._worker.reconfigure(
                catalog=catalog,
                budget=deployed.budget(catalog),
                policy=deployed.policy(self._replica) if other_policy else None,
                rules=deployed.rules(catalog),
                holding=deployed.holding(),
                coordination=deployed.coordination(catalog),
            )
        except ValueError as error:
            # Serve would replace this replica by one that cannot take it either.
            logger.error("going on with the configuration of before: %s", error)
            return
        self._deployed = deployed
        logger.info("going on with the new configuration")

    async def infer(self, work: Any, replica: str | None = None) -> Any:
        """``Worker.infer``; ``replica`` is for ``NamedReplicaRouter``."""
        return await self._worker.infer(work)

    async def ping(self, payload: bytes) -> None:
        """Nothing: what it takes to get here and back is what the caller wants to know."""

    async def preload(self, model_id: str, replica: str | None = None) -> None:
        """``Worker.preload``; ``replica`` is for ``NamedReplicaRouter``."""
        await self._worker.preload(model_id)

    async def load(self, model_id: str) -> Any:
        """``Worker.load``."""
        return await self._worker.load(model_id)

    async def unload(self, model_id: str, replica: str | None = None) -> Any:
        """``Worker.unload``; ``replica`` is for ``NamedReplicaRouter``."""
        return await self._worker.unload(model_id)

    async def __del__(self) -> None:
        # By now Serve has seen its own calls through. Routers learn in here that they should ask others.
        await self._worker.leave()
        await self._exchange.close()
        await self._worker.stop()


class RouterReplica:
    """One router replica: a ``Router`` with its parts put together, behind HTTP."""

    def __init__(self, deployed: ReplicaConfig, token: str | None, worker: Any = None) -> None:
        _log_with_serve()
        settings = deployed.settings
        catalog = deployed.catalog()
        self._deployed = deployed
        self._token = token
        self._router = Router(
            catalog=catalog,
            locations=tuple(settings.locations),
            home=deployed.location or settings.gateway_location,
            stands_in=deployed.location is None,
            rules=deployed.rules(catalog),
            pool=ServeWorkerPool(sockets_dir()),
            link=deployed.link(catalog),
            metrics=RouterMetrics(serve.get_replica_context().replica_id.unique_id),
            request_time_s=settings.limits.request_time,
            max_inflight=settings.limits.inflight,
        )

    def __serve_build_asgi_app__(self) -> FastAPI:
        """Called by Serve on the replica's event loop, after the constructor."""
        settings = self._deployed.settings
        self._router.start(settings.coordinator.report_every, self._deployed.location or "gateway")
        http = HttpSettings(
            location=self._deployed.location,
            default_location=settings.gateway_location,
            limits=settings.limits,
            token=self._token,
        )
        app = build_http_app(self._router, http, MetricsScraper().scrape)
        fast_path.register(app.fast_path)
        return app

    async def reconfigure(self, user_config: Any) -> None:
        """Called by Serve, once after the constructor and whenever the configuration has changed."""
        deployed = ReplicaConfig.from_json(user_config)
        if deployed == self._deployed:
            return
        catalog = await asyncio.to_thread(deployed.catalog)
        self._router.reconfigure(
            catalog, tuple(deployed.settings.locations), deployed.rules(catalog), deployed.coordination(catalog)
        )
        self._deployed = deployed
        logger.info("going on with the new configuration")

    async def __del__(self) -> None:
        # Serve has waited for the requests that it knows of; those of the hot path it does not.
        await self._router.drained()
