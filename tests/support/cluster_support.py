"""A cluster as ``ray up cluster.yaml`` makes it, on the hosts of a testbed, and how tests look at it."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import yaml
from wheel_support import build_wheel

from loadtests.testbed import Testbed
from loadtests.testbed.host import Host

ROOT = Path(__file__).parents[2]
LOCATIONS = ("paris", "tokyo", "virginia")
HEAD = "head"
#: What users put in the place of these is all that the cluster's file may differ in.
ADDRESSES = {HEAD: "192.0.2.10", "paris": "192.0.2.11", "tokyo": "192.0.2.12", "virginia": "192.0.2.13"}
KEY = "~/.ssh/id_ed25519"
USER = "edgeserve"
#: Small enough for every location to hold all of them.
MODELS = ("squeezenet1_1", "shufflenet_v2_x0_5", "mobilenet_v3_small")
#: One request is a batch of eight images, 4.8 MB: far more than what the hosts have to tell each other meanwhile.
BATCH = np.random.default_rng(0).standard_normal((8, 3, 224, 224)).astype(np.float32)
PAYLOAD_BYTES = BATCH.nbytes
#: A host that runs nothing: what unshares its namespaces, its first process, its sshd.
IDLE_PROCESSES = 3

_UP_S = 600.0
_JOIN_S = 900.0
_COMMAND_S = 300.0


class Deadline(AssertionError):
    """Something did not come true in time."""


def until(what: str, is_true: Callable[[], bool], timeout_s: float, why: Callable[[], str] = str) -> None:
    """Look again and again; ``why`` says more where it does not come true."""
    deadline_s = time.monotonic() + timeout_s
    while not is_true():
        if time.monotonic() > deadline_s:
            raise Deadline(f"not within {timeout_s:.0f} s: {what}\n{why()}")
        time.sleep(0.5)


def copy_project(target: Path, testbed: Testbed) -> None:
    """Copy what ``ray up`` needs, with the addresses of the hosts in ``cluster.yaml``, and build the wheel.

    The catalog has fewer models: to publish all of them would take minutes on every host.
    """
    target.mkdir()
    shutil.copytree(ROOT / "deploy", target / "deploy")
    build_wheel(ROOT, target / "dist")
    (target / "cluster.yaml").write_text(with_addresses((ROOT / "cluster.yaml").read_text(), testbed))
    entry = {"weights": "random:0", "family": "imagenet"}
    models = {name: {"builder": f"torchvision:{name}", **entry} for name in MODELS}
    (target / "deploy" / "catalog.yaml").write_text(yaml.safe_dump({"models": models}))


def with_addresses(text: str, testbed: Testbed) -> str:
    for host, address in ADDRESSES.items():
        text = re.sub(rf"\b{re.escape(address)}\b", testbed.hosts[host].address, text)
    return text.replace(KEY, str(testbed.key))


@dataclass(frozen=True)
class Cluster:
    """A running cluster. ``project`` is the copy of the project that it was started from."""

    testbed: Testbed
    project: Path
    environment: dict[str, str]

    def ray(self, *arguments: str, timeout_s: float = _COMMAND_S) -> str:
        """Output of Ray's client command on the machine; it must succeed."""
        done = subprocess.run(
            [sys.executable, "-m", "ray.scripts.scripts", *arguments],
            cwd=self.project,
            env=self.environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            timeout=timeout_s,
            check=False,
        )
        assert done.returncode == 0, f"ray {' '.join(arguments)} failed:\n{done.stdout[-4000:]}"
        return done.stdout

    def exec(self, command: str) -> str:
        """Output of a command on the head, given as in the comments of ``cluster.yaml``."""
        return self.ray("exec", "cluster.yaml", command)

    def host(self, name: str) -> Host:
        return self.testbed.hosts[name]

    def url(self, location: str, *, at: str) -> str:
        """Where the host ``at`` answers for ``location``."""
        return f"http://{self.host(at).address}:8000/{location}"

    def nodes(self) -> int:
        """How many hosts have joined."""
        said = self.host(HEAD).run("bash", "-c", ". ~/edgeserve.env && ray status", check=False).stdout
        active = re.search(r"Active:\n\s+(\d+) local", said)
        return int(active[1]) if active else 0

    def monitor_log(self) -> str:
        """The last words of who starts Ray on the workers."""
        log = "tail -n 60 /tmp/ray/session_latest/logs/monitor.out /tmp/ray/session_latest/logs/monitor.log"
        return self.host(HEAD).run("sh", "-c", log, check=False).stdout[-8000:]

    def is_ready(self, location: str) -> bool:
        """Whether its own host answers for it."""
        try:
            return httpx.get(f"{self.url(location, at=location)}/v2/health/ready", timeout=5).status_code == 200
        except httpx.HTTPError:
            return False

    def await_locations(self) -> None:
        for location in LOCATIONS:
            until(f"{location} is ready", functools.partial(self.is_ready, location), _COMMAND_S)


def start(testbed: Testbed, folder: Path) -> Cluster:
    """What the comments of ``cluster.yaml`` say, up to Ray on every host.

    The workers come up when the head has been installed, and have its dependencies on their disks by then, as hosts
    made from one image: to install torch four times would take minutes. All else their setup commands do themselves.
    """
    copy_project(folder / "edgeserve", testbed)
    (folder / "home").mkdir()
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "EDGESERVE_"))}
    # Ray's client leaves files in its user's home and in these.
    own = {"HOME": str(folder / "home"), "RAY_TMPDIR": str(folder), "TMPDIR": str(folder)}
    # And shares ssh connections by user, cluster and address, all of which another testbed may have had a moment ago.
    own["LOGNAME"] = testbed.name
    environment = {**kept, **own, "RAY_USAGE_STATS_ENABLED": "0"}
    cluster = Cluster(testbed, folder / "edgeserve", environment)
    cluster.ray("get-auth-token", "--generate")
    for location in LOCATIONS:
        cluster.host(location).kill()
    cluster.ray("up", "cluster.yaml", "--yes", "--no-config-cache", timeout_s=_UP_S)
    for location in LOCATIONS:
        copy_dependencies(cluster.host(HEAD), cluster.host(location))
        cluster.host(location).boot()
    hosts = len(testbed.hosts)
    until(f"{hosts} hosts have joined", lambda: cluster.nodes() == hosts, _JOIN_S, cluster.monitor_log)
    return cluster


def client_sockets(testbed: Testbed) -> Path:
    """Where Ray's client keeps its ssh connections, whatever it is told."""
    return Path("/tmp") / f"ray_ssh_{hashlib.sha256(testbed.name.encode()).hexdigest()[:10]}"


def copy_dependencies(one: Host, other: Host) -> None:
    """Give a host the virtual environment of another, without the project. Its home has the same path on both."""
    shutil.copytree(
        one.folder / "home" / "edgeserve-env",
        other.folder / "home" / "edgeserve-env",
        symlinks=True,
        ignore=shutil.ignore_patterns("edgeserve", "edgeserve-*", "serve_app"),
        # pip replaces files and does not write into them.
        copy_function=os.link,
    )


def left_running(testbed: Testbed) -> dict[str, str]:
    """What runs on each host that should run nothing."""
    return {
        host.name: host.run("ps", "ax", "-o", "args=").stdout
        for host in testbed.hosts.values()
        if len(host.processes()) > IDLE_PROCESSES
    }


def binary_request() -> tuple[bytes, dict[str, str]]:
    """``BATCH`` in the Open Inference Protocol, and the headers that go with it."""
    parameters: dict[str, Any] = {"binary_data_size": PAYLOAD_BYTES}
    tensor = {"name": "input", "shape": list(BATCH.shape), "datatype": "FP32", "parameters": parameters}
    head = json.dumps({"inputs": [tensor], "parameters": {"binary_data_output": True}}).encode()
    headers = {"Inference-Header-Content-Length": str(len(head)), "Content-Type": "application/octet-stream"}
    return head + BATCH.tobytes(), headers


def infer(url: str, model: str, content: tuple[bytes, dict[str, str]] | None = None) -> httpx.Response:
    body, headers = content or binary_request()
    return httpx.post(f"{url}/v2/models/{model}/infer", content=body, headers=headers, timeout=60).raise_for_status()
