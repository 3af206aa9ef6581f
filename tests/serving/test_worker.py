"""The worker alone, with models that do as the test says: what it loads, counts, reports and gives back."""

from __future__ import annotations

import asyncio
import dataclasses
import random
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from typing import Any

import numpy as np
import pytest
from deployment_support import encoded
from fakes import CLASSES, FakeLink, FakeMetrics, ManualClock, published, view
from PIL import Image

from serve_app.core.cache.model_cache import ModelCache
from serve_app.core.catalog import Catalog, ModelProfile, PublishedModel
from serve_app.core.coordination.rules import CoordinatorRules
from serve_app.core.links import Link
from serve_app.core.memory_budget import MemoryBudget, ProcessMemory
from serve_app.core.policies.base import EvictionPolicy, PreloadCandidates
from serve_app.core.policies.registry import make_policy
from serve_app.core.routing.rules import RoutingRules
from serve_app.core.vocabulary import ModelState, Outcome
from serve_app.errors import DeadlineExceeded, DoesNotFit, InvalidRequest, ModelChanged, StoreError, Unavailable
from serve_app.serving.transport.messages import InferenceRejected, InferenceResult, InferenceTask, NotResident
from serve_app.serving.worker.model_manager import ModelManager
from serve_app.serving.worker.process_budget import ProcessBudget
from serve_app.serving.worker.settings import RetentionRules, WorkerIdentity
from serve_app.serving.worker.worker import Worker
from serve_app.tasks.base import RawInput
from serve_app.tasks.tensors import Tensors

BASE = ProcessMemory(anonymous_bytes=5, file_bytes=2)
BUDGET = MemoryBudget(capacity_bytes=250, workspace_bytes=0)
BATCH = {"input": np.zeros((2, 3, 8, 8), np.float32)}


class FakeModel:
    def __init__(self, gate: threading.Event, backend: FakeBackend) -> None:
        self._gate = gate
        self._backend = backend
        self.running = 0
        self.unloaded = False
        self.form = "mapped"
        self.own_bytes = 0

    def run(self, inputs: Tensors, threads: int = 0) -> Tensors:
        assert not self.unloaded, "a model in use was unloaded"
        if self._backend.changed:
            self._backend.changed = False
            raise ModelChanged("a file was changed")
        self.running += 1
        self._gate.wait(10)
        self.running -= 1
        return {"logits": np.zeros((len(inputs["input"]), CLASSES), np.float32)}

    def unload(self) -> None:
        assert not self.running, "a model in use was unloaded"
        self.unloaded = True


class FakeBackend:
    """Loads at once; ``broken`` models fail; inference waits for ``gate``."""

    def __init__(self) -> None:
        self.loads: list[str] = []
        self.broken: set[str] = set()
        self.missing: set[str] = set()
        #: The next execution finds that a file has changed.
        self.changed = False
        self.gate = threading.Event()
        self.gate.set()

    def check(self, model_id: str) -> None:
        if model_id in self.missing:
            raise StoreError(f"the weights of {model_id} are missing")

    def load(self, model_id: str) -> FakeModel:
        self.loads.append(model_id)
        if model_id in self.broken:
            raise StoreError(f"{model_id} is corrupt")
        return FakeModel(self.gate, self)


class WishesForAll(EvictionPolicy):
    """Wants everything in memory that fits into it."""

    def __init__(self) -> None:
        self._models: tuple[ModelProfile, ...] = ()

    def on_catalog(self, models: Iterable[ModelProfile], now: float) -> None:
        self._models = tuple(models)
        self.next_review_s = now

    def utility(self, model: ModelProfile, now: float) -> float:
        return 1.0

    def preload_candidates(self, now: float, free_bytes: int) -> PreloadCandidates:
        self.next_review_s = now + 3600
        for model in self._models:
            if model.size_bytes <= free_bytes:
                verdict = yield model
                if verdict is not None and verdict.accepted:
                    self.next_review_s = now

    def accept_preload(self, model: ModelProfile, victims: Iterable[ModelProfile], now: float) -> bool:
        return not victims


@asynccontextmanager
async def running(
    backend: FakeBackend,
    link: FakeLink | None = None,
    capacity: int = 250,
    policy: EvictionPolicy | None = None,
    retention: RetentionRules | None = None,
    clock: Callable[[], float] | None = None,
    memory: ProcessBudget | None = None,
    metrics: Any = None,
    pinned: str = "",
    others: Sequence[PublishedModel] = (),
    look_for_versions: Callable[[], Awaitable[None]] | None = None,
) -> AsyncIterator[Worker]:
    """A worker with memory for two of its models; at the end every pin must be back and the bytes add up."""
    models = [dataclasses.replace(published(name), pinned=name in pinned) for name in "abc"]
    catalog = Catalog((*models, published("huge", size_bytes=9999), *others))
    memory = memory or ProcessBudget(BUDGET, read=lambda: BASE)
    cache = ModelCache(
        capacity_bytes=capacity + memory.workspace_bytes,
        workspace_bytes=memory.workspace_bytes,
        policy=policy or make_policy("lru", random.Random(0)),
        failure_memory_s=60,
        pinned=pinned,
    )
    metrics = metrics or FakeMetrics()
    loop = asyncio.get_running_loop()
    with ThreadPoolExecutor(2) as loaders:
        worker = Worker(
            identity=WorkerIdentity(location="paris", replica="paris-1"),
            catalog=catalog,
            manager=ModelManager(
                cache=cache,
                backend=backend,
                loaders=loaders,
                preloaders=loaders,
                clock=clock or loop.time,
                call_at=loop.call_at,
                observer=metrics,
            ),
            exec_slots=1,
            coordinator=link or FakeLink(),
            rules=RoutingRules(
                profiles=catalog.profiles(), links={}, default_link=Link(rtt_s=0.001, bytes_per_s=1e9), horizon_s=10
            ),
            metrics=metrics,
            process_budget=memory,
            max_pixels=10_000,
            retention=retention or RetentionRules(),
            look_for_versions=look_for_versions,
            clock=clock or loop.time,
        )
        yield worker
        backend.gate.set()
        await _idle(cache)
        assert cache.used_bytes == sum(model.size_bytes for model in cache.models()) <= capacity
        await worker.stop()


async def _idle(cache: ModelCache) -> None:
    async with asyncio.timeout(10):
        while any(model.uses for model in cache.models()) or cache.waiting:  # noqa: ASYNC110 - the cache has no events
            await asyncio.sleep(0)


def work(model_id: str = "a", **changes) -> InferenceTask:
    return InferenceTask(**{"model_id": model_id, "origin": "paris", "payload": BATCH, "budget_s": 10.0, **changes})


async def test_the_first_request_loads_and_the_second_hits() -> None:
    backend = FakeBackend()
    async with running(backend) as worker:
        first, second = await worker.infer(work()), await worker.infer(work())
    assert (first.outcome, second.outcome) == (Outcome.LOAD, Outcome.HIT)
    assert second.outputs["logits"].shape == (2, CLASSES)
    assert backend.loads == ["a"]


async def test_a_model_whose_files_changed_is_loaded_again_for_the_request_that_noticed() -> None:
    backend = FakeBackend()
    async with running(backend, pinned="a") as worker:
        await worker.infer(work())
        backend.changed = True
        reply = await worker.infer(work())
        assert backend.changed is False
    assert reply.outcome is Outcome.LOAD
    assert backend.loads == ["a", "a"]


async def test_a_model_whose_files_are_broken_says_so_and_others_are_served() -> None:
    backend = FakeBackend()
    async with running(backend) as worker:
        await worker.infer(work())
        backend.changed, backend.broken = True, {"a"}
        reply = await worker.infer(work())
        assert isinstance(reply, InferenceRejected)
        assert "a is corrupt" in str(reply.error)
        assert isinstance(await worker.infer(work("b")), InferenceResult)


class ConfiguredLink(FakeLink):
    def configure(self, rules: CoordinatorRules) -> None:
        return None


async def test_a_version_that_a_router_saw_first_is_looked_for_before_it_is_refused() -> None:
    both = Catalog((published("a"), published("a@2")))
    rules = RoutingRules(
        profiles=both.profiles(), links={}, default_link=Link(rtt_s=0.001, bytes_per_s=1e9), horizon_s=10
    )
    looks = 0

    async def look() -> None:
        nonlocal looks
        looks += 1
        if looks == 2:
            worker.reconfigure(
                catalog=both,
                budget=BUDGET,
                policy=None,
                rules=rules,
                retention=RetentionRules(),
                coordination=CoordinatorRules(half_life_s=60.0, stale_after_s=2.0),
            )

    async with running(FakeBackend(), ConfiguredLink(), look_for_versions=look) as worker:
        assert isinstance(await worker.infer(work("a@2")), InferenceRejected)
        assert isinstance(await worker.infer(work("a@2")), InferenceResult)


async def test_a_third_model_evicts_another_and_names_it() -> None:
    async with running(FakeBackend()) as worker:
        for model_id in ("a", "b", "c"):
            reply = await worker.infer(work(model_id))
    assert isinstance(reply, InferenceResult)
    assert reply.evicted == ("a",)


async def test_a_model_that_must_be_held_and_is_not_is_not_loaded() -> None:
    backend = FakeBackend()
    async with running(backend) as worker:
        assert isinstance(await worker.infer(work(only_if_resident=True)), NotResident)
        await worker.infer(work())
        assert isinstance(await worker.infer(work(only_if_resident=True)), InferenceResult)
    assert backend.loads == ["a"]


@pytest.mark.parametrize("payload", [b"not an image", encoded(Image.new("RGB", (101, 100)), "PNG")])
async def test_a_bad_image_is_refused_before_anything_is_loaded(payload) -> None:
    backend = FakeBackend()
    async with running(backend) as worker:
        reply = await worker.infer(work(payload=RawInput(data=payload)))
    assert isinstance(reply, InferenceRejected)
    assert isinstance(reply.error, InvalidRequest)
    assert backend.loads == []


async def test_an_image_is_decoded_for_the_models_input() -> None:
    async with running(FakeBackend()) as worker:
        reply = await worker.infer(work(payload=RawInput(data=encoded(Image.new("RGB", (20, 10)), "JPEG"))))
    assert isinstance(reply, InferenceResult)
    assert reply.answer is not None
    labels = [best["label"] for best in reply.answer["predictions"]]
    assert labels == [f"label {index}" for index in range(5)]
    assert reply.decode_s > 0


async def test_a_model_that_never_fits_is_refused() -> None:
    async with running(FakeBackend()) as worker:
        reply = await worker.infer(work("huge"))
    assert isinstance(reply, InferenceRejected)
    assert isinstance(reply.error, DoesNotFit)


async def test_a_model_that_cannot_be_loaded_is_refused_and_not_tried_at_once_again() -> None:
    backend = FakeBackend()
    backend.broken.add("a")
    async with running(backend) as worker:
        replies = [await worker.infer(work()) for _ in range(2)]
        assert all(isinstance(reply, InferenceRejected) and "corrupt" in reply.error.message for reply in replies)
        assert isinstance(await worker.infer(work("b")), InferenceResult)
    assert backend.loads == ["a", "b"]


async def test_a_model_whose_weights_are_missing_displaces_nothing() -> None:
    backend = FakeBackend()
    backend.missing.add("c")
    async with running(backend) as worker:
        for model_id in ("a", "b"):
            await worker.infer(work(model_id))
        reply = await worker.infer(work("c"))
        assert isinstance(reply, InferenceRejected)
        assert "missing" in reply.error.message
        assert set(worker.report().models) == {"a", "b"}
        backend.missing.clear()
        assert await worker.load("c") is None
    assert backend.loads == ["a", "b", "c"]


async def test_a_model_whose_files_are_missing_is_unusable_until_they_are_back() -> None:
    backend = FakeBackend()
    async with running(backend) as worker:
        await worker.infer(work("a"))
        backend.missing.update("ac")
        await worker.report_once()
        assert worker.report().unusable == {
            "a": "the weights of a are missing",
            "c": "the weights of c are missing",
        }
        assert isinstance(await worker.infer(work("c")), InferenceRejected)
        backend.missing.clear()
        await worker.report_once()
        assert worker.report().unusable == {}
        assert isinstance(await worker.infer(work("c")), InferenceResult), "nobody waits once the files are back"


async def test_a_model_whose_load_failed_is_unusable_until_a_load_works() -> None:
    backend = FakeBackend()
    backend.broken.add("a")
    async with running(backend) as worker:
        await worker.infer(work("a"))
        for _ in range(2):
            await worker.report_once()
            assert "corrupt" in worker.report().unusable["a"]
        backend.broken.clear()
        assert await worker.load("a") is None
        assert worker.report().unusable == {}


async def test_a_model_loaded_by_hand_is_not_the_next_victim() -> None:
    async with running(FakeBackend()) as worker:
        await worker.infer(work("a"))
        await worker.load("b")
        await worker.infer(work("c"))
        assert set(worker.report().models) == {"b", "c"}


async def test_a_request_past_its_deadline_is_refused_and_its_model_stays_until_the_thread_is_done() -> None:
    backend = FakeBackend()
    async with running(backend) as worker:
        await worker.infer(work())
        backend.gate.clear()
        reply = await worker.infer(work(budget_s=0.01))
        assert isinstance(reply, InferenceRejected)
        assert isinstance(reply.error, DeadlineExceeded)
        refused = await worker.unload("a")
        assert refused is not None
        assert refused.error.status == 409


async def test_a_worker_that_stops_lets_a_thread_that_still_runs_end_first() -> None:
    backend = FakeBackend()
    async with running(backend) as worker:
        await worker.infer(work())
        backend.gate.clear()
        await worker.infer(work(budget_s=0.01))
        stopping = asyncio.create_task(worker.stop())
        await asyncio.wait([stopping], timeout=0.05)
        assert not stopping.done()
        backend.gate.set()
        await stopping


async def test_loading_and_unloading_by_hand() -> None:
    backend = FakeBackend()
    async with running(backend) as worker:
        assert await worker.load("a") is None
        assert await worker.load("a") is None
        assert (await worker.infer(work())).outcome is Outcome.HIT
        assert await worker.unload("a") is None
        refused = await worker.unload("a")
        assert refused is not None
        assert refused.error.status == 404
    assert backend.loads == ["a"]


async def test_a_report_says_what_is_held_and_how_users_were_served() -> None:
    async with running(FakeBackend()) as worker:
        for origin in ("paris", "paris", "tokyo"):
            await worker.infer(work(origin=origin))
        report = worker.report()
        assert set(report.models) == {"a"}
        assert report.used_bytes == 100
        assert report.rss_bytes == 7
        own, others = report.outcomes["paris"], report.outcomes["tokyo"]
        assert (own.requests, own.loads, own.hits, own.forwards) == (2, 1, 1, 0)
        assert (others.requests, others.forwards) == (1, 1)
        assert {(demand.location, demand.count) for demand in report.demand} == {("paris", 2), ("tokyo", 1)}
        assert worker.report().demand == ()
        assert worker.report().sequence == report.sequence + 2


async def test_demand_that_the_coordinator_missed_is_reported_again() -> None:
    link = FakeLink()
    async with running(FakeBackend(), link) as worker:
        await worker.infer(work())
        await worker.report_once()
        link.delta = view()
        await worker.report_once()
        assert [sum(demand.count for demand in report.demand) for report in link.reports] == [1, 1]


async def test_a_worker_that_starts_preloads_what_its_policy_wishes_for() -> None:
    backend = FakeBackend()
    backend.broken.add("b")
    async with running(backend, policy=WishesForAll()) as worker:
        assert worker.report().models == {}
        worker.start(report_every_s=60.0)
        async with asyncio.timeout(10):
            while not _are_ready(worker, "a", "c"):  # noqa: ASYNC110 - the cache has no events
                await asyncio.sleep(0)
        assert isinstance(await worker.infer(work("b")), InferenceRejected)
        assert (await worker.infer(work("c"))).outcome is Outcome.HIT
    assert backend.loads == ["a", "b", "c"]


def _are_ready(worker: Worker, *model_ids: str) -> bool:
    models = worker.report().models
    return all(model_id in models and models[model_id].state is ModelState.READY for model_id in model_ids)


async def test_a_worker_that_stops_leaves_the_directory() -> None:
    link = FakeLink()
    async with running(FakeBackend(), link):
        pass
    assert link.departed == ["paris-1"]


async def test_an_inference_for_which_no_thread_starts_gives_its_model_back() -> None:
    async with running(FakeBackend()) as worker:
        await worker.infer(work())
        worker.executor.shutdown()
        refused = await worker.infer(work())
        assert isinstance(refused, InferenceRejected)
        assert isinstance(refused.error, Unavailable)
        report = worker.report()
        assert (report.models["a"].uses, report.queue_s) == (0, 0.0)


async def test_a_report_says_what_is_counted_and_what_the_kernel_says() -> None:
    kernel = [BASE]
    memory = ProcessBudget(MemoryBudget(capacity_bytes=280, workspace_bytes=30), read=lambda: kernel[-1])
    async with running(FakeBackend(), memory=memory) as worker:
        await worker.infer(work())
        kernel.append(ProcessMemory(anonymous_bytes=40, file_bytes=90))
        report = worker.report()
    assert (report.base_bytes, report.rss_bytes) == (7, 130)
    assert (report.used_bytes, report.workspace_bytes, report.unaccounted_bytes) == (100, 30, 0)


async def test_models_leave_room_for_what_the_process_has_grown_by_and_get_it_back() -> None:
    kernel, clock = [BASE], ManualClock()
    memory = ProcessBudget(BUDGET, read=lambda: kernel[-1])

    async def reports(worker: Worker, count: int) -> None:
        for _ in range(count):
            clock.now += 0.25
            await worker.report_once()

    async with running(FakeBackend(), memory=memory, clock=clock) as worker:
        for model_id in "ab":
            await worker.infer(work(model_id))
        kernel.append(ProcessMemory(anonymous_bytes=105, file_bytes=2))
        await reports(worker, 1)
        assert set(worker.report().models) == {"a", "b"}, "a peak of a moment is none"
        await reports(worker, 40)
        assert worker.report().unaccounted_bytes >= 100
        assert set(worker.report().models) == {"b"}
        assert worker.report().capacity_bytes == 250
        assert isinstance(await worker.infer(work("a")), InferenceResult), "requests are served as ever"
        kernel.append(BASE)
        await reports(worker, 400)
        assert worker.report().unaccounted_bytes == 0
        await worker.infer(work("b"))
        assert set(worker.report().models) == {"a", "b"}


async def test_free_heap_is_given_back_soon_after_evictions_and_not_after_hits() -> None:
    given_back: list[None] = []
    clock = ManualClock()
    memory = ProcessBudget(BUDGET, read=lambda: BASE, give_back=lambda: given_back.append(None))
    async with running(FakeBackend(), memory=memory, clock=clock) as worker:
        for model_id in "aaab":
            await worker.infer(work(model_id))
            await worker.report_once()
        assert len(given_back) == 1, "once before the first model"
        await worker.infer(work("c"))
        await worker.report_once()
        await worker.report_once()
        assert len(given_back) == 2
        await worker.infer(work("a"))
        await worker.report_once()
        assert len(given_back) == 2, "not with every eviction"
        clock.now += 10
        await worker.report_once()
        await worker.report_once()
        assert len(given_back) == 3


async def test_free_heap_is_given_back_before_models_go_for_it() -> None:
    kernel, clock = [BASE], ManualClock()
    memory = ProcessBudget(BUDGET, read=lambda: kernel[0], give_back=lambda: kernel.__setitem__(0, BASE))
    async with running(FakeBackend(), memory=memory, clock=clock) as worker:
        for model_id in "ab":
            await worker.infer(work(model_id))
        for _ in range(40):
            kernel[0] = ProcessMemory(anonymous_bytes=205, file_bytes=2)
            clock.now += 0.25
            await worker.report_once()
        assert worker.report().unaccounted_bytes == 0
        assert set(worker.report().models) == {"a", "b"}


async def test_a_model_that_there_is_never_workspace_for_is_refused() -> None:
    memory = ProcessBudget(MemoryBudget(capacity_bytes=260, workspace_bytes=10), read=lambda: BASE)
    large = dataclasses.replace(published("large"), workspace_bytes=11)
    backend = FakeBackend()
    async with running(backend, memory=memory, others=(large,)) as worker:
        refused = await worker.infer(work("large"))
    assert isinstance(refused, InferenceRejected)
    assert isinstance(refused.error, DoesNotFit)
    assert backend.loads == []


def test_executions_that_need_more_workspace_than_there_is_run_one_after_another() -> None:
    memory = ProcessBudget(MemoryBudget(capacity_bytes=110, workspace_bytes=10), read=lambda: BASE)
    gate, began = threading.Event(), threading.Semaphore(0)
    running_now, most = 0, 0

    def run(needed_bytes: int) -> None:
        nonlocal running_now, most
        with memory.workspace(needed_bytes):
            running_now += needed_bytes
            most = max(most, running_now)
            began.release()
            gate.wait(10)
            running_now -= needed_bytes

    with ThreadPoolExecutor(3) as threads:
        jobs = [threads.submit(run, needed_bytes) for needed_bytes in (6, 4, 6)]
        assert began.acquire(timeout=10)
        assert began.acquire(timeout=10)
        gate.set()
        for job in jobs:
            job.result(10)
    assert most == 10


def test_more_workspace_lets_those_run_that_wait_for_it() -> None:
    memory = ProcessBudget(MemoryBudget(capacity_bytes=110, workspace_bytes=10), read=lambda: BASE)
    with ThreadPoolExecutor(1) as threads, memory.workspace(10):

        def run() -> str:
            with memory.workspace(10):
                return "ran"

        job = threads.submit(run)
        memory.divide(MemoryBudget(capacity_bytes=110, workspace_bytes=20))
        assert job.result(10) == "ran"


class SlowFirst(FakeBackend):
    """Only model b waits for the gate."""

    def load(self, model_id: str) -> FakeModel:
        model = super().load(model_id)
        if model_id == "b":
            self.slow = model
        else:
            model._gate = threading.Event()
            model._gate.set()
        return model


async def test_a_hit_does_not_wait_for_the_first_execution_of_another_model() -> None:
    backend = SlowFirst()
    async with running(backend) as worker:
        for _ in range(2):
            await worker.infer(work("a"))
        backend.gate.clear()
        first = asyncio.ensure_future(worker.infer(work("b")))
        async with asyncio.timeout(5):
            while not hasattr(backend, "slow") or not backend.slow.running:  # noqa: ASYNC110 - a worker has no events
                await asyncio.sleep(0)
            # There is one thread for inferences.
            hit = await worker.infer(work("a"))
        assert isinstance(hit, InferenceResult)
        assert hit.outcome is Outcome.HIT
        assert not first.done()
        backend.gate.set()
        assert isinstance(await first, InferenceResult)
