"""Inferences in threads: which are executed together, what each gets of it, and how many threads one uses."""

from __future__ import annotations

import asyncio
import dataclasses
import math
import sys
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import numpy as np
import pytest
from fakes import published

from serve_app.core.contract import Axis, Contract, SizeCost, TensorSpec
from serve_app.core.joined_executions import Joinable
from serve_app.core.memory_budget import MemoryBudget, ProcessMemory
from serve_app.core.vocabulary import Outcome
from serve_app.errors import InvalidRequest
from serve_app.serving.worker.execution import Execution
from serve_app.serving.worker.executor import ExecutionResult, InferenceExecutor
from serve_app.serving.worker.model_manager import Lease
from serve_app.serving.worker.process_budget import ProcessBudget
from serve_app.tasks.base import Answer, Solution
from serve_app.tasks.tensors import Tensors

MODEL = dataclasses.replace(
    published("rows"),
    contract=Contract(
        inputs=(TensorSpec(name="x", datatype="FP32", shape=(-1, 2)),),
        outputs=(TensorSpec(name="double", datatype="FP32", shape=(-1, 2)),),
        axes=(Axis(name="batch", most=8),),
    ),
    row_by_row=False,
    costs=tuple(SizeCost(sizes=(rows,), workspace_bytes=10 * rows, exec_s=0.01 + 0.001 * rows) for rows in (1, 8)),
    joined_elements=8,
)


class Doubling:
    """Answers with twice its input; refuses negative numbers; remembers the rows and threads of each execution."""

    form, own_bytes = "mapped", 0

    def __init__(self) -> None:
        self.gate = threading.Event()
        self.gate.set()
        self.began = threading.Event()
        self.rows: list[int] = []
        self.threads: list[int] = []

    def run(self, inputs: Tensors, threads: int = 0) -> Tensors:
        self.began.set()
        assert self.gate.wait(10)
        self.rows.append(len(inputs["x"]))
        self.threads.append(threads)
        if (inputs["x"] < 0).any():
            raise InvalidRequest("negative")
        if (inputs["x"] > 100).any() and len(inputs["x"]) > 1:
            sys.exit("foreign code may do so")
        return {"double": inputs["x"] * 2}

    def unload(self) -> None:
        return None


class Bench:
    """An executor of one slot, and its leases."""

    def __init__(self, cores: int = 1) -> None:
        self.model = Doubling()
        self.leases = 0
        self.machine_others = 0
        self.executor = InferenceExecutor(
            slots=1,
            budget=ProcessBudget(
                MemoryBudget(capacity_bytes=1000, workspace_bytes=80),
                read=lambda: ProcessMemory(anonymous_bytes=0, file_bytes=0),
            ),
            release=self._release,
            name="paris",
            clock=lambda: 0.0,
            cores=cores,
            machine_others=lambda: self.machine_others,
        )

    def _release(self, lease: Lease) -> None:
        self.leases -= 1

    def submit(
        self, *values: float, until_s: float = math.inf, least_s: float = 0.01, solution: Solution | None = None
    ) -> asyncio.Task[ExecutionResult]:
        rows = len(values)
        inputs = {"x": np.array([[value, value] for value in values], np.float32)}
        self.leases += 1
        lease = Lease(
            model_id="rows", runnable=self.model, outcome=Outcome.HIT, wait_s=0.0, load_s=0.0, evicted=()
        )  # fmt: skip
        return asyncio.get_running_loop().create_task(
            self.executor.execute(
                lease,
                Execution(contract=MODEL.contract, inputs=inputs, solution=solution),
                least_s=least_s,
                times_longer=MODEL.times_longer((rows,)),
                workspace_bytes=MODEL.cost((rows,)).workspace_bytes,
                joinable=Joinable(model=MODEL, sizes=(rows,), least_s=least_s, until_s=until_s),
            )
        )

    async def warm(self) -> None:
        """The first execution of a model in memory is in another thread."""
        await self.submit(0)
        self.model.rows.clear()
        self.model.threads.clear()

    async def occupied(self) -> asyncio.Task[ExecutionResult]:
        """Let a request hold the slot until the gate is opened."""
        self.model.gate.clear()
        self.model.began.clear()
        task = self.submit(100)
        await asyncio.sleep(0)
        await asyncio.to_thread(self.model.began.wait, 10)
        return task


@asynccontextmanager
async def bench(cores: int = 1) -> AsyncIterator[Bench]:
    made = Bench(cores)
    await made.warm()
    try:
        yield made
    finally:
        made.model.gate.set()
        await asyncio.to_thread(made.executor.shutdown)
        await asyncio.sleep(0)
        assert made.leases == 0
        assert made.executor.queue_s == 0


async def together(
    bench: Bench, *requests: Callable[[], asyncio.Task[ExecutionResult]]
) -> list[asyncio.Task[ExecutionResult]]:
    """Have requests wait for the slot, then free it; return their tasks, ended."""
    holder = await bench.occupied()
    tasks = [request() for request in requests]
    await asyncio.sleep(0)
    bench.model.gate.set()
    await asyncio.wait([holder, *tasks])
    return tasks


async def test_requests_that_wait_for_a_slot_are_executed_at_once_and_each_gets_its_rows() -> None:
    async with bench() as b:
        tasks = await together(b, lambda: b.submit(1), lambda: b.submit(2, 3), lambda: b.submit(4))
        assert b.model.rows == [1, 4]
    results = [task.result() for task in tasks]
    assert [result.result.outputs["double"][:, 0].tolist() for result in results] == [[2], [4, 6], [8]]
    assert [result.requests for result in results] == [3, 3, 3]
    assert [result.share for result in results] == [0.25, 0.5, 0.25]
    assert {result.times_longer for result in results} == {MODEL.times_longer((4,))}


async def test_a_request_that_finds_a_free_slot_waits_for_no_other() -> None:
    async with bench() as b:
        result = await b.submit(1)
        assert b.model.rows == [1]
    assert (result.requests, result.share) == (1, 1)


async def test_a_bad_request_fails_alone() -> None:
    async with bench() as b:
        tasks = await together(b, lambda: b.submit(1), lambda: b.submit(-1), lambda: b.submit(3))
    good, bad, other = tasks
    assert good.result().result.outputs["double"].tolist() == [[2, 2]]
    assert other.result().result.outputs["double"].tolist() == [[6, 6]]
    with pytest.raises(InvalidRequest, match="negative"):
        bad.result()


async def test_code_that_exits_in_a_joint_execution_is_run_alone() -> None:
    async with bench() as b:
        tasks = await together(b, lambda: b.submit(101), lambda: b.submit(2))
    assert [task.result().result.outputs["double"].tolist() for task in tasks] == [[[202, 202]], [[4, 4]]]


async def test_a_request_that_was_canceled_while_it_waited_is_not_executed() -> None:
    async with bench() as b:
        holder = await b.occupied()
        tasks = [b.submit(1), b.submit(2), b.submit(3)]
        await asyncio.sleep(0)
        tasks[1].cancel()
        await asyncio.sleep(0)
        b.model.gate.set()
        await asyncio.wait([holder, *tasks])
        assert b.model.rows == [1, 2]
        assert tasks[2].result().result.outputs["double"].tolist() == [[6, 6]]


async def test_a_request_that_is_canceled_while_it_runs_with_others_leaves_them_alone() -> None:
    async with bench() as b:
        holder = await b.occupied()
        tasks = [b.submit(1), b.submit(2)]
        await asyncio.sleep(0)
        b.model.gate.set()
        await holder
        tasks[0].cancel()
        await asyncio.wait(tasks)
        assert tasks[1].result().result.outputs["double"].tolist() == [[4, 4]]


async def test_what_waits_is_estimated_by_what_a_joint_execution_takes() -> None:
    async with bench() as b:
        holder = await b.occupied()
        tasks = [b.submit(1) for _ in range(4)]
        await asyncio.sleep(0)
        # The one that runs, and 4 rows at once in 14 ms instead of 4 times 11 ms.
        assert b.executor.queue_s == pytest.approx(0.0255 / 5 * 4.5, rel=0.1)
        b.model.gate.set()
        await asyncio.wait([holder, *tasks])


async def test_each_member_of_a_joint_execution_goes_on_with_its_own_task() -> None:
    def total(steps: int) -> Solution:
        outputs = yield {}
        for _ in range(steps):
            outputs = yield {"x": outputs["double"]}
        answer: Answer = {"total": float(outputs["double"].sum())}
        return answer

    def begun(steps: int) -> Solution:
        solution = total(steps)
        next(solution)
        return solution

    async with bench() as b:
        tasks = await together(b, lambda: b.submit(1, solution=begun(0)), lambda: b.submit(5, solution=begun(1)))
        assert b.model.rows == [1, 2, 1]
    assert [task.result().result.answer for task in tasks] == [{"total": 4.0}, {"total": 40.0}]
    assert [task.result().result.executions for task in tasks] == [1, 2]


async def test_a_long_execution_has_all_cores_of_an_idle_machine() -> None:
    async with bench(cores=4) as b:
        await b.submit(1)
        await b.submit(1, least_s=0.001)
        assert b.model.threads == [4, 0]
        b.machine_others = 1
        await b.submit(1)
        assert b.model.threads[-1] == 1
