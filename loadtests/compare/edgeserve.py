"""EdgeServe with one location, as ``edgeserve up`` deploys it."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from pathlib import Path

import yaml

from loadtests.compare.http import Http, Reply, timings_s
from loadtests.compare.processes import Memory, Processes, SideFailed, free_ports
from loadtests.compare.zoo import Zoo
from serve_app.core.versions import split_key

_LOCATION = "edge"
_UP_S, _DOWN_S = 180.0, 60.0


class EdgeServe:
    """One location with one worker; everything but memory and models is as configured by default.

    Args:
        name: of the side.
        zoo: the models.
        catalog: of them, which is published.
    """

    def __init__(self, name: str, zoo: Zoo, catalog: Path) -> None:
        self._zoo = zoo
        self._catalog = catalog
        (self._port,) = free_ports(1)
        self._processes = Processes(name, serving=("ray::ServeReplica", "haproxy", "ray::HAProxy"))
        self._variables = {"EDGESERVE_STORE": str(zoo.store)}

    def start(self) -> None:
        """``edgeserve up``; raises ``SideFailed``."""
        folder = self._processes.folder
        edge = {"catalog": str(self._catalog), "locations": {_LOCATION: {"memory": self._zoo.memory_bytes}}}
        local = {
            "http_options": {"host": "127.0.0.1", "port": self._port},
            "logging_config": {"enable_access_log": False},
            "applications": [
                {
                    "name": _LOCATION,
                    "route_prefix": f"/{_LOCATION}",
                    "import_path": "serve_app.serving.app:build",
                    "args": {"location": _LOCATION, "edge": str(folder / "edge.yaml")},
                }
            ],
        }
        for name, content in (("edge", edge), ("local", local)):
            (folder / f"{name}.yaml").write_text(yaml.safe_dump(content))
        up = self._processes.start(
            self._command("up", str(folder / "local.yaml"), "--detach", "--no-compile"), self._variables
        )
        try:
            code = up.wait(_UP_S)
        except subprocess.TimeoutExpired:
            raise SideFailed(f"edgeserve up took more than {_UP_S:.0f} s") from None
        if code:
            raise SideFailed(self._processes.last_words())

    def connect(self) -> Client:
        """A client of the location."""
        return Client(self._port)

    def memory(self) -> Memory:
        """Router, worker and HAProxy serve."""
        return self._processes.memory()

    def cpu_s(self) -> float:
        """Of Ray, too."""
        return self._processes.cpu_s()

    def held_bytes(self) -> int:
        """Weights of what is resident, without the workspaces that its own books count in."""
        http = Http(self._port)
        try:
            (location,) = json.loads(http.get(f"/{_LOCATION}/v1/locations"))["locations"]
        finally:
            http.close()
        return sum(self._zoo.sizes[split_key(model["model"])[0]] for model in location["resident"])

    def stop(self) -> None:
        """``edgeserve down``, and whatever it leaves."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._processes.start(self._command("down"), self._variables).wait(_DOWN_S)
        self._processes.stop()

    def _command(self, *arguments: str) -> list[str]:
        return [sys.executable, "-m", "serve_app", *arguments]


class Client:
    """Sends images to ``/v1/classify``."""

    def __init__(self, port: int) -> None:
        self._http = Http(port)

    def classify(self, model: str, image: bytes, top_k: int = 5) -> Reply:
        """Have an image classified; raises ``RequestFailed``."""
        path = f"/{_LOCATION}/v1/classify?model={model}&top_k={top_k}"
        headers, body = self._http.post(path, image, {"Content-Type": "image/jpeg"})
        parts = timings_s(headers["Server-Timing"] or "")
        predictions = json.loads(body)["predictions"] if top_k > 5 else ()
        return Reply(
            outcome=headers["X-EdgeServe-Outcome"] or "",
            wait_s=parts["load"],
            queue_s=parts["queue"],
            exec_s=parts["exec"],
            predictions={best["index"]: best["probability"] for best in predictions},
        )

    def close(self) -> None:
        """The client goes."""
        self._http.close()
