"""Starting and stopping a deployment: Ray, the Serve applications, and what remembers them between two commands."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil

from serve_app import config
from serve_app.errors import ConfigError, EdgeServeError

Say = Callable[[str], None]

#: Must be set before Ray starts: Serve's fast ingress (see DESIGN.md).
FAST_INGRESS = {
    "RAY_SERVE_ENABLE_HA_PROXY": "1",
    "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_DEDUP_LOGS": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}

_START_S = 60.0
_READY_S = 180.0
_STOP_S = 20.0


class StartFailed(EdgeServeError):
    """The deployment did not come up."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Application:
    """One entry of a Serve configuration file."""

    name: str
    route_prefix: str
    args: dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeFile:
    """What ``edgeserve up`` needs of a Serve configuration file such as ``deploy/local.yaml``."""

    path: Path
    applications: tuple[Application, ...]
    host: str
    port: int
    proxy_location: str
    access_log: bool

    @property
    def url(self) -> str:
        """Where the gateway answers."""
        host = "127.0.0.1" if self.host in ("0.0.0.0", "") else self.host  # noqa: S104
        return f"http://{host}:{self.port}"

    @property
    def locations(self) -> dict[str, str]:
        """URL of every location."""
        return {app.name: self.url + app.route_prefix for app in self.applications if app.args.get("location")}

    def edge_path(self) -> Path:
        """The ``edge.yaml`` that the applications share.

        Raises:
            ConfigError: they do not share one.
        """
        paths = {str(app.args.get("edge", "deploy/edge.yaml")) for app in self.applications}
        if len(paths) != 1:
            raise ConfigError(f"{self.path}: all applications must name the same edge file, not {sorted(paths)}")
        return Path(paths.pop())


@dataclass(frozen=True, slots=True, kw_only=True)
class Running:
    """What ``up`` has started. ``pid`` is that of our own Ray, None where one was joined."""

    address: str
    url: str
    applications: tuple[str, ...]
    pid: int | None
    created_s: float | None


def read_serve_file(path: Path) -> ServeFile:
    """Read a Serve configuration file.

    Raises:
        ConfigError: it is missing, malformed, or deploys something else.
    """
    path = config.find(path)
    content = config.load_yaml(path)
    try:
        http = content.get("http_options") or {}
        return ServeFile(
            path=path,
            applications=tuple(
                Application(name=app["name"], route_prefix=app["route_prefix"], args=dict(app.get("args") or {}))
                for app in content["applications"]
            ),
            host=str(http.get("host", "127.0.0.1")),
            port=int(http.get("port", 8000)),
            proxy_location=str(content.get("proxy_location", "EveryNode")),
            access_log=bool((content.get("logging_config") or {}).get("enable_access_log", True)),
        )
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ConfigError(
            f"{path}: not a Serve configuration file ({type(error).__name__}: {error}); deploy/local.yaml is an example"
        ) from None


def bring_up(serve_file: ServeFile, say: Say) -> Running:
    """Start or join Ray, deploy every application, and wait until all of them answer.

    Raises:
        StartFailed: something did not come up; what this call had started is stopped again.
    """
    if recall() is not None:
        raise StartFailed("edgeserve is up already; stop it with: edgeserve down")
    config.preset(FAST_INGRESS)
    running = _join(serve_file, say) or _start(serve_file, say)
    remember(running)
    try:
        _deploy(serve_file, say)
        _await_ready(serve_file, say)
    except BaseException:
        say("stopping what was started")
        bring_down(running)
        raise
    return running


def bring_down(running: Running) -> None:
    """Stop what ``bring_up`` started, and nothing else."""
    if running.pid is not None:
        _stop_ray(running)
    else:
        _delete_applications(running)
    _state_file().unlink(missing_ok=True)


def remember(running: Running) -> None:
    """Keep what was started for a later ``edgeserve down``."""
    path = _state_file()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(asdict(running)))


def recall() -> Running | None:
    """What an earlier ``up`` has started and is still there."""
    try:
        content = json.loads(_state_file().read_text())
        running = Running(**{**content, "applications": tuple(content["applications"])})
    except (OSError, ValueError, TypeError, KeyError):
        return None
    return running if running.pid is None or _process(running) is not None else None


def is_alive(running: Running) -> bool:
    """Whether our own Ray still runs; a joined one is taken to."""
    return running.pid is None or _process(running) is not None


def _join(serve_file: ServeFile, say: Say) -> Running | None:
    import ray

    wanted = config.ray_address()
    try:
        with _quiet_ray():
            context = ray.init(address=wanted or "auto", log_to_driver=False, logging_level=logging.ERROR)
    except ConnectionError as error:
        if wanted is None:
            return None
        raise StartFailed(f"no Ray cluster answers at RAY_ADDRESS={wanted} ({error}); start it or unset it") from None
    address = str(context.address_info["gcs_address"])
    say(f"joined the Ray cluster at {address}")
    return _running(serve_file, address, None)


def _start(serve_file: ServeFile, say: Say) -> Running:
    import ray

    _require_free(serve_file)
    address = f"127.0.0.1:{_free_port()}"
    log = tempfile.NamedTemporaryFile("w+", prefix="edgeserve-ray-", suffix=".log", delete=False)  # noqa: SIM115
    say("starting Ray on this machine")
    command = [
        sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", "--disable-usage-stats",
        "--node-ip-address=127.0.0.1", f"--port={address.rpartition(':')[2]}",
    ]  # fmt: skip
    process = subprocess.Popen(  # noqa: S603
        command, stdout=log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, start_new_session=True
    )
    running = _running(serve_file, address, process.pid)
    deadline_s = time.monotonic() + _START_S
    while True:
        try:
            with _quiet_ray():
                ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
            break
        except (ConnectionError, RuntimeError, ValueError, TimeoutError) as error:
            if process.poll() is not None or time.monotonic() > deadline_s:
                _stop_ray(running)
                raise StartFailed(f"Ray did not start ({error}); its output is in {log.name}") from None
            time.sleep(0.2)
    Path(log.name).unlink(missing_ok=True)
    return running


def _deploy(serve_file: ServeFile, say: Say) -> None:
    from ray import serve

    from serve_app.serving.app import AppArgs, build

    say(f"deploying {', '.join(app.name for app in serve_file.applications)}")
    edge = str(config.find(serve_file.edge_path()).absolute())
    with _quiet_ray():
        serve.start(
            proxy_location=serve_file.proxy_location,
            http_options={"host": serve_file.host, "port": serve_file.port},
            logging_config={"enable_access_log": serve_file.access_log},
        )
        serve.run_many(
            [
                serve.RunTarget(
                    build(AppArgs(edge=edge, location=app.args.get("location"))),
                    name=app.name,
                    route_prefix=app.route_prefix,
                    logging_config={"enable_access_log": serve_file.access_log},
                )
                for app in serve_file.applications
            ],
            wait_for_ingress_deployment_creation=False,
            wait_for_applications_running=False,
        )


def _await_ready(serve_file: ServeFile, say: Say) -> None:
    from ray import serve

    deadline_s = time.monotonic() + _READY_S
    waiting = {app.name for app in serve_file.applications}
    with httpx.Client(timeout=2.0) as client:
        while waiting:
            if time.monotonic() > deadline_s:
                raise StartFailed(f"{', '.join(sorted(waiting))} did not get ready within {_READY_S:.0f} s")
            applications = serve.status().applications
            for app in serve_file.applications:
                status = applications.get(app.name)
                if status is not None and status.status in ("DEPLOY_FAILED", "UNHEALTHY"):
                    raise StartFailed(f"{app.name} failed to deploy: {' '.join(status.message.split())[-600:]}")
                url = f"{serve_file.url}{app.route_prefix.rstrip('/')}/v2/health/ready"
                if app.name in waiting and _answers(client, url):
                    waiting.discard(app.name)
                    say(f"{app.name} is ready")
            time.sleep(0.2)


def _answers(client: httpx.Client, url: str) -> bool:
    try:
        return client.get(url).status_code == httpx.codes.OK
    except httpx.HTTPError:
        return False


def _delete_applications(running: Running) -> None:
    import ray
    from ray import serve

    from serve_app.serving import coordinator

    if not ray.is_initialized():
        ray.init(address=running.address, log_to_driver=False, logging_level=logging.ERROR)
    for name in running.applications:
        serve.delete(name)
    with contextlib.suppress(ValueError):
        ray.kill(ray.get_actor(coordinator.NAME, namespace=coordinator.NAMESPACE))


def _stop_ray(running: Running) -> None:
    import ray

    ray.shutdown()
    process = _process(running)
    if process is None:
        return
    family = [process, *process.children(recursive=True)]
    process.send_signal(signal.SIGTERM)
    _, left = psutil.wait_procs(family, timeout=_STOP_S)
    for straggler in left:
        with contextlib.suppress(psutil.NoSuchProcess):
            straggler.kill()


def _process(running: Running) -> psutil.Process | None:
    """Our Ray's process, unless its number now belongs to another."""
    try:
        process = psutil.Process(running.pid)
        same = running.created_s is None or abs(process.create_time() - running.created_s) < 1.0
        return process if same and process.status() != psutil.STATUS_ZOMBIE else None
    except psutil.NoSuchProcess:
        return None


def _running(serve_file: ServeFile, address: str, pid: int | None) -> Running:
    return Running(
        address=address,
        url=serve_file.url,
        applications=tuple(app.name for app in serve_file.applications),
        pid=pid,
        created_s=psutil.Process(pid).create_time() if pid is not None else None,
    )


def _require_free(serve_file: ServeFile) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((serve_file.host, serve_file.port))
        except OSError as error:
            raise StartFailed(
                f"cannot listen on {serve_file.host}:{serve_file.port} ({error.strerror}); "
                f"stop what uses the port or change http_options in {serve_file.path}"
            ) from None


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def _quiet_ray() -> Iterator[None]:
    """Ray and Serve tell at length what they do; the user reads our own few lines instead."""
    for name in ("ray", "ray.serve"):
        logging.getLogger(name).setLevel(logging.ERROR)
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stderr(nowhere):  # noqa: PTH123
        yield


def _state_file() -> Path:
    return config.state_dir() / "up.json"
