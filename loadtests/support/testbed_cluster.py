"""EdgeServe on several hosts of one machine, for benchmarks that need a network or break things.

The hosts are those of ``loadtests.testbed``; Ray and EdgeServe run from the virtual environment and the sources of
whoever calls, so nothing is installed. ``tests/cluster`` shows the same with ``ray up`` and everything installed.
"""

from __future__ import annotations

import os
import secrets
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import httpx
import yaml

from loadtests.testbed import Testbed
from loadtests.testbed.host import Host
from serve_app.serving.launch.local_ray import FAST_INGRESS

ROOT = Path(__file__).parents[2]
HEAD = "head"
PORT = 8000

#: Where the head may keep what it must not lose: nowhere, in a Redis on a host of its own, on its own disk.
Store = Literal["memory", "redis", "rocksdb"]
STORE = "store"
#: How long Ray on other hosts then waits for the head.
_WAITS_S = 600

_RAY = (sys.executable, "-m", "ray.scripts.scripts")
_START_S = 120.0
_UP_S = 300.0
_OBJECT_STORE_BYTES = 200 * 2**20


class LabError(Exception):
    """Something that should have come true did not."""


def until(what: str, is_true: Callable[[], bool], timeout_s: float) -> float:
    """Look again and again; returns the seconds that it took.

    Raises:
        LabError: it did not come true in time.
    """
    began_s = time.monotonic()
    while not is_true():
        if time.monotonic() - began_s > timeout_s:
            raise LabError(f"not within {timeout_s:.0f} s: {what}")
        time.sleep(0.05)
    return time.monotonic() - began_s


@dataclass(frozen=True)
class Lab:
    """A running cluster: a head, and one host for each location. ``folder`` holds its configuration."""

    testbed: Testbed
    folder: Path
    locations: tuple[str, ...]
    store: Store = "memory"

    def host(self, name: str) -> Host:
        """A host by the name of its location, or the head."""
        return self.testbed.hosts[name]

    def url(self, location: str, *, at: str | None = None) -> str:
        """Where a host, by default the location's own, answers for a location."""
        return f"http://{self.host(at or location).address}:{PORT}/{location}"

    @property
    def gateway(self) -> str:
        """Where the head answers for all locations."""
        return f"http://{self.host(HEAD).address}:{PORT}"

    def run(self, host: str, *command: str, timeout_s: float = 60.0) -> str:
        """Output of a command on a host, in the environment of Ray there."""
        variables = [f"{name}={value}" for name, value in self.environment().items()]
        return self.host(host).run("env", *variables, *command, timeout_s=timeout_s).stdout

    def environment(self) -> dict[str, str]:
        """What every command of this cluster needs."""
        waits = {} if self.store == "memory" else {"RAY_gcs_rpc_server_reconnect_timeout_s": str(_WAITS_S)}
        return {
            **FAST_INGRESS,
            **waits,
            "RAY_AUTH_MODE": "token",
            "PYTHONPATH": str(ROOT),
            "PATH": f"{Path(sys.executable).parent}:/usr/sbin:/usr/bin:/sbin:/bin",
            "RAY_ADDRESS": f"{self.host(HEAD).address}:6379",
        }

    def start_ray(self, host: str) -> None:
        """Start Ray on a host: the head, or a location that joins it."""
        address = self.host(host).address
        role, variables = ["--head", "--port=6379"], []
        if host != HEAD:
            role = [f"--address={self.host(HEAD).address}:6379", f"--labels=location={host}"]
        elif self.store == "redis":
            role += ["--redis-username=default", f"--redis-password={self._password.read_text()}"]
            variables = [
                f"RAY_REDIS_ADDRESS={self.host(STORE).address}:6379",
                "RAY_external_storage_namespace=edgeserve",
            ]
        elif self.store == "rocksdb":
            variables = ["RAY_gcs_storage=rocksdb", f"RAY_gcs_storage_path={self.testbed.home}/gcs"]
        options = [f"--object-store-memory={_OBJECT_STORE_BYTES}", "--disable-usage-stats"]
        command = [
            "env",
            "-u",
            "RAY_ADDRESS",
            *variables,
            *_RAY,
            "start",
            *role,
            f"--node-ip-address={address}",
            *options,
        ]
        self.run(host, *command, timeout_s=_START_S)

    def start_store(self) -> None:
        """Start the Redis in which the head keeps what it must not lose, as ``deploy/redis.conf`` has it."""
        host = self.host(STORE)
        self._password.write_text(secrets.token_hex(32))
        settings = ["--requirepass", self._password.read_text(), "--dir", self.testbed.home, "--daemonize", "yes"]
        host.run("redis-server", str(ROOT / "deploy" / "redis.conf"), *settings)

    @property
    def _password(self) -> Path:
        return self.folder / "redis_password"

    def stop_ray(self, host: str) -> None:
        """Stop Ray on a host, and what a dead one has left: it would keep the ports."""
        self.run(host, "sh", str(ROOT / "deploy" / "stop-ray.sh"))

    def deploy(self) -> None:
        """Deploy the locations, or bring them in line with what has changed."""
        command = [sys.executable, "-m", "serve_app", "up", str(self.folder / "cluster.yaml")]
        self.run(HEAD, *command, "--detach", "--no-compile", timeout_s=_UP_S)

    def status(self, *, at: str = HEAD) -> dict[str, Any]:
        """The cluster as the router of a location, or the gateway, sees it: its locations, and the coordinator."""
        url = self.gateway if at == HEAD else self.url(at)
        content = httpx.get(f"{url}/v1/locations", timeout=5.0).raise_for_status().json()
        return {row["name"]: row for row in content["locations"]} | {"coordinator": content["coordinator"]}

    def is_consistent(self, *, after_epoch: str = "") -> bool:
        """Whether every location knows of exactly one worker at each, and all of them of the same coordinator.

        Args:
            after_epoch: of a coordinator that has gone, and that nobody may go by any more.
        """
        try:
            seen = [self.status(at=host) for host in (HEAD, *self.locations)]
        except httpx.HTTPError:
            return False
        return all(
            status["coordinator"]["up"]
            and status["coordinator"]["epoch"] == seen[0]["coordinator"]["epoch"] != after_epoch
            and all(status[name]["replicas"] == 1 for name in self.locations)
            for status in seen
        )

    def raylets(self, host: str) -> list[int]:
        """The process on a host without which Ray there is no more, as the machine numbers it."""
        return [pid for pid in self.host(host).processes() if executable(pid).endswith("raylet")]

    def pids(self, host: str, title: str) -> list[int]:
        """Processes on a host whose command line begins like that, as the machine numbers them."""
        return [pid for pid in self.host(host).processes() if _command_line(pid).startswith(title)]

    def models(self, host: str) -> Path:
        """The model store of a host, as the machine sees it."""
        return self.host(host).folder / "home" / "store"


@contextmanager
def lab(
    locations: Sequence[str],
    models: Mapping[str, Mapping[str, Any]],
    *,
    memory: str,
    edge: Mapping[str, Any] | None = None,
    workers: int = 1,
    store: Store = "memory",
    name: str | None = None,
    say: Callable[[str], None] = print,
) -> Iterator[Lab]:
    """A cluster of one host for each location, and a head, from beginning to end.

    Args:
        locations: their names.
        models: the catalog.
        memory: of each worker's cache.
        edge: more of ``edge.yaml``.
        workers: of each location.
        store: where the head keeps what it must not lose; ``redis`` needs redis-server on this machine.
        name: of the testbed.
        say: is told how far it is.
    """
    # Ray's sockets live below the folder, and their paths must be short.
    folder = Path(tempfile.mkdtemp(prefix="es-"))
    shared = (folder, Path(sys.prefix), ROOT)
    try:
        say("starting hosts")
        hosts = (HEAD, *locations, *((STORE,) if store == "redis" else ()))
        with Testbed.up(hosts, name=name or f"l{os.getpid()}", shared=shared) as testbed:
            made = Lab(testbed, folder, tuple(locations), store)
            _configure(made, models, memory=memory, workers=workers, edge=edge or {})
            say("publishing models")
            _publish(made)
            if store == "redis":
                made.start_store()
            say("starting Ray")
            for host in (HEAD, *locations):
                made.start_ray(host)
            say("deploying")
            made.deploy()
            say("ready")
            yield made
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _configure(made: Lab, models: Mapping[str, Any], *, memory: str, workers: int, edge: Mapping[str, Any]) -> None:
    home = made.testbed.home
    edge = {
        "catalog": "catalog.yaml",
        "store": f"{home}/store",
        "locations": {name: {"memory": memory, "workers": workers, "pin_to_nodes": True} for name in made.locations},
        **edge,
    }
    applications = [
        {
            "name": name or "gateway",
            "route_prefix": f"/{name}",
            "import_path": "serve_app.serving.app:build",
            "args": {"edge": str(made.folder / "edge.yaml"), **({"location": name} if name else {})},
        }
        for name in (*made.locations, "")
    ]
    cluster = {
        "http_options": {"host": "0.0.0.0", "port": PORT},
        "logging_config": {"enable_access_log": False},
        "applications": applications,
    }
    for name, content in (("catalog", {"models": dict(models)}), ("edge", edge), ("cluster", cluster)):
        (made.folder / f"{name}.yaml").write_text(yaml.safe_dump(content))
    token = secrets.token_hex(32)
    for host in made.testbed.hosts.values():
        file = host.folder / "home" / ".ray" / "auth_token"
        file.parent.mkdir(exist_ok=True)
        file.write_text(token)
        file.chmod(0o600)


def _publish(made: Lab) -> None:
    """Publish once, and copy: each host must have files of its own, because some faults break them."""
    edge = str(made.folder / "edge.yaml")
    made.run(HEAD, sys.executable, "-m", "serve_app", "publish", "--edge", edge, timeout_s=_UP_S)
    for location in made.locations:
        shutil.copytree(made.models(HEAD), made.models(location))


def executable(pid: int) -> str:
    """The program that a process runs; nothing if it has ended."""
    try:
        return str(Path(f"/proc/{pid}/exe").readlink())
    except OSError:
        return ""


def _command_line(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
    except OSError:
        return ""
