"""What Ray Serve does by default: behind its own proxy, an ingress deployment calls a second one by its handle.

``python -m loadtests.support.plain_serve PORT`` serves until its standard input ends.
"""

from __future__ import annotations

import logging
import sys
from typing import Any

import numpy as np
import ray
from ray import serve
from starlette.requests import Request
from starlette.responses import Response

from loadtests.support.tiny import OUTPUTS

READY = "ready"


@serve.deployment(max_ongoing_requests=1000, ray_actor_options={"num_cpus": 0})
class Model:
    """A trivial model."""

    def __call__(self, body: bytes) -> bytes:
        """The first ten numbers of the input."""
        return np.frombuffer(body, dtype="<f4")[:OUTPUTS].tobytes()


@serve.deployment(max_ongoing_requests=1000, ray_actor_options={"num_cpus": 0})
class Ingress:
    """Reads a request and hands its body on."""

    def __init__(self, model: Any) -> None:
        self._model = model

    async def __call__(self, request: Request) -> Response:
        """The model's answer to the body, raw numbers both ways."""
        return Response(await self._model.remote(await request.body()))


def main() -> None:
    """Serve on the port of the command line until standard input ends."""
    ray.init(address="local", include_dashboard=False, num_cpus=4, log_to_driver=False, logging_level=logging.ERROR)
    serve.start(http_options={"host": "127.0.0.1", "port": int(sys.argv[1])})
    # Without access logs, like the others.
    serve.run(
        Ingress.bind(Model.bind()),  # type: ignore[attr-defined]
        logging_config={"enable_access_log": False},
    )
    sys.stdout.write(f"{READY}\n")
    sys.stdout.flush()
    sys.stdin.read()
    serve.shutdown()
    ray.shutdown()


if __name__ == "__main__":
    main()
