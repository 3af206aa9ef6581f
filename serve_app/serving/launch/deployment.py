"""Start, update and stop a deployment: Ray, the Serve applications, and the state kept between two commands."""

from __future__ import annotations

import json
import sys
import tempfile
import time
from dataclasses import asdict, replace
from pathlib import Path

import httpx

from serve_app.config import environment
from serve_app.serving import ray_internals
from serve_app.serving.launch.local_ray import (
    ProgressCallback,
    RunningDeployment,
    StartFailed,
    is_alive,
    join_ray,
    quiet_ray,
    reconnect,
    start_beside,
    start_ray,
    stop_ray,
)
from serve_app.serving.launch.serve_config import ServeFile

_READY_S = 180.0


def start(serve_file: ServeFile, on_progress: ProgressCallback) -> RunningDeployment:
    """Start or join Ray, deploy every application, and wait until all of them answer.

    Raises:
        StartFailed: an application did not come up; everything that this call has started is stopped again.
    """
    running = join_ray(serve_file, on_progress) or start_ray(serve_file, on_progress)
    try:
        write_state(running)
        deploy(serve_file, on_progress)
    except BaseException:
        on_progress("stopping what was started")
        stop(running)
        raise
    return running


def update(running: RunningDeployment, serve_file: ServeFile, on_progress: ProgressCallback) -> RunningDeployment:
    """Bring a running deployment in line with a changed configuration, without losing a request.

    Replicas take over the settings that they can. Where a replica must be replaced, the new one serves before the old
    one ends. Locations that are no longer configured end last, when no router forwards to them any more.

    Raises:
        StartFailed: the change is impossible, or an application does not get ready; the deployment goes on.
    """
    if serve_file.url != running.url:
        raise StartFailed(
            f"what is up answers at {running.url}, and cannot move to {serve_file.url} while it serves; "
            "stop it first with: edgeserve down"
        )
    reconnect(running)
    changed = replace(running, applications=tuple(dict.fromkeys((*running.applications, *serve_file.names))))
    # Before anything is deployed, so that `down` stops it.
    write_state(changed)
    deploy(serve_file, on_progress)
    removed = tuple(name for name in changed.applications if name not in serve_file.names)
    if removed:
        on_progress(f"stopping {', '.join(removed)}")
        _delete(removed)
    changed = replace(changed, applications=serve_file.names)
    write_state(changed)
    return changed


def require_writable_state() -> None:
    """Check that the state of a deployment can be kept.

    Raises:
        StartFailed: the state directory cannot be written.
    """
    try:
        _state_file().parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=_state_file().parent):
            pass
    except OSError as error:
        raise StartFailed(f"cannot write to {_state_file().parent} ({error.strerror}); set XDG_CACHE_HOME") from None


def stop(running: RunningDeployment) -> None:
    """Stop everything that ``start`` has started, and nothing else."""
    if running.pid is not None:
        stop_ray(running)
    else:
        _delete_applications(running)
    _state_file().unlink(missing_ok=True)


def compile_in_background(running: RunningDeployment, edge: Path) -> None:
    """Have the models of a deployment compiled for this machine by a process that ends by itself, or with it."""
    log = _state_file().with_name("compile.log")
    start_beside(running, [sys.executable, "-m", "serve_app", "publish", "--edge", str(edge)], log)


def write_state(running: RunningDeployment) -> None:
    """Keep the state of a deployment for a later ``edgeserve down``."""
    _state_file().write_text(json.dumps(asdict(running)))


def read_state() -> RunningDeployment | None:
    """The deployment of an earlier ``edgeserve up``, if it still runs."""
    try:
        content = json.loads(_state_file().read_text())
        running = RunningDeployment(**{**content, "applications": tuple(content["applications"])})
    except (OSError, ValueError, TypeError, KeyError):
        return None
    return running if is_alive(running) else None


def clean_up(running: RunningDeployment) -> bool:
    """Clean up after a deployment whose Ray has ended; false if ``edgeserve down`` has done that already."""
    if not _state_file().is_file():
        return False
    stop(running)
    return True


def deploy(serve_file: ServeFile, on_progress: ProgressCallback) -> None:
    """Deploy every application and wait until all of them answer.

    Raises:
        StartFailed: an application failed, or did not get ready in time.
    """
    from ray import serve

    from serve_app.serving.app import AppArgs, build
    from serve_app.serving.coordinator import actor

    on_progress(f"deploying {', '.join(app.name for app in serve_file.applications)}")
    edge = str(serve_file.edge_path())
    with quiet_ray():
        serve.start(
            proxy_location=serve_file.proxy_location,
            http_options={"host": serve_file.host, "port": serve_file.port},
            logging_config={"enable_access_log": serve_file.access_log},
        )
        serve.run_many(
            [
                serve.RunTarget(
                    build(AppArgs(edge=edge, location=app.location)),
                    name=app.name,
                    route_prefix=app.route_prefix,
                    logging_config={"enable_access_log": serve_file.access_log},
                )
                for app in serve_file.applications
            ],
            wait_for_ingress_deployment_creation=False,
            wait_for_applications_running=False,
        )
    _await_ready(serve_file, on_progress)
    # Not earlier: replicas that are still to be replaced would start a coordinator of the old code again.
    actor.end_outdated()


def _await_ready(serve_file: ServeFile, on_progress: ProgressCallback) -> None:
    from ray import serve

    deadline_s = time.monotonic() + _READY_S
    ready: set[str] = set()
    with httpx.Client(timeout=2.0, trust_env=False) as client:
        while len(ready) < len(serve_file.applications):
            if time.monotonic() > deadline_s:
                waiting = sorted(set(serve_file.names) - ready)
                raise StartFailed(f"{', '.join(waiting)} did not get ready within {_READY_S:.0f} s")
            applications = serve.status().applications
            hosts = _hosts(serve_file)
            for app in serve_file.applications:
                status = applications.get(app.name)
                if status is not None and status.status in ("DEPLOY_FAILED", "UNHEALTHY"):
                    raise StartFailed(f"{app.name} failed to deploy: {' '.join(status.message.split())[-600:]}")
                path = f"{app.route_prefix.rstrip('/')}/v2/health/ready"
                running = status is not None and status.status == "RUNNING"
                if not running or not all(_answers(client, f"http://{host}:{serve_file.port}{path}") for host in hosts):
                    # A host that has just joined may not have the route yet.
                    ready.discard(app.name)
                elif app.name not in ready:
                    ready.add(app.name)
                    on_progress(f"{app.name} is ready")
            time.sleep(0.2)


def _hosts(serve_file: ServeFile) -> list[str]:
    """The hosts on which the applications must answer: each has a proxy of its own that learns routes by itself."""
    if serve_file.host not in ("0.0.0.0", ""):
        return [serve_file.host]
    hosts = {"127.0.0.1"}
    if serve_file.proxy_location == "EveryNode":
        hosts |= ray_internals.replica_hosts(serve_file.names)
    return sorted(hosts)


def _answers(client: httpx.Client, url: str) -> bool:
    try:
        return client.get(url).status_code == httpx.codes.OK
    except httpx.HTTPError:
        return False


def _delete_applications(running: RunningDeployment) -> None:
    from ray import serve

    from serve_app.serving.coordinator import actor

    reconnect(running)
    _delete(running.applications)
    if not serve.status().applications:
        # Serve's proxies would keep the port.
        serve.shutdown()
    actor.end()


def _delete(applications: tuple[str, ...]) -> None:
    from ray import serve

    for name in applications:
        # Each application drains for half a minute: all of them at the same time.
        ray_internals.delete_application(name)
    while serve.status().applications.keys() & set(applications):
        time.sleep(0.5)


def _state_file() -> Path:
    return environment.state_dir() / "up.json"
