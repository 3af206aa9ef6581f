"""Loads and unloads that an operator asks for, with scripted workers."""

from __future__ import annotations

from typing import Any

import pytest
from fakes import FakePool

from serve_app.errors import Conflict, NotFound, StoreError, Unavailable
from serve_app.serving.router.model_control import ModelControl
from serve_app.serving.transport.messages import InferenceRejected
from serve_app.serving.transport.worker_pool import WorkerLost

NOT_LOADED = InferenceRejected(error=NotFound("not loaded here"))


class Pool(FakePool):
    """Workers that answer an operator as the test says, by replica."""

    def __init__(self, **replies: Any) -> None:
        super().__init__()
        self._replies = replies
        self.asked: list[str] = []

    async def load(self, location: str, model_id: str) -> Any:
        return await self.unload(location, "any", model_id)

    async def unload(self, location: str, replica: str, model_id: str) -> Any:
        self.asked.append(replica)
        reply = self._replies[replica]
        if isinstance(reply, Exception):
            raise reply
        return reply


async def unload(pool: Pool, *replicas: str) -> None:
    await ModelControl(pool, timeout_s=5.0).unload("paris", replicas, "small")


async def test_a_model_is_unloaded_from_every_worker_that_holds_it() -> None:
    pool = Pool(one=None, two=NOT_LOADED, three=None)
    await unload(pool, "one", "two", "three")
    assert pool.asked == ["one", "two", "three"]


async def test_a_model_that_no_worker_holds_is_not_found() -> None:
    with pytest.raises(NotFound, match="paris; nothing to unload"):
        await unload(Pool(one=NOT_LOADED), "one")
    with pytest.raises(NotFound, match="paris; nothing to unload"):
        await unload(Pool())


async def test_a_model_that_is_in_use_is_not_unloaded_from_further_workers() -> None:
    pool = Pool(one=InferenceRejected(error=Conflict("in use")), two=None)
    with pytest.raises(Conflict, match="in use"):
        await unload(pool, "one", "two")
    assert pool.asked == ["one"]


async def test_a_load_fails_as_it_failed_at_the_worker() -> None:
    pool = Pool(any=InferenceRejected(error=StoreError("cut short")))
    with pytest.raises(StoreError, match="cut short"):
        await ModelControl(pool, timeout_s=5.0).load("paris", "small")


@pytest.mark.parametrize("failure", [WorkerLost("gone"), TimeoutError()])
async def test_an_operator_of_a_location_without_a_worker_is_told_to_try_again(failure: Exception) -> None:
    with pytest.raises(Unavailable, match="paris could be reached"):
        await ModelControl(Pool(any=failure), timeout_s=5.0).load("paris", "small")
