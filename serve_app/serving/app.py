"""Builds the Serve applications, one for each location and a gateway; ``deploy/*.yaml`` name ``build``.

No ``from __future__ import annotations`` here: with it, Serve would pass the builder a plain dict.
"""

import hashlib
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict
from ray import serve
from ray.serve.config import RequestRouterConfig

from serve_app.config.catalog import load_catalog
from serve_app.config.default_files import find
from serve_app.config.edge import load_edge, load_token
from serve_app.errors import ConfigError
from serve_app.serving import code_version, ray_internals
from serve_app.serving.replica_config import ReplicaConfig
from serve_app.serving.replicas import RouterReplica, WorkerReplica
from serve_app.serving.transport.named_replica_request_router import NamedReplicaRequestRouter
from serve_app.serving.transport.worker_client import WORKER_DEPLOYMENT
from serve_app.store.model_store import ModelStore
from serve_app.store.projects import Project

#: Above every limit of ``limits``: Serve's own limit answers without EdgeServe's error format.
_SERVE_LIMIT = 100_000

#: Every arena of the heap keeps what its threads have freed: with an arena for each thread, the workspace of executions
#: stays allocated several times over. Two arenas are as fast as many for parallel executions; one is slower.
_WORKER_ENVIRONMENT = {"MALLOC_ARENA_MAX": "2"}


class AppArgs(BaseModel):
    """Arguments of an application in ``deploy/*.yaml``; without ``location`` it is the gateway."""

    model_config = ConfigDict(extra="forbid")

    edge: str = "deploy/edge.yaml"
    location: str | None = None
    #: Any text. `serve deploy` builds an application again, from the files of that time, when its arguments change.
    revision: str | None = None


_COMMON: dict[str, Any] = {
    "max_ongoing_requests": _SERVE_LIMIT,
    "health_check_period_s": 2,
    "health_check_timeout_s": 10,
    "graceful_shutdown_timeout_s": 10,
    # A replica ends only once its replacement serves; a location with one replica would be down in between.
    "max_surge_percent": 100,
}
WorkerDeployment = serve.deployment(
    name=WORKER_DEPLOYMENT,
    request_router_config=RequestRouterConfig(request_router_class=NamedReplicaRequestRouter),
    **_COMMON,
)(WorkerReplica)
RouterDeployment = serve.deployment(name="Router", **_COMMON)(serve.ingress()(RouterReplica))


def build(args: AppArgs) -> Any:
    """Build the Serve application of one location, or the gateway's.

    Raises:
        ConfigError: a configuration file is wrong, or the location is not in it.
    """
    edge = find(Path(args.edge))
    settings = load_edge(edge)
    if args.location is not None and args.location not in settings.locations:
        raise ConfigError(f"{args.edge}: no location {args.location!r}; there are {', '.join(settings.locations)}")
    store, project = ModelStore(settings.store), Project.of(find(settings.catalog)).key
    config = ReplicaConfig(
        settings=settings,
        # Here, where the files that it names are: the nodes of the replicas need not have them.
        entries=store.fingerprinted(load_catalog(settings.catalog)),
        location=args.location,
        project=project,
        versions=store.projects.read(project),
        issued=max(*(_written_ns(path) for path in (edge, settings.catalog)), store.projects.written_ns(project)),
    )
    token = load_token(settings)
    common = {"user_config": config.to_json()}
    if args.location is None:
        router = RouterDeployment.options(ray_actor_options={"num_cpus": 0}, **common)
        return _versioned(router, config, token).bind(config, token)
    location = settings.locations[args.location]
    actor: dict[str, Any] = {"num_cpus": 0}
    if location.pin_to_nodes:
        actor["label_selector"] = {"location": args.location}
    worker = WorkerDeployment.options(
        num_replicas=location.workers,
        ray_actor_options={**actor, "runtime_env": {"env_vars": _WORKER_ENVIRONMENT}},
        # The worker hands its models over after its requests have ended.
        graceful_shutdown_timeout_s=_COMMON["graceful_shutdown_timeout_s"] + settings.worker.hand_over,
        **common,
    )
    router = RouterDeployment.options(ray_actor_options=actor, **common)
    return _versioned(router, config, token).bind(config, token, _versioned(worker, config, token).bind(config))


def _written_ns(path: Path) -> int:
    """Return when a file was written or moved to its path; a backup that is restored keeps the time of its content."""
    status = path.stat()
    return max(status.st_mtime_ns, status.st_ctime_ns)


def _versioned(deployment: Any, config: ReplicaConfig, token: str | None) -> Any:
    """Give a deployment a version that changes only when its replicas must be replaced."""
    # The gateway stands in for one location, and cannot change to another while it runs.
    stands_in_for = config.settings.gateway_location if config.location is None else ""
    parts = (code_version.digest(), config.settings.restart_digest(), token or "", stands_in_for)
    return ray_internals.set_version(deployment, hashlib.sha256("".join(parts).encode()).hexdigest()[:16])
