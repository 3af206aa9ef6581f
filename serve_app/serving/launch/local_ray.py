"""The Ray cluster of a deployment: joined if one runs, else started on this machine and stopped again."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from serve_app.config.environment import child_environment, has_ray_token, preset, ray_address, ray_temp_dir
from serve_app.errors import EdgeServeError
from serve_app.serving import ray_internals
from serve_app.serving.launch.serve_config import ServeFile

#: Called with one line for the user.
ProgressCallback = Callable[[str], None]

#: Variables of Serve's fast ingress (serve_app/docs/serving.md); they must be set before Ray starts.
FAST_INGRESS = {
    "RAY_SERVE_ENABLE_HA_PROXY": "1",
    "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
    # Throughput mode would buffer a thousand log lines in memory, and a dead replica would lose them.
    "RAY_SERVE_REQUEST_PATH_LOG_BUFFER_SIZE": "1",
    # The third failed check replaces a dead HAProxy: with Serve's ten seconds, after half a minute without connections.
    "RAY_SERVE_PROXY_HEALTH_CHECK_PERIOD_S": "1",
    # HAProxy would send a line for each request to a process of Serve's, for metrics that EdgeServe has of its own.
    "RAY_SERVE_HAPROXY_METRICS_ENABLED": "0",
    # Otherwise requests from router to worker end at 4 MiB: seven images.
    "RAY_SERVE_REPLICA_GRPC_MAX_MESSAGE_LENGTH": "2147483647",
    # Inference detects by itself that its client has gone; Serve's own detection takes longer.
    "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "serve_app.serving.api.fast_path:middlewares",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}

#: The same for a Ray that EdgeServe starts, without a token: `ray start` would require one if this user has one, and
#: drivers do not present it.
_OWN_RAY = {**FAST_INGRESS, "RAY_AUTH_MODE": "disabled"}

#: Marks every process of a Ray that EdgeServe starts.
_RUN_VARIABLE = "EDGESERVE_RUN_ID"
#: Marks processes that run beside Ray and are no part of it.
_BESIDE_VARIABLE = "EDGESERVE_BESIDE"
#: Of those, see nice(1).
_LOW_PRIORITY = 19
_START_S = 60.0
_STOP_S = 5.0
_KILL_ROUNDS = 10


class StartFailed(EdgeServeError):
    """The deployment did not come up."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunningDeployment:
    """The state of a deployment; ``pid`` and ``run_id`` are those of EdgeServe's own Ray, None where one was joined."""

    address: str
    url: str
    applications: tuple[str, ...]
    pid: int | None
    run_id: str | None


def is_alive(running: RunningDeployment) -> bool:
    """Whether the Ray of a deployment still runs."""
    if running.pid is None:
        return _listens(running.address)
    try:
        process = psutil.Process(running.pid)
        return _runs(process) and process.environ().get(_RUN_VARIABLE) == running.run_id
    except psutil.Error:
        return False


def preset_to_join() -> None:
    """Set the environment to join a cluster: this user's token, which a cluster without authentication ignores."""
    preset(FAST_INGRESS)
    if has_ray_token():
        preset({"RAY_AUTH_MODE": "token"})


def connect(address: str) -> None:
    """Connect this process to a Ray cluster, and keep the signal handlers that Ray would replace."""
    import ray

    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    with quiet_ray():
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    for number, handler in handlers.items():
        signal.signal(number, handler)


def join_ray(serve_file: ServeFile, on_progress: ProgressCallback) -> RunningDeployment | None:
    """Connect to the Ray cluster at RAY_ADDRESS, or to the one on this machine; None if there is none.

    Raises:
        StartFailed: nothing answers at RAY_ADDRESS.
    """
    wanted = ray_address()
    address = _local_ray() if wanted in (None, "auto", "local") else wanted
    if wanted is not None and (address is None or not _listens(address)):
        raise StartFailed(f"no Ray cluster answers at RAY_ADDRESS={wanted}; start it, or unset RAY_ADDRESS")
    if address is None:
        return None
    preset_to_join()
    connect(address)
    on_progress(f"joined the Ray cluster at {address}")
    return RunningDeployment(address=address, url=serve_file.url, applications=serve_file.names, pid=None, run_id=None)


def reconnect(running: RunningDeployment) -> None:
    """Connect to the Ray of an earlier command, unless this process is connected."""
    import ray

    if ray.is_initialized():
        return
    if running.pid is None:
        preset_to_join()
    else:
        preset(_OWN_RAY)
    connect(running.address)


def start_ray(serve_file: ServeFile, on_progress: ProgressCallback) -> RunningDeployment:
    """Start Ray on this machine and connect to it.

    Raises:
        StartFailed: the port of ``serve_file`` is taken, or Ray does not start.
    """
    _require_free(serve_file)
    preset(_OWN_RAY)
    port, dashboard_port, stats_port, metrics_port = _free_ports(4)
    address, run_id = f"127.0.0.1:{port}", uuid.uuid4().hex
    log = Path(tempfile.gettempdir()) / f"edgeserve-ray-{run_id}.log"
    on_progress("starting Ray on this machine")
    command = [
        sys.executable, "-m", ray_internals.COMMAND_MODULE, "start", "--head", "--block", "--disable-usage-stats",
        "--node-ip-address=127.0.0.1", f"--port={port}", f"--dashboard-port={dashboard_port}",
    ]  # fmt: skip
    variables = {
        "RAY_SERVE_HAPROXY_STATS_PORT": str(stats_port),
        "RAY_SERVE_HAPROXY_METRICS_PORT": str(metrics_port),
    }
    environment = {**child_environment(variables), _RUN_VARIABLE: run_id}
    with log.open("w") as output:
        process = subprocess.Popen(
            command,
            stdout=output,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
            env=environment,
        )
    running = RunningDeployment(
        address=address, url=serve_file.url, applications=serve_file.names, pid=process.pid, run_id=run_id
    )
    try:
        deadline_s = time.monotonic() + _START_S
        while not _listens(address) and process.poll() is None and time.monotonic() < deadline_s:
            time.sleep(0.1)
        if process.poll() is not None:
            raise ConnectionError(f"it ended with code {process.returncode}")
        connect(address)
    except BaseException as error:
        stop_ray(running)
        if isinstance(error, Exception):
            raise StartFailed(f"Ray did not start ({error}); its output is in {log}") from None
        raise
    log.unlink()
    return running


def stop_ray(running: RunningDeployment) -> None:
    """Stop the Ray that ``start_ray`` has started, with all of its processes."""
    # After an interrupted import, Ray cannot be disconnected.
    with quiet_ray(), contextlib.suppress(ImportError, AttributeError):
        import ray

        ray.shutdown()
    processes = _processes(running)
    for process in processes:
        if process.pid == running.pid or _is_beside(process):
            process.terminate()
    _, left = psutil.wait_procs(processes, timeout=_STOP_S)
    # Serve replaces HAProxy while it shuts down, so new processes may appear.
    for _ in range(_KILL_ROUNDS):
        left = [*left, *_processes(running)]
        for process in left:
            with contextlib.suppress(psutil.Error):
                process.kill()
        _, left = psutil.wait_procs(left, timeout=1.0)
        if not left and not _processes(running):
            break
    # Ray leaves its address behind: another driver would wait for the dead cluster for minutes.
    address_file = _address_file()
    if address_file.is_file() and _port(address_file.read_text()) == _port(running.address):
        address_file.unlink(missing_ok=True)


def start_beside(running: RunningDeployment, command: Sequence[str], log: Path) -> None:
    """Start a process with low priority that ``stop_ray`` ends as well.

    Args:
        running: beside what.
        command: with its arguments.
        log: where its output goes.
    """
    environment = child_environment({_RUN_VARIABLE: running.run_id or "", _BESIDE_VARIABLE: "1"})
    with log.open("w") as output:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=environment, start_new_session=True
        )
    # Before it starts any process of its own.
    os.setpriority(os.PRIO_PROCESS, process.pid, _LOW_PRIORITY)


def _is_beside(process: psutil.Process) -> bool:
    try:
        return _BESIDE_VARIABLE in process.environ()
    except psutil.Error:
        return False


def _processes(running: RunningDeployment) -> list[psutil.Process]:
    """Every process of a Ray that EdgeServe has started.

    All inherit the run id, whatever their parent is by now. A process that changes its title may lose the environment
    that the kernel shows, so the children of the others count as well.
    """
    found: dict[int, psutil.Process] = {}
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.environ().get(_RUN_VARIABLE) == running.run_id:
                found |= {member.pid: member for member in (process, *process.children(recursive=True))}
    return [process for process in found.values() if _runs(process)]


def _runs(process: psutil.Process) -> bool:
    try:
        return bool(process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def _local_ray() -> str | None:
    """Address of the Ray that runs on this machine, if any."""
    try:
        address = _address_file().read_text().strip()
    except OSError:
        return None
    return address if _listens(address) else None


def _address_file() -> Path:
    """The file in which Ray leaves the address of the cluster on this machine."""
    return ray_temp_dir() / "ray" / ray_internals.ADDRESS_FILE


def _listens(address: str) -> bool:
    host, _, port = address.removeprefix("ray://").rpartition(":")
    try:
        with socket.create_connection((host, int(port)), timeout=2.0):
            return True
    except (OSError, ValueError):
        return False


def _port(address: str) -> str:
    return address.rpartition(":")[2]


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


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [int(probe.getsockname()[1]) for probe in probes]


@contextlib.contextmanager
def quiet_ray() -> Iterator[None]:
    """Silence the log of Ray and Serve in this process: the user reads EdgeServe's own lines."""
    for name in ("ray", "ray.serve"):
        logging.getLogger(name).setLevel(logging.ERROR)
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stderr(nowhere):  # noqa: PTH123
        yield
