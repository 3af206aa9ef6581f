"""What a worker holds beside what is worth it to its policy: commands, preload lists, idle unload, hand-over, changes.

The worker is real, its models, threads and coordinator are not.
"""

from __future__ import annotations

import asyncio
import dataclasses
import random

import pytest
from fakes import FakeLink, FakeMetrics, ManualClock, published, report, view
from test_worker import FakeBackend, running, work

from serve_app.core.catalog import Catalog
from serve_app.core.cluster.commands import Command, PreloadAt, WithdrawAt
from serve_app.core.cluster.primaries import rendezvous_rank
from serve_app.core.cluster.reports import ViewDelta, WorkerReport
from serve_app.core.coordination.rules import CoordinatorRules
from serve_app.core.links import Link
from serve_app.core.memory_budget import MemoryBudget
from serve_app.core.policies.registry import make_policy
from serve_app.core.routing.rules import RoutingRules
from serve_app.serving.transport.messages import InferenceResult
from serve_app.serving.worker.settings import RetentionRules
from serve_app.serving.worker.worker import Worker

COORDINATION = CoordinatorRules(half_life_s=60.0, stale_after_s=2.0)


class CommandLink(FakeLink):
    """A coordinator that gives each command once."""

    def __init__(self, *commands: Command, workers: tuple[WorkerReport, ...] = (), may_leave: bool = True) -> None:
        super().__init__(dataclasses.replace(view(*workers), commands=commands, may_leave=may_leave))
        self.configured: list[CoordinatorRules] = []

    async def exchange(self, sent: WorkerReport | None, epoch: str, version: int) -> ViewDelta | None:
        delta = await super().exchange(sent, epoch, version)
        if self.delta is not None:
            self.delta = dataclasses.replace(self.delta, commands=())
        return delta

    def configure(self, rules: CoordinatorRules) -> None:
        self.configured.append(rules)


def preload(model_id: str, *, required: bool = False) -> PreloadAt:
    return PreloadAt(location="paris", replica="paris-1", model_id=model_id, required=required)


def withdraw(model_id: str) -> WithdrawAt:
    return WithdrawAt(location="paris", replica="paris-1", model_id=model_id)


def held(worker: Worker) -> set[str]:
    return {name for name, model in worker.report().models.items() if model.state.value == "ready"}


async def until_held(worker: Worker, *model_ids: str) -> None:
    async with asyncio.timeout(10):
        while held(worker) != set(model_ids):  # noqa: ASYNC110 - a worker has no events
            await asyncio.sleep(0)


async def test_commands_are_carried_out() -> None:
    link = CommandLink(withdraw("a"), preload("c"), preload("nowhere"))
    async with running(FakeBackend(), link) as worker:
        await worker.infer(work("a"))
        await worker.infer(work("b"))
        worker.start(3600)
        await until_held(worker, "b", "c")


async def test_a_command_does_not_touch_a_model_in_use() -> None:
    backend = FakeBackend()
    link = CommandLink(withdraw("a"), preload("c", required=True))
    async with running(backend, link, capacity=200) as worker:
        await worker.infer(work("b"))
        backend.gate.clear()
        busy = asyncio.ensure_future(worker.infer(work("a")))
        async with asyncio.timeout(10):
            while "a" not in held(worker):  # noqa: ASYNC110 - a worker has no events
                await asyncio.sleep(0)
        worker.start(3600)
        await until_held(worker, "a", "c")
        backend.gate.set()
        assert isinstance(await busy, InferenceResult)


async def test_what_is_listed_is_loaded_at_the_start_as_far_as_it_fits() -> None:
    backend = FakeBackend()
    async with running(backend, retention=RetentionRules(preload=("c", "nowhere", "a", "b"))) as worker:
        worker.start(3600)
        await until_held(worker, "a", "c")
        assert backend.loads == ["c", "a"]
        assert not any(model.unevictable for model in worker.report().models.values())


async def test_an_idle_model_is_unloaded_and_the_policy_does_not_bring_it_back() -> None:
    clock = ManualClock()
    backend = FakeBackend()
    retention = RetentionRules(idle_unload_s=600.0)
    async with running(backend, CommandLink(), retention=retention, clock=clock) as worker:
        await worker.infer(work("a"))
        clock.now = 300.0
        await worker.infer(work("b"))
        clock.now = 600.0
        worker.start(0.001)
        await until_held(worker, "b")
        clock.now = 900.0
        await until_held(worker)
        assert backend.loads == ["a", "b"]


async def test_a_copy_that_must_be_there_is_pinned_only_while_it_is_needed() -> None:
    retention = RetentionRules(min_copies={"a": 1})
    other = next(
        f"tokyo-{n}" for n in range(99) if rendezvous_rank("a", f"tokyo-{n}") < rendezvous_rank("a", "paris-1")
    )
    primary = dataclasses.replace(report("tokyo", "a", replica=other), primary_for=frozenset("a"))
    link = CommandLink()
    async with running(FakeBackend(), link, retention=retention) as worker:
        await worker.infer(work("a"))
        worker.start(0.001)
        async with asyncio.timeout(10):
            while not worker.report().models["a"].unevictable:  # noqa: ASYNC110 - a worker has no events
                await asyncio.sleep(0)
            assert worker.report().primary_for == {"a"}
            link.delta = view(primary)
            while worker.report().models["a"].unevictable:  # noqa: ASYNC110 - a worker has no events
                await asyncio.sleep(0)


class CountedPreloads(FakeMetrics):
    def __init__(self) -> None:
        self.preloads = 0

    def preload_started(self) -> None:
        self.preloads += 1


async def test_metric_and_report_count_the_same_preloads() -> None:
    """Pinned models and what placement orders are preloads; what a router orders for a forwarded request is a load."""
    metrics = CountedPreloads()
    async with running(FakeBackend(), CommandLink(preload("c")), capacity=300, metrics=metrics, pinned="b") as worker:
        await worker.preload_pinned()
        await worker.preload("a")
        await worker.preload("a")
        worker.start(3600)
        await until_held(worker, "a", "b", "c")
        report = worker.report()
        assert (report.preloads, report.loads) == (2, 1)
        assert metrics.preloads == report.preloads


# Leaving


async def test_a_leaving_worker_says_so_and_waits_until_it_may() -> None:
    link = CommandLink(may_leave=False)
    async with running(FakeBackend(), link) as worker:
        await worker.infer(work("a"))
        worker.start(0.001)
        async with asyncio.timeout(10):
            while not link.reports:  # noqa: ASYNC110 - a link has no events
                await asyncio.sleep(0)
        leaving = asyncio.ensure_future(worker.stop())
        async with asyncio.timeout(10):
            while not link.reports[-1].leaving:  # noqa: ASYNC110 - a link has no events
                await asyncio.sleep(0)
        assert not leaving.done()
        assert link.departed == []
        link.delta = view()
        await asyncio.wait_for(leaving, 10)
        assert link.departed == ["paris-1"]


@pytest.mark.parametrize("down", ["before", "meanwhile", "never"])
async def test_a_leaving_worker_waits_neither_long_nor_for_a_coordinator_that_is_down(down: str) -> None:
    link = CommandLink(may_leave=False)
    async with running(FakeBackend(), link, retention=RetentionRules(hand_over_s=0.05)) as worker:
        worker.start(0.001)
        await asyncio.sleep(0)
        if down == "before":
            link.delta = None
        leaving = asyncio.ensure_future(worker.stop())
        await asyncio.sleep(0)
        if down == "meanwhile":
            link.delta = None
        await asyncio.wait_for(leaving, 10)
        assert link.departed == ["paris-1"]


# Another configuration


async def test_a_worker_goes_on_by_another_configuration_without_losing_a_request() -> None:
    backend, link = FakeBackend(), CommandLink()
    async with running(backend, link) as worker:
        await worker.infer(work("a"))
        backend.gate.clear()
        busy = asyncio.ensure_future(worker.infer(work("b")))
        async with asyncio.timeout(10):
            while "b" not in held(worker):  # noqa: ASYNC110 - a worker has no events
                await asyncio.sleep(0)
        catalog = Catalog((published("a"), published("d")))
        worker.reconfigure(
            catalog=catalog,
            budget=MemoryBudget(capacity_bytes=180, workspace_bytes=30),
            policy=make_policy("gdsf", random.Random(0)),
            rules=RoutingRules(
                profiles=catalog.profiles(), links={}, default_link=Link(rtt_s=1.0, bytes_per_s=1e9), horizon_s=10
            ),
            retention=RetentionRules(),
            coordination=COORDINATION,
        )
        assert held(worker) == {"b"}
        backend.gate.set()
        assert isinstance(await busy, InferenceResult)
        await until_held(worker)
        assert isinstance(await worker.infer(work("d")), InferenceResult)
        assert worker.report().capacity_bytes == 180
        assert worker.report().model_capacity_bytes == 150
        assert worker.report().workspace_bytes == 30
        assert link.configured == [COORDINATION]


async def test_a_configuration_that_cannot_be_is_refused_whole() -> None:
    async with running(FakeBackend(), CommandLink()) as worker:
        await worker.infer(work("a"))
        pinned = dataclasses.replace(published("a"), pinned=True)
        with pytest.raises(ValueError, match="pinned"):
            worker.reconfigure(
                catalog=Catalog((pinned,)),
                budget=MemoryBudget(capacity_bytes=50, workspace_bytes=0),
                policy=None,
                rules=RoutingRules(profiles={}, links={}, default_link=Link(rtt_s=1.0, bytes_per_s=1e9), horizon_s=10),
                retention=RetentionRules(),
                coordination=COORDINATION,
            )
        assert worker.report().capacity_bytes == 250
        assert isinstance(await worker.infer(work("b")), InferenceResult)
