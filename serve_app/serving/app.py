"""The Serve applications: one per location, and a gateway. The import path of ``deploy/*.yaml``.

No ``from __future__ import annotations`` here: with it, Serve would hand the builder a plain dict.
"""

import asyncio
import hashlib
import logging
import random
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from pydantic import BaseModel, ConfigDict, TypeAdapter
from ray import serve
from ray.serve.config import RequestRouterConfig

from serve_app.config import EdgeSettings, LocationSettings, find, lines_dir, load_catalog, load_edge, load_token
from serve_app.core.budget import Budget, divide
from serve_app.core.cache import ModelCache
from serve_app.core.catalog import Catalog, ModelEntry
from serve_app.core.coordination import CoordinatorRules, PlacementSettings
from serve_app.core.eviction_policy import EvictionPolicy
from serve_app.core.placement_rules import PlacementRules
from serve_app.core.policies import make_policy
from serve_app.core.routing import RoutingRules
from serve_app.errors import ConfigError
from serve_app.models.store import ModelStore
from serve_app.serving import code
from serve_app.serving.coordinator import CoordinatorLink
from serve_app.serving.http import HttpSettings, build_http_app
from serve_app.serving.line import Exchange
from serve_app.serving.metrics import RouterMetrics, WorkerMetrics
from serve_app.serving.model_host import ModelHost
from serve_app.serving.router import Router
from serve_app.serving.scrape import MetricsScraper
from serve_app.serving.worker import HoldingRules, Worker, WorkerIdentity
from serve_app.serving.worker_memory import WorkerMemory
from serve_app.serving.worker_pool import WORKER, NamedReplicaRouter, ServeWorkerPool

logger = logging.getLogger(__name__)

#: Serve's own limit would answer without our error shape, so ours (``limits``) must bind first.
_SERVE_LIMIT = 100_000

#: Every arena of the heap keeps what its threads have freed: with one for each thread, workspace stays taken several
#: times over. Two are as fast as many for executions that run in parallel; one is not.
_WORKER_ENVIRONMENT = {"MALLOC_ARENA_MAX": "2"}

#: A typical request, for placement: a photograph.
_PAYLOAD_BYTES = 200_000


class AppArgs(BaseModel):
    """Arguments of an application in ``deploy/*.yaml``; without ``location`` it is the gateway."""

    model_config = ConfigDict(extra="forbid")

    edge: str = "deploy/edge.yaml"
    location: str | None = None
    #: Anything. `serve deploy` builds an application anew, from its files as they are then, when its arguments change.
    revision: str | None = None


def _log_with_serve() -> None:
    """Let this replica's log take in what we have to say; Serve sets up its own loggers only."""
    ours = logging.getLogger("serve_app")
    ours.handlers = logging.getLogger("ray.serve").handlers
    ours.setLevel(logging.INFO)
    ours.propagate = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Deployed:
    """What a replica is told: everything that was configured. The store is read where the replica runs.

    It is the Serve applications' ``user_config``, so a change of it reaches the replicas while they serve.
    """

    settings: EdgeSettings
    entries: tuple[ModelEntry, ...]
    location: str | None
    issued: int = 0

    def to_json(self) -> Any:
        """As plain values, which is all that Serve takes."""
        return _DEPLOYED.dump_python(self, mode="json")

    @staticmethod
    def from_json(content: Any) -> "Deployed":
        """What ``to_json`` has made plain."""
        return _DEPLOYED.validate_python(content)

    def budget(self, catalog: Catalog) -> Budget:
        """How a worker of this location divides its memory."""
        return divide(self.here.memory, catalog.models, self.settings.worker.parallel_inferences)

    @property
    def here(self) -> LocationSettings:
        """The settings of the replica's location; the gateway has none."""
        assert self.location is not None
        return self.settings.locations[self.location]

    def policy(self, replica: str) -> EvictionPolicy:
        """A policy for the cache of a worker."""
        return make_policy(self.settings.policy.name, random.Random(replica), **self.settings.policy.parameters)

    def catalog(self) -> Catalog:
        """The models that the store of this node holds."""
        return ModelStore(self.settings.store).catalog(self.entries)

    def rules(self, catalog: Catalog) -> RoutingRules:
        """The rules that routers and workers share."""
        return RoutingRules(
            profiles=catalog.profiles(),
            links=self.settings.core_links(),
            default_link=self.settings.core_default_link(),
            horizon_s=self.settings.coordinator.horizon,
            # A report waits for its turn, and so does the view that brings it.
            staleness_s=2 * self.settings.coordinator.report_every,
        )

    def min_copies(self) -> dict[str, int]:
        """Models of which there must be a number of copies."""
        return {entry.model_id: entry.min_copies for entry in self.entries if entry.min_copies}

    def holding(self) -> HoldingRules:
        """What a worker of this location holds in any case."""
        worker = self.settings.worker
        return HoldingRules(
            preload=self.settings.locations[self.location].preload if self.location else (),
            min_copies=self.min_copies(),
            idle_unload_s=worker.idle_unload,
            hand_over_s=worker.hand_over,
        )

    def coordination(self, catalog: Catalog) -> CoordinatorRules:
        """How the coordinator is to work."""
        coordinator = self.settings.coordinator
        placement = None
        if coordinator.placement_every is not None:
            placement = PlacementSettings(
                routing=self.rules(catalog),
                every_s=coordinator.placement_every,
                payload_bytes=_PAYLOAD_BYTES,
                min_copies=self.min_copies(),
                rules=PlacementRules(withdraw_after_s=coordinator.withdraw_after),
            )
        return CoordinatorRules(
            issued=self.issued,
            half_life_s=coordinator.popularity_half_life,
            stale_after_s=coordinator.stale_after,
            placement=placement,
        )

    def link(self, catalog: Catalog) -> CoordinatorLink:
        """A connection to the coordinator."""
        return CoordinatorLink(self.coordination(catalog), self.location)


_DEPLOYED = TypeAdapter(Deployed)


class _WorkerReplica:
    """One worker replica: a ``Worker`` with its parts put together."""

    async def __init__(self, deployed: Deployed) -> None:  # type: ignore[misc]
        # Here and not above: the router's process must not pay for torch.
        from serve_app.models.heap import give_back_free_memory, process_memory
        from serve_app.models.loader import ModelLoader
        from serve_app.models.runtime import use_threads
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
            memory=WorkerMemory(budget, read=process_memory, give_back=give_back_free_memory),
            max_pixels=settings.limits.image_pixels,
        )
        self._exchange = Exchange(self._worker.infer)
        try:
            await self._exchange.open(lines_dir(), replica)
        except OSError as error:
            logger.warning("routers of this host must take the long way, by Serve: %s", error)
        await self._worker.preload_pinned()
        self._worker.start(settings.coordinator.report_every)

    def _prepared(self, deployed: Deployed) -> Catalog:
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
        deployed = Deployed.from_json(user_config)
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


class _RouterReplica:
    """One router replica: a ``Router`` with its parts put together, behind HTTP."""

    def __init__(self, deployed: Deployed, token: str | None, worker: Any = None) -> None:
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
            pool=ServeWorkerPool(lines_dir()),
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
        app.take_over()
        return app

    async def reconfigure(self, user_config: Any) -> None:
        """Called by Serve, once after the constructor and whenever the configuration has changed."""
        deployed = Deployed.from_json(user_config)
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


_COMMON: dict[str, Any] = {
    "max_ongoing_requests": _SERVE_LIMIT,
    "health_check_period_s": 2,
    "health_check_timeout_s": 10,
    "graceful_shutdown_timeout_s": 10,
    # A replica is replaced only when the new one serves: otherwise a location with one of them would be gone meanwhile.
    "max_surge_percent": 100,
}
WorkerDeployment = serve.deployment(
    name=WORKER, request_router_config=RequestRouterConfig(request_router_class=NamedReplicaRouter), **_COMMON
)(_WorkerReplica)
RouterDeployment = serve.deployment(name="Router", **_COMMON)(serve.ingress()(_RouterReplica))


def build(args: AppArgs) -> Any:
    """Build the Serve application of one location, or the gateway's.

    Raises:
        ConfigError: a configuration file is wrong, or the location is not in it.
    """
    settings = load_edge(Path(args.edge))
    if args.location is not None and args.location not in settings.locations:
        raise ConfigError(f"{args.edge}: no location {args.location!r}; there are {', '.join(settings.locations)}")
    deployed = Deployed(
        settings=settings,
        entries=load_catalog(settings.catalog),
        location=args.location,
        issued=max(_put_there_ns(find(path)) for path in (Path(args.edge), settings.catalog)),
    )
    token = load_token(settings)
    common = {"user_config": deployed.to_json()}
    if args.location is None:
        router = RouterDeployment.options(ray_actor_options={"num_cpus": 0}, **common)
        return _versioned(router, deployed, token).bind(deployed, token)
    location = settings.locations[args.location]
    actor: dict[str, Any] = {"num_cpus": 0}
    if location.pin_to_nodes:
        actor["label_selector"] = {"location": args.location}
    worker = WorkerDeployment.options(
        num_replicas=location.workers,
        ray_actor_options={**actor, "runtime_env": {"env_vars": _WORKER_ENVIRONMENT}},
        # It hands over when its requests have ended.
        graceful_shutdown_timeout_s=_COMMON["graceful_shutdown_timeout_s"] + settings.worker.hand_over,
        **common,
    )
    router = RouterDeployment.options(ray_actor_options=actor, **common)
    return _versioned(router, deployed, token).bind(deployed, token, _versioned(worker, deployed, token).bind(deployed))


def _put_there_ns(path: Path) -> int:
    """When a file was written or put there; a backup that is moved back has kept the time of its content."""
    status = path.stat()
    return max(status.st_mtime_ns, status.st_ctime_ns)


def _versioned(deployment: Any, deployed: Deployed, token: str | None) -> Any:
    """Give a deployment a version that changes only when its replicas must be replaced.

    Serve has no public way to say this to ``serve.run``, and replaces all replicas every time if nobody says it.
    """
    # Only the gateway stands in for a location, and it cannot move to another.
    stands_in_for = deployed.settings.gateway_location if deployed.location is None else ""
    parts = (code.digest(), deployed.settings.restart_digest(), token or "", stands_in_for)
    deployment._version = hashlib.sha256("".join(parts).encode()).hexdigest()[:16]
    return deployment
