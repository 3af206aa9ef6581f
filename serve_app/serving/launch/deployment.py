"""Bringing a deployment up and down: Ray, the Serve applications, and what is remembered between two commands."""

from __future__ import annotations

import json
import tempfile
import time
from dataclasses import asdict, replace
from pathlib import Path

import httpx

from serve_app.config import environment, yaml_files
from serve_app.serving import ray_internals
from serve_app.serving.launch.local_ray import (
    Running,
    Say,
    StartFailed,
    is_alive,
    join_ray,
    quiet_ray,
    rejoin,
    start_ray,
    stop_ray,
)
from serve_app.serving.launch.serve_config import ServeFile

_READY_S = 180.0


def bring_up(serve_file: ServeFile, say: Say) -> Running:
    """Start or join Ray, deploy every application, and wait until all of them answer.

    Raises:
        StartFailed: something did not come up; what this call had started is stopped again.
    """
    running = join_ray(serve_file, say) or start_ray(serve_file, say)
    try:
        remember(running)
        deploy(serve_file, say)
    except BaseException:
        say("stopping what was started")
        bring_down(running)
        raise
    return running


def change(running: Running, serve_file: ServeFile, say: Say) -> Running:
    """Bring what is up in line with a configuration that has changed, while it serves.

    What a replica can take in while it runs, it takes in; where it must be replaced, the new one serves before the old
    one ends. Locations that are no longer configured end last, when nobody forwards to them any more.

    Raises:
        StartFailed: it cannot be changed like that, or does not get ready; what is up stays up.
    """
    if serve_file.url != running.url:
        raise StartFailed(
            f"what is up answers at {running.url}, and cannot move to {serve_file.url} while it serves; "
            "stop it first with: edgeserve down"
        )
    rejoin(running)
    changed = replace(running, applications=tuple(dict.fromkeys((*running.applications, *serve_file.names))))
    # Before anything is deployed, so that `down` knows of it.
    remember(changed)
    deploy(serve_file, say)
    left = tuple(name for name in changed.applications if name not in serve_file.names)
    if left:
        say(f"stopping {', '.join(left)}")
        _delete(left)
    changed = replace(changed, applications=serve_file.names)
    remember(changed)
    return changed


def require_writable() -> None:
    """Make sure that what is started can be remembered.

    Raises:
        StartFailed: the state directory cannot be written.
    """
    try:
        _state_file().parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=_state_file().parent):
            pass
    except OSError as error:
        raise StartFailed(f"cannot write to {_state_file().parent} ({error.strerror}); set XDG_CACHE_HOME") from None


def bring_down(running: Running) -> None:
    """Stop what ``bring_up`` started, and nothing else."""
    if running.pid is not None:
        stop_ray(running)
    else:
        _delete_applications(running)
    _state_file().unlink(missing_ok=True)


def remember(running: Running) -> None:
    """Keep what was started for a later ``edgeserve down``."""
    _state_file().write_text(json.dumps(asdict(running)))


def recall() -> Running | None:
    """What an earlier ``up`` has started, if it still runs."""
    try:
        content = json.loads(_state_file().read_text())
        running = Running(**{**content, "applications": tuple(content["applications"])})
    except (OSError, ValueError, TypeError, KeyError):
        return None
    return running if is_alive(running) else None


def forget(running: Running) -> bool:
    """Clean up after a deployment that has ended without us; false if somebody else has done that already."""
    if not _state_file().is_file():
        return False
    bring_down(running)
    return True


def deploy(serve_file: ServeFile, say: Say) -> None:
    """Deploy every application and wait until all of them answer; raises ``StartFailed``."""
    from ray import serve

    from serve_app.serving.app import AppArgs, build
    from serve_app.serving.coordinator import actor

    say(f"deploying {', '.join(app.name for app in serve_file.applications)}")
    edge = str(yaml_files.find(serve_file.edge_path()).absolute())
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
    _await_ready(serve_file, say)
    # Not before: what is being replaced would start one of its own kind again.
    actor.end_outdated()


def _await_ready(serve_file: ServeFile, say: Say) -> None:
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
                    # A host that has just come in may not know it yet.
                    ready.discard(app.name)
                elif app.name not in ready:
                    ready.add(app.name)
                    say(f"{app.name} is ready")
            time.sleep(0.2)


def _hosts(serve_file: ServeFile) -> list[str]:
    """Where the applications must answer: each host has a proxy of its own, and they learn of replicas one by one."""
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


def _delete_applications(running: Running) -> None:
    from ray import serve

    from serve_app.serving.coordinator import actor

    rejoin(running)
    _delete(running.applications)
    if not serve.status().applications:
        # Its proxies would hold the port.
        serve.shutdown()
    actor.end()


def _delete(applications: tuple[str, ...]) -> None:
    from ray import serve

    for name in applications:
        # Each takes half a minute to drain, so not one after another.
        ray_internals.delete_application(name)
    while serve.status().applications.keys() & set(applications):
        time.sleep(0.5)


def _state_file() -> Path:
    return environment.state_dir() / "up.json"
