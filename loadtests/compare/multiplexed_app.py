"""Ray Serve's model multiplexing, written as its documentation teaches: ``@serve.multiplexed`` in one replica.

``python -m loadtests.compare.multiplexed_app SPEC SLOTS PORT [tuned]`` serves it until it is terminated.

As documented, the replica loads and runs models in its coroutines. *Tuned* it does both in threads, as many as
EdgeServe has, and loads whole modules, which is faster: the best that could be made of it without changing Ray.
"""

import asyncio
import contextvars
import signal
import sys
import time
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import ray
from ray import serve
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from loadtests.compare.peer_model import Classified, PeerModels

_Result = TypeVar("_Result")
_THREADS = 2
_OBJECT_STORE_BYTES = 200 * 2**20
#: A request that waited longer than this for a model, and did not load it, waited for another one's load.
_JOINED_S = 0.001
#: Beyond what any slice has under way, so that nothing is refused and nothing waits in the proxy.
_MAX_ONGOING = 1000


def application(spec: str, slots: int, *, tuned: bool) -> Any:
    """The Serve application, whose replica holds at most ``slots`` models."""

    class Inferencer:
        def __init__(self) -> None:
            self._models = PeerModels(Path(spec))
            self._threads = ThreadPoolExecutor(_THREADS) if tuned else None
            #: Whether the request of this context has loaded its model itself.
            self._loaded: contextvars.ContextVar[bool] = contextvars.ContextVar("loaded", default=False)
            self._held: weakref.WeakValueDictionary[str, Any] = weakref.WeakValueDictionary()

        @serve.multiplexed(max_num_models_per_replica=slots)  # type: ignore[untyped-decorator]
        async def get_model(self, model_id: str) -> Any:
            self._loaded.set(True)
            load = self._models.load_whole if tuned else self._models.load
            module = await self._run(lambda: load(model_id))
            self._held[model_id] = module
            return module

        async def __call__(self, request: Request) -> Response:
            if request.url.path == "/held":
                return JSONResponse({model_id: self._models.size_bytes(model_id) for model_id in self._held})
            model_id = serve.get_multiplexed_model_id()
            image = await request.body()
            asked_s = time.perf_counter()
            module = await self.get_model(model_id)
            began_s = time.perf_counter()
            count = int(request.query_params.get("top_k", "5"))
            done: Classified = await self._run(lambda: self._models.classify(module, model_id, image, count))
            wait_s, run_s = began_s - asked_s, time.perf_counter() - began_s
            outcome = "load" if self._loaded.get() else "join" if wait_s > _JOINED_S else "hit"
            # What is not execution is decoding and, with threads, waiting for one.
            parts = {"load": 0.0 if outcome == "hit" else wait_s, "queue": run_s - done.exec_s, "exec": done.exec_s}
            timing = ", ".join(f"{name};dur={seconds * 1000:.3f}" for name, seconds in parts.items())
            return JSONResponse(done.predictions, headers={"X-Outcome": outcome, "Server-Timing": timing})

        async def _run(self, work: Callable[[], _Result]) -> _Result:
            if self._threads is None:
                return work()
            return await asyncio.get_running_loop().run_in_executor(self._threads, work)

    deployment = serve.deployment(num_replicas=1, max_ongoing_requests=_MAX_ONGOING, ray_actor_options={"num_cpus": 0})
    return deployment(Inferencer).bind()


def main() -> None:
    """Serve until terminated."""
    spec, slots, port, *options = sys.argv[1:]
    ray.init(include_dashboard=False, object_store_memory=_OBJECT_STORE_BYTES, log_to_driver=False)
    quiet = {"enable_access_log": False}
    serve.start(http_options={"host": "127.0.0.1", "port": int(port)}, logging_config=quiet)
    serve.run(application(spec, int(slots), tuned=bool(options)), logging_config=quiet)
    signal.sigwait({signal.SIGTERM, signal.SIGINT})


if __name__ == "__main__":
    main()
