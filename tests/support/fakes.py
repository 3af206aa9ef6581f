"""Stand-ins for what surrounds a router or a worker: workers, coordinator, metrics, models."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import numpy as np

from serve_app.core.catalog import Catalog, ModelProfile, PublishedModel
from serve_app.core.cluster.reports import ViewDelta, WorkerReport
from serve_app.core.contract import Axis, Contract, TensorSpec
from serve_app.core.links import Link
from serve_app.core.routing.rules import RoutingRules
from serve_app.core.task import ImageInput, TaskSpec
from serve_app.core.vocabulary import ModelState, Outcome, ResidentModel
from serve_app.serving.router.router import Router
from serve_app.serving.transport.messages import InferenceResult, InferenceTask
from serve_app.serving.transport.worker_pool import WorkerLost

CLASSES = 10


def published(model_id: str, *, size_bytes: int = 100, accuracy: float = 0.5, exec_s: float = 0.01) -> PublishedModel:
    return PublishedModel(
        model_id=model_id,
        builder="tests:factory",
        family="digits",
        weights_requested="random:0",
        weights_actual="random:0",
        dtype="float32",
        pinned=False,
        runtime="torch",
        contract=Contract(
            inputs=(TensorSpec(name="input", datatype="FP32", shape=(-1, 3, 8, 8)),),
            outputs=(TensorSpec(name="logits", datatype="FP32", shape=(-1, CLASSES)),),
            axes=(Axis(name="batch", most=32),),
        ),
        task=TaskSpec(
            kind="image-classification",
            image=ImageInput(resize_px=8, crop_px=8),
            labels=tuple(f"label {index}" for index in range(CLASSES)),
        ),
        row_by_row=True,
        weights_bytes=size_bytes,
        workspace_bytes=0,
        profile=ModelProfile(model_id=model_id, size_bytes=size_bytes, load_s=0.01, exec_s=exec_s, accuracy=accuracy),
    )


def report(location: str, *held: str, sequence: int = 1, capacity_bytes: int = 1000, **changes: Any) -> WorkerReport:
    models = {
        model_id: ResidentModel(model_id=model_id, state=ModelState.READY, size_bytes=100, uses=0, unevictable=False)
        for model_id in held
    }
    fields: dict[str, Any] = {
        "location": location,
        "replica": f"{location}-1",
        "sequence": sequence,
        "capacity_bytes": capacity_bytes,
        "used_bytes": 100 * len(held),
        "rss_bytes": 0,
        "models": models,
        "exec_slots": 1,
        "queue_s": 0.0,
        "inflight": 0,
        "exec_s": {},
        "load_s": {},
        "loads": len(held),
        "load_failures": 0,
        "evictions": 0,
        "outcomes": {},
    }
    return WorkerReport(**{**fields, **changes})


def view(*reports: WorkerReport) -> ViewDelta:
    return ViewDelta(epoch="epoch", version=1, full=True, workers=reports, gone=(), rates={})


def done(replica: str, **changes: Any) -> InferenceResult:
    fields: dict[str, Any] = {
        "outputs": {"logits": np.zeros((1, CLASSES), np.float32)},
        "outcome": Outcome.HIT,
        "queue_s": 0.0,
        "load_s": 0.0,
        "decode_s": 0.0,
        "exec_s": 0.01,
        "replica": replica,
        "sequence": 2,
    }
    return InferenceResult(**{**fields, **changes})


class FakeLink:
    """A coordinator that answers with what the test has put in."""

    def __init__(self, delta: ViewDelta | None = None) -> None:
        self.delta = delta
        self.reports: list[WorkerReport] = []
        self.departed: list[str] = []
        self.links: dict[tuple[str, str], Link] = {}

    @property
    def up(self) -> bool:
        return self.delta is not None

    async def exchange(self, news: Any, epoch: str, version: int) -> ViewDelta | None:
        if isinstance(news, WorkerReport):
            self.reports.append(news)
        else:
            self.links |= news
        return self.delta

    async def deregister(self, replica: str) -> None:
        self.departed.append(replica)


class FakePool:
    """Workers that answer as the test scripts it: a list of replies, or errors to raise, per location."""

    def __init__(self, **script: list[Any]) -> None:
        self._script = {location: iter(replies) for location, replies in script.items()}
        self.calls: list[tuple[str, str | None, InferenceTask]] = []
        self.called = asyncio.Event()
        self.pinged: list[tuple[str, int]] = []
        self.cut_off: set[str] = set()
        self.preloads: list[tuple[str, str, str]] = []

    async def infer(self, location: str, replica: str | None, work: InferenceTask) -> Any:
        self.calls.append((location, replica, work))
        self.called.set()
        reply = next(self._script[location])
        if isinstance(reply, Exception):
            raise reply
        if isinstance(reply, asyncio.Event):
            await reply.wait()
            return done(f"{location}-1")
        return reply

    async def ping(self, location: str, payload: bytes) -> None:
        self.pinged.append((location, len(payload)))
        if location in self.cut_off:
            raise WorkerLost("cut off")

    async def preload(self, location: str, replica: str, model_id: str) -> None:
        self.preloads.append((location, replica, model_id))

    async def load(self, location: str, model_id: str) -> Any:
        return None

    async def unload(self, location: str, replica: str, model_id: str) -> Any:
        return None


class FakeMetrics:
    """Takes every measurement and keeps none."""

    def __getattr__(self, name: str) -> Any:
        return FakeMetrics()

    def __call__(self, *arguments: Any, **keywords: Any) -> None:
        return None


class ManualClock:
    """Seconds that pass when the test says so."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def make_router(pool: Any, *reports: WorkerReport, clock: Callable[[], float] | None = None, **changes: Any) -> Router:
    catalog = Catalog((published("small", accuracy=0.5, exec_s=0.01), published("big", accuracy=0.9, exec_s=1.0)))
    link = Link(rtt_s=0.001, bytes_per_s=1e9)
    fields: dict[str, Any] = {
        "catalog": catalog,
        "locations": ("paris", "tokyo"),
        "home": "paris",
        "rules": RoutingRules(profiles=catalog.profiles(), links={}, default_link=link, horizon_s=10.0),
        "pool": pool,
        "coordinator": FakeLink(),
        "metrics": FakeMetrics(),
        "request_time_s": 5.0,
        "max_inflight": 10,
        "clock": clock or ManualClock(),
    }
    router = Router(**{**fields, **changes})
    router.view.apply(view(*reports), 0.0)
    return router
