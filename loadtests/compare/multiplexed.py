"""Ray Serve's ``@serve.multiplexed``, in a Ray of its own."""

from __future__ import annotations

import json
import sys

from loadtests.compare.http import Http, Reply, RequestFailed, timings_s
from loadtests.compare.processes import Memory, Processes, free_ports
from loadtests.compare.zoo import Zoo

_UP_S = 120.0
#: Room for the replicas' own ports, away from those of other Rays on this machine.
_PORTS = 20


class Multiplexed:
    """One replica that holds as many models as memory has room for models of mean size.

    Args:
        name: of the side.
        zoo: the models.
        haproxy: with Serve's HAProxy and throughput mode, instead of its default proxy.
        tuned: see ``multiplexed_app``.
    """

    def __init__(self, name: str, zoo: Zoo, *, haproxy: bool, tuned: bool) -> None:
        self._zoo = zoo
        self._tuned = tuned
        self._port, stats_port, metrics_port = free_ports(3)
        self._processes = Processes(name, serving=("ray::ServeReplica", "ray::ProxyActor", "haproxy", "ray::HAProxy"))
        # No token is asked for, as with EdgeServe's own Ray.
        self._variables = {
            "RAY_AUTH_MODE": "disabled",
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
        }
        if haproxy:
            first_port = 31_000 + 2 * _PORTS * (stats_port % 100)
            self._variables |= {
                "RAY_SERVE_ENABLE_HA_PROXY": "1",
                "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
                "RAY_SERVE_HAPROXY_STATS_PORT": str(stats_port),
                "RAY_SERVE_HAPROXY_METRICS_PORT": str(metrics_port),
                "RAY_SERVE_DIRECT_INGRESS_MIN_HTTP_PORT": str(first_port),
                "RAY_SERVE_DIRECT_INGRESS_MAX_HTTP_PORT": str(first_port + _PORTS),
                "RAY_SERVE_DIRECT_INGRESS_MIN_GRPC_PORT": str(first_port + _PORTS),
                "RAY_SERVE_DIRECT_INGRESS_MAX_GRPC_PORT": str(first_port + 2 * _PORTS),
            }

    def start(self) -> None:
        """Start Ray and deploy; raises ``SideFailed``."""
        arguments = [str(self._zoo.spec), str(self._zoo.slots), str(self._port), *(("tuned",) if self._tuned else ())]
        # Imported by its name, not as __main__, so that replicas import it as well.
        serve = "from loadtests.compare.multiplexed_app import main; main()"
        server = self._processes.start([sys.executable, "-c", serve, *arguments], self._variables)
        self._processes.await_ready(server, self._is_ready, _UP_S)

    def connect(self) -> Client:
        """A client of the replica."""
        return Client(self._port)

    def memory(self) -> Memory:
        """Replica and proxies serve."""
        return self._processes.memory()

    def cpu_s(self) -> float:
        """Of Ray, too."""
        return self._processes.cpu_s()

    def held_bytes(self) -> int:
        """Weights of the modules that exist."""
        http = Http(self._port)
        try:
            return sum(json.loads(http.get("/held")).values())
        finally:
            http.close()

    def stop(self) -> None:
        """End Ray."""
        self._processes.stop()

    def _is_ready(self) -> bool:
        try:
            return self.held_bytes() == 0
        except (RequestFailed, ValueError):
            return False


class Client:
    """Names the model in the header that the documentation names."""

    def __init__(self, port: int) -> None:
        self._http = Http(port)

    def classify(self, model: str, image: bytes, top_k: int = 5) -> Reply:
        """Have an image classified; raises ``RequestFailed``."""
        sent = {"Content-Type": "image/jpeg", "serve_multiplexed_model_id": model}
        headers, body = self._http.post(f"/?top_k={top_k}", image, sent)
        parts = timings_s(headers["Server-Timing"] or "")
        predictions = json.loads(body) if top_k > 5 else {}
        return Reply(
            outcome=headers["X-Outcome"] or "",
            wait_s=parts["load"],
            queue_s=parts["queue"],
            exec_s=parts["exec"],
            predictions={int(index): probability for index, probability in predictions.items()},
        )

    def close(self) -> None:
        """The client goes."""
        self._http.close()
