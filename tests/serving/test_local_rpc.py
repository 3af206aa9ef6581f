# ruff: noqa: PTH101, PTH102, PTH208 - in coroutines pathlib is refused, and these are tests
"""Local RPC from routers to workers, without Ray: what arrives, and what happens when one end dies."""

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


def make_task(shape: tuple[int, ...] = SMALL, model_id: str = "a") -> InferenceTask:
    numbers = np.random.default_rng(0).random(shape, np.float32)
    return InferenceTask(model_id=model_id, origin="paris", payload={"input": numbers}, budget_s=5.0)


async def echo(asked: InferenceTask) -> Reply:
    return done("paris-1", outputs={"logits": asked.payload["input"] * 2})


class Gate:
    """A worker that answers when the test says so."""

    def __init__(self) -> None:
        self.began, self.may_end = asyncio.Event(), asyncio.Event()
        self.canceled = asyncio.Event()

    async def infer(self, asked: InferenceTask) -> Reply:
        self.began.set()
        try:
            await self.may_end.wait()
        except asyncio.CancelledError:
            self.canceled.set()
            raise
        return await echo(asked)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "sockets"


@asynccontextmanager
async def connected(
    folder: Path, infer: Callable[[InferenceTask], Awaitable[Reply]]
) -> AsyncIterator[tuple[LocalRpcConnection, LocalRpcServer]]:
    server = LocalRpcServer(infer)
    await server.open(folder, "paris-1")
    connection = await connect(folder, "paris-1")
    assert connection is not None
    async with asyncio.timeout(10):
        while not server.connections:  # noqa: ASYNC110 - connections have no events
            await asyncio.sleep(0)
        yield connection, server
        await server.close()
        connection.close()
        while not connection.is_lost or server.connections:  # noqa: ASYNC110 - connections have no events
            await asyncio.sleep(0)


@pytest.mark.parametrize("shape", [SMALL, LARGE])
async def test_tensors_of_any_size_arrive_unchanged(folder: Path, shape: tuple[int, ...]) -> None:
    async with connected(folder, echo) as (connection, _):
        asked = make_task(shape)
        reply = await connection.infer(asked)
        assert isinstance(reply, InferenceResult)
        np.testing.assert_array_equal(reply.outputs["logits"], asked.payload["input"] * 2)


async def test_a_writable_tensor_arrives_writable(folder: Path) -> None:
    seen: list[InferenceTask] = []

    async def infer(asked: InferenceTask) -> Reply:
        seen.append(asked)
        return await echo(asked)

    async with connected(folder, infer) as (connection, _):
        for shape in (SMALL, LARGE):
            await connection.infer(make_task(shape))
    assert all(each.flags.writeable and each.flags.aligned for asked in seen for each in asked.payload.values())


async def test_concurrent_calls_each_get_their_own_reply(folder: Path) -> None:
    async with connected(folder, echo) as (connection, _):
        asked = [make_task(LARGE if number % 3 else SMALL, f"m{number}") for number in range(30)]
        replies = await asyncio.gather(*(connection.infer(each) for each in asked))
        for each, reply in zip(asked, replies, strict=True):
            assert isinstance(reply, InferenceResult)
            assert reply.outputs["logits"].shape == each.payload["input"].shape


async def test_a_rejection_is_a_reply_and_a_fault_is_an_error(folder: Path) -> None:
    async def infer(asked: InferenceTask) -> Reply:
        if asked.model_id == "broken":
            raise ZeroDivisionError("inner detail")
        return InferenceRejected(error=InvalidRequest("no image"))

    async with connected(folder, infer) as (connection, _):
        refused = await connection.infer(make_task())
        assert isinstance(refused, InferenceRejected)
        assert isinstance(refused.error, InvalidRequest)
        with pytest.raises(RuntimeError, match="ZeroDivisionError"):
            await connection.infer(make_task(model_id="broken"))


async def test_a_worker_that_dies_fails_its_calls_at_once(folder: Path) -> None:
    gate = Gate()
    async with connected(folder, gate.infer) as (connection, server):
        call = asyncio.create_task(connection.infer(make_task()))
        await gate.began.wait()
        for accepted in tuple(server.connections):
            accepted.abort()
        with pytest.raises(ConnectionLost):
            await call
        with pytest.raises(ConnectionLost):
            await connection.infer(make_task())


async def test_a_call_that_is_canceled_is_canceled_at_the_worker(folder: Path) -> None:
    gate = Gate()
    async with connected(folder, gate.infer) as (connection, _):
        call = asyncio.create_task(connection.infer(make_task()))
        await gate.began.wait()
        call.cancel()
        await gate.canceled.wait()
        with pytest.raises(asyncio.CancelledError):
            await call


async def test_the_calls_of_a_router_that_dies_are_canceled(folder: Path) -> None:
    gate = Gate()
    async with connected(folder, gate.infer) as (connection, _):
        call = asyncio.create_task(connection.infer(make_task()))
        await gate.began.wait()
        connection.abort()
        await gate.canceled.wait()
        with pytest.raises(ConnectionLost):
            await call


async def test_closing_ends_running_calls_and_takes_no_more(folder: Path) -> None:
    gate = Gate()
    async with connected(folder, gate.infer) as (connection, server):
        call = asyncio.create_task(connection.infer(make_task()))
        await gate.began.wait()
        closing = asyncio.create_task(server.close())
        await asyncio.sleep(0)
        with pytest.raises(ConnectionLost, match="shutting down"):
            await connection.infer(make_task())
        assert not closing.done()
        gate.may_end.set()
        assert isinstance(await call, InferenceResult)
        await closing
        assert await connect(folder, "paris-1") is None


async def test_a_worker_of_another_host_has_no_connection_and_a_killed_one_is_lost(folder: Path) -> None:
    assert await connect(folder, "tokyo-1") is None
    os.mkdir(folder, mode=0o700)
    with socket.socket(socket.AF_UNIX) as killed:
        killed.bind(str(folder / "tokyo-1.sock"))
    with pytest.raises(ConnectionLost):
        await connect(folder, "tokyo-1")
    async with connected(folder, echo):
        assert os.listdir(folder) == ["paris-1.sock"]


async def test_a_folder_that_others_may_enter_is_not_used(folder: Path) -> None:
    os.mkdir(folder)
    os.chmod(folder, 0o755)
    with pytest.raises(PermissionError, match="only this user"):
        await LocalRpcServer(echo).open(folder, "paris-1")
    assert os.listdir(folder) == []


async def test_a_worker_in_a_folder_that_others_may_enter_is_not_called(folder: Path) -> None:
    async with connected(folder, echo):
        os.chmod(folder, 0o777)
        assert await connect(folder, "paris-1") is None
        os.chmod(folder, 0o700)


async def test_calls_to_one_worker_share_a_connection_until_it_is_lost(folder: Path) -> None:
    pool = LocalRpcPool(folder)
    assert await pool.connection("tokyo-1") is None
    async with connected(folder, echo) as (_, _):
        first, second = await asyncio.gather(pool.connection("paris-1"), pool.connection("paris-1"))
        assert first is second is await pool.connection("paris-1") is not None
        await first.infer(make_task())
        first.abort()
        while not first.is_lost:  # noqa: ASYNC110 - connections have no events
            await asyncio.sleep(0)
        again = await pool.connection("paris-1")
        assert again is not first
        assert isinstance(await again.infer(make_task()), InferenceResult)
        again.close()
