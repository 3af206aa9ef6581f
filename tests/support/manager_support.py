"""A ``ModelManager`` with all its parts within reach: its backend's loads end when the test says so."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Coroutine, Iterable
from concurrent.futures import Executor, Future
from typing import Any

from core_support import Ranked

from serve_app.core.cache.events import ModelsKnown
from serve_app.core.cache.model_cache import ModelCache
from serve_app.core.catalog import ModelProfile
from serve_app.core.policies.base import PreloadCandidates
from serve_app.serving.worker.model_manager import Lease, ModelManager
from serve_app.tasks.tensors import Tensors

#: Rounds of the event loop after which nothing moves any more: the longest chain of wake-ups here has about ten links.
ROUNDS = 50


class FakeModel:
    """A model in memory, which cannot be used or unloaded once it is gone."""

    def __init__(self, model_id: str, events: list[str]) -> None:
        self.model_id = model_id
        self.in_memory = True
        self.form = "mapped"
        self.own_bytes = 0
        self._events = events

    def run(self, inputs: Tensors, threads: int = 0) -> Tensors:
        assert self.in_memory
        return inputs

    def unload(self) -> None:
        assert self.in_memory, f"{self.model_id} is unloaded twice"
        self.in_memory = False
        self._events.append(f"unload {self.model_id}")


class Loads(Executor):
    """An executor and a backend in one: each load runs until ``end`` or ``fail``, in no thread at all."""

    def __init__(self) -> None:
        self.events: list[str] = []
        #: All models that were ever loaded.
        self.made: list[FakeModel] = []
        self._under_way: dict[str, Future[Any]] = {}

    def check(self, model_id: str) -> None:
        """All files are there."""

    def load(self, model_id: str) -> FakeModel:
        raise AssertionError("loads belong into the executor, off the event loop")

    def submit(self, function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        assert function == self.load
        (model_id,) = args
        job: Future[Any] = Future()
        assert self.begin(f"load {model_id}", model_id, job)
        return job

    def begin(self, event: str, model_id: str, job: Future[Any]) -> bool:
        """Run ``job``, unless it was canceled before."""
        if not job.set_running_or_notify_cancel():
            return False
        assert model_id not in self._under_way, f"{model_id} is loaded twice at a time"
        self.events.append(event)
        self._under_way[model_id] = job
        return True

    @property
    def under_way(self) -> list[str]:
        return list(self._under_way)

    def end(self, model_id: str) -> FakeModel:
        model = FakeModel(model_id, self.events)
        self.made.append(model)
        self._under_way.pop(model_id).set_result(model)
        return model

    def fail(self, model_id: str, error: Exception) -> None:
        self._under_way.pop(model_id).set_exception(error)

    def loaded(self) -> list[str]:
        return [event.removeprefix("load ") for event in self.events if event.startswith("load ")]


class Preloads(Executor):
    """The one thread for background loads. They end like all ``loads``; those behind the first wait."""

    def __init__(self, loads: Loads) -> None:
        self._loads = loads
        self._queue: list[tuple[str, Future[Any]]] = []
        self._running: Future[Any] | None = None

    def submit(self, function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        assert function == self._loads.load
        (model_id,) = args
        job: Future[Any] = Future()
        self._queue.append((model_id, job))
        self._go_on()
        return job

    def _go_on(self) -> None:
        while self._queue and (self._running is None or self._running.done()):
            model_id, job = self._queue.pop(0)
            if self._loads.begin(f"preload {model_id}", model_id, job):
                self._running = job
                job.add_done_callback(lambda _: self._go_on())


class Wanting(Ranked):
    """A policy whose candidates are the models in ``wanted``, each once, whatever must leave for it."""

    def on_load(self, model: ModelProfile, now: float) -> None:
        super().on_load(model, now)
        self.wanted = [wanted for wanted in self.wanted if wanted != model]

    def preload_candidates(self, now: float, free_bytes: int) -> PreloadCandidates:
        self.told.append(("review", f"{now:g}"))
        self.next_review_s = math.inf
        for model in tuple(self.wanted):
            if (yield model) is not None:
                self.next_review_s = now

    def accept_preload(self, model: ModelProfile, victims: Iterable[ModelProfile], now: float) -> bool:
        return True


class ManualTimer:
    """Goes off when the bench says so."""

    def __init__(self, when_s: float, callback: Callable[[], None]) -> None:
        self.when_s = when_s
        self.callback = callback
        self.is_set = True

    def cancel(self) -> None:
        self.is_set = False


class Observer:
    def __init__(self) -> None:
        self.seen: list[tuple[str, ...]] = []

    def preload_started(self) -> None:
        self.seen.append(("preload started",))

    def loaded(self, model_id: str, seconds: float) -> None:
        self.seen.append(("loaded", model_id, f"{seconds:g}"))

    def load_failed(self, model_id: str) -> None:
        self.seen.append(("failed", model_id))

    def evicted(self, model_id: str, reason: str) -> None:
        self.seen.append(("evicted", model_id, reason))


class Bench:
    """A manager of 100 bytes with all its parts within reach, and the requests that the test has under way."""

    def __init__(self, **changed: Any) -> None:
        self.now = 0.0
        self.loads = Loads()
        self.observer = Observer()
        self.policy = Wanting(a=1, b=2, c=3)
        self.timers: list[ManualTimer] = []
        self.cache = ModelCache(**{"capacity_bytes": 100, "policy": self.policy, "max_loads": 4} | changed)
        self.manager = ModelManager(
            cache=self.cache,
            backend=self.loads,
            loaders=self.loads,
            preloaders=Preloads(self.loads),
            clock=lambda: self.now,
            call_at=self.call_at,
            observer=self.observer,
        )
        self.requests: list[asyncio.Task[Any]] = []
        self.faults: list[dict[str, Any]] = []

    def call_at(self, when_s: float, callback: Callable[[], None]) -> ManualTimer:
        assert self.timer is None, "there are two timers"
        self.timers.append(ManualTimer(when_s, callback))
        return self.timers[-1]

    @property
    def timer(self) -> ManualTimer | None:
        """The timer that is set."""
        return next((timer for timer in self.timers if timer.is_set), None)

    async def until(self, now: float) -> None:
        """Let time pass, and every timer go off at its time."""
        while (timer := self.timer) is not None and timer.when_s <= now:
            self.now = max(self.now, timer.when_s)
            timer.is_set = False
            timer.callback()
            await self.settle()
        self.now = now

    async def want(self, *models: ModelProfile) -> None:
        """Have the policy name ``models`` as candidates now."""
        self.policy.wanted = list(models)
        self.policy.next_review_s = self.now
        self.manager.handle(ModelsKnown(()))
        await self.until(self.now)

    async def settle(self) -> None:
        for _ in range(ROUNDS):
            await asyncio.sleep(0)

    async def start(self, work: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        task = asyncio.get_running_loop().create_task(work)
        self.requests.append(task)
        await self.settle()
        return task

    async def acquire(self, model: ModelProfile) -> asyncio.Task[Lease]:
        return await self.start(self.manager.acquire(model))

    async def hold(self, model: ModelProfile) -> FakeModel:
        """Bring a model in, unused."""
        request = await self.acquire(model)
        runnable = await self.end(model)
        self.release(request)
        return runnable

    async def end(self, model: ModelProfile) -> FakeModel:
        runnable = self.loads.end(model.model_id)
        await self.settle()
        return runnable

    async def fail(self, model: ModelProfile, error: Exception) -> None:
        self.loads.fail(model.model_id, error)
        await self.settle()

    async def cancel(self, *requests: asyncio.Task[Any]) -> None:
        for request in requests:
            request.cancel()
        await self.settle()
        assert all(request.cancelled() for request in requests)

    def release(self, *requests: asyncio.Task[Lease]) -> None:
        for request in requests:
            self.manager.release(request.result())

    def uses(self) -> dict[str, int]:
        return {model.model_id: model.uses for model in self.cache.models()}
