# ruff: noqa: PTH101, PTH102, PTH208 - in coroutines pathlib is refused, and these are tests
"""Lines from routers to workers, without Ray: what comes through, and what happens when an end goes away."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import numpy as np
import pytest
from fakes import done

from serve_app.errors import InvalidRequest
from serve_app.serving.transport.local_rpc import (
    ConnectionLost,
    LocalRpcConnection,
    LocalRpcPool,
    LocalRpcServer,
    connect,
)
from serve_app.serving.transport.messages import InferenceRejected, InferenceResult, InferenceTask, Reply

SMALL, LARGE = (1, 3, 4, 4), (2, 3, 224, 224)


def work(shape: tuple[int, ...] = SMALL, model_id: str = "a") -> InferenceTask:
    numbers = np.random.default_rng(0).random(shape, np.float32)
    return InferenceTask(model_id=model_id, origin="paris", payload=numbers, budget_s=5.0)


async def echo(asked: InferenceTask) -> Reply:
    return done("paris-1", logits=asked.payload * 2)


class Gate:
    """A worker that answers when the test says so."""

    def __init__(self) -> None:
        self.began, self.may_end = asyncio.Event(), asyncio.Event()
        self.cancelled = asyncio.Event()

    async def infer(self, asked: InferenceTask) -> Reply:
        self.began.set()
        try:
            await self.may_end.wait()
        except asyncio.CancelledError:
            self.cancelled.set()
            raise
        return await echo(asked)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "lines"


@asynccontextmanager
async def linked(
    folder: Path, infer: Callable[[InferenceTask], Awaitable[Reply]]
) -> AsyncIterator[tuple[LocalRpcConnection, LocalRpcServer]]:
    exchange = LocalRpcServer(infer)
    await exchange.open(folder, "paris-1")
    line = await connect(folder, "paris-1")
    assert line is not None
    async with asyncio.timeout(10):
        while not exchange.extensions:  # noqa: ASYNC110 - lines have no events
            await asyncio.sleep(0)
        yield line, exchange
        await exchange.close()
        line.hang_up()
        while not line.is_broken or exchange.extensions:  # noqa: ASYNC110 - lines have no events
            await asyncio.sleep(0)


@pytest.mark.parametrize("shape", [SMALL, LARGE])
async def test_tensors_come_through_whole_whatever_their_size(folder: Path, shape: tuple[int, ...]) -> None:
    async with linked(folder, echo) as (line, _):
        asked = work(shape)
        reply = await line.infer(asked)
        assert isinstance(reply, InferenceResult)
        np.testing.assert_array_equal(reply.logits, asked.payload * 2)


async def test_a_tensor_that_may_be_written_to_arrives_as_one_that_may(folder: Path) -> None:
    seen: list[InferenceTask] = []

    async def infer(asked: InferenceTask) -> Reply:
        seen.append(asked)
        return await echo(asked)

    async with linked(folder, infer) as (line, _):
        for shape in (SMALL, LARGE):
            await line.infer(work(shape))
    assert all(asked.payload.flags.writeable and asked.payload.flags.aligned for asked in seen)


async def test_many_calls_at_a_time_each_get_their_own_answer(folder: Path) -> None:
    async with linked(folder, echo) as (line, _):
        asked = [work(LARGE if number % 3 else SMALL, f"m{number}") for number in range(30)]
        replies = await asyncio.gather(*(line.infer(each) for each in asked))
        for each, reply in zip(asked, replies, strict=True):
            assert isinstance(reply, InferenceResult)
            assert reply.logits.shape == each.payload.shape


async def test_a_refusal_is_an_answer_and_a_fault_is_not(folder: Path) -> None:
    async def infer(asked: InferenceTask) -> Reply:
        if asked.model_id == "broken":
            raise ZeroDivisionError("inner detail")
        return InferenceRejected(error=InvalidRequest("no image"))

    async with linked(folder, infer) as (line, _):
        refused = await line.infer(work())
        assert isinstance(refused, InferenceRejected)
        assert isinstance(refused.error, InvalidRequest)
        with pytest.raises(RuntimeError, match="ZeroDivisionError"):
            await line.infer(work(model_id="broken"))


async def test_a_worker_that_dies_fails_its_calls_at_once(folder: Path) -> None:
    gate = Gate()
    async with linked(folder, gate.infer) as (line, exchange):
        call = asyncio.create_task(line.infer(work()))
        await gate.began.wait()
        for extension in tuple(exchange.extensions):
            extension._transport.abort()
        with pytest.raises(ConnectionLost):
            await call
        with pytest.raises(ConnectionLost):
            await line.infer(work())


async def test_a_call_that_is_cancelled_is_cancelled_at_the_worker(folder: Path) -> None:
    gate = Gate()
    async with linked(folder, gate.infer) as (line, _):
        call = asyncio.create_task(line.infer(work()))
        await gate.began.wait()
        call.cancel()
        await gate.cancelled.wait()


async def test_what_a_router_that_died_has_asked_for_is_cancelled(folder: Path) -> None:
    gate = Gate()
    async with linked(folder, gate.infer) as (line, _):
        call = asyncio.create_task(line.infer(work()))
        await gate.began.wait()
        line._transport.abort()
        await gate.cancelled.wait()
        with pytest.raises(ConnectionLost):
            await call


async def test_closing_sees_calls_through_and_takes_no_more(folder: Path) -> None:
    gate = Gate()
    async with linked(folder, gate.infer) as (line, exchange):
        call = asyncio.create_task(line.infer(work()))
        await gate.began.wait()
        closing = asyncio.create_task(exchange.close())
        await asyncio.sleep(0)
        with pytest.raises(ConnectionLost, match="shutting down"):
            await line.infer(work())
        assert not closing.done()
        gate.may_end.set()
        assert isinstance(await call, InferenceResult)
        await closing
        assert await connect(folder, "paris-1") is None


async def test_who_is_not_on_this_host_has_no_line_and_who_was_killed_is_lost(folder: Path) -> None:
    assert await connect(folder, "tokyo-1") is None
    os.mkdir(folder, mode=0o700)
    with socket.socket(socket.AF_UNIX) as killed:
        killed.bind(str(folder / "tokyo-1.sock"))
    with pytest.raises(ConnectionLost):
        await connect(folder, "tokyo-1")
    async with linked(folder, echo):
        assert os.listdir(folder) == ["paris-1.sock"]


async def test_a_folder_that_others_may_enter_is_not_used(folder: Path) -> None:
    os.mkdir(folder)
    os.chmod(folder, 0o755)
    with pytest.raises(PermissionError, match="only this user"):
        await LocalRpcServer(echo).open(folder, "paris-1")
    assert os.listdir(folder) == []


async def test_who_answers_in_a_folder_that_others_may_enter_is_not_asked(folder: Path) -> None:
    async with linked(folder, echo):
        os.chmod(folder, 0o777)
        assert await connect(folder, "paris-1") is None
        os.chmod(folder, 0o700)


async def test_calls_to_one_worker_share_a_line_and_a_broken_one_is_not_used_again(folder: Path) -> None:
    lines = LocalRpcPool(folder)
    assert await lines.to("tokyo-1") is None
    async with linked(folder, echo) as (_, _):
        first, second = await asyncio.gather(lines.to("paris-1"), lines.to("paris-1"))
        assert first is second is await lines.to("paris-1") is not None
        await first.infer(work())
        first._transport.abort()
        while not first.is_broken:  # noqa: ASYNC110 - lines have no events
            await asyncio.sleep(0)
        again = await lines.to("paris-1")
        assert again is not first
        assert isinstance(await again.infer(work()), InferenceResult)
        again.hang_up()
