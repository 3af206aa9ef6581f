"""Whatever happens to a ``ModelManager`` at the same time, nothing runs on memory that is gone, and nothing is left.

Requests, cancellations, loads that end and fail, exchanges, files that change, less memory and the end come in any
order, with the event loop anywhere between its steps.
"""

from __future__ import annotations

import asyncio
import random
from contextlib import suppress
from dataclasses import replace
from typing import Any

import pytest
from core_support import profile
from manager_support import Bench, FakeModel

from serve_app.core.cache.events import CapacityChanged, ContentChanged, ExchangeSuggested, UnloadRequested
from serve_app.core.forms import model_of
from serve_app.core.vocabulary import ModelState
from serve_app.errors import Conflict, EdgeServeError, NotFound, StoreError
from serve_app.serving.worker.model_manager import Lease

MODELS = [profile("a", 20), profile("b", 30), profile("c", 40), profile("d", 15)]
STEPS = 80


class Fuzz:
    """Does at random what a worker does to its manager, and looks after each step whether all is well."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.bench = Bench(max_preloads=1, max_waiting=6)
        self.held: list[Lease] = []
        self.steps = [
            *[self.request] * 6,
            *[self.release] * 5,
            *[self.end_load] * 6,
            *[self.exchange] * 3,
            self.cancel, self.fail_load, self.change_content, self.change_capacity, self.unload, self.want,
        ]  # fmt: skip

    async def run(self) -> None:
        for _ in range(STEPS):
            await self.rng.choice(self.steps)()
            for _ in range(self.rng.choice([0, 1, 2, 3, 20])):
                await asyncio.sleep(0)
            self.collect()
            self.look()

    async def request(self) -> None:
        model = self.rng.choice(MODELS)
        work = self.bench.manager.acquire(model)
        self.bench.requests.append(asyncio.get_running_loop().create_task(work, name=model.model_id))

    async def release(self) -> None:
        if self.held:
            self.bench.manager.release(self.held.pop(self.rng.randrange(len(self.held))))

    async def cancel(self) -> None:
        if self.bench.requests:
            self.rng.choice(self.bench.requests).cancel()

    async def end_load(self) -> None:
        if self.bench.loads.under_way:
            self.bench.loads.end(self.rng.choice(self.bench.loads.under_way))

    async def fail_load(self) -> None:
        if self.bench.loads.under_way:
            self.bench.loads.fail(self.rng.choice(self.bench.loads.under_way), StoreError("the disk says no"))

    async def exchange(self) -> None:
        model, tier = self.rng.choice(MODELS), self.rng.choice([1, 2])
        form = replace(model, size_bytes=model.size_bytes + self.rng.choice([0, 5, 15]), tier=tier)
        self.bench.manager.handle(ExchangeSuggested(form))

    async def change_content(self) -> None:
        self.bench.manager.handle(ContentChanged(self.rng.choice("abcd")))

    async def change_capacity(self) -> None:
        self.bench.manager.handle(CapacityChanged(self.rng.choice([50, 80, 100, 120])))

    async def unload(self) -> None:
        with suppress(Conflict, NotFound):
            self.bench.manager.handle(UnloadRequested(self.rng.choice("abcd")))

    async def want(self) -> None:
        self.bench.now += 10.0
        await self.bench.want(self.rng.choice(MODELS))

    def collect(self) -> None:
        """Take in what has become of requests."""
        for request in [request for request in self.bench.requests if request.done()]:
            self.bench.requests.remove(request)
            with suppress(asyncio.CancelledError, EdgeServeError):
                self.held.append(request.result())

    def look(self) -> None:
        bench = self.bench
        models = bench.cache.models()
        assert bench.cache.used_bytes == sum(model.size_bytes for model in models)
        assert bench.faults == []
        for lease in self.held:
            assert self.model(lease).in_memory, f"{lease.model_id} is in use, and out of memory"
        taken = [model.model_id for model in models if model.state is ModelState.READY]
        assert set(taken) == bench.manager._runnables.keys(), "what is in memory is what the cache counts"

    async def finish(self) -> None:
        """Let everything end."""
        for _ in range(200):
            await self.bench.settle()
            self.collect()
            self.look()
            if self.held:
                await self.release()
            elif self.bench.loads.under_way:
                await self.end_load()
            elif not self.bench.requests:
                return
        raise AssertionError("a request waits for ever")

    async def close(self) -> None:
        """End the manager as a worker does, when no execution uses a model: all that is under way ends after it."""
        self.collect()
        while self.held:
            await self.release()
        loading = {model.model_id for model in self.bench.cache.models() if model.state is ModelState.LOADING}
        for request in self.bench.requests:
            loading.add(request.get_name())
            request.cancel()
        self.bench.manager.close()
        for _ in range(50):
            await self.bench.settle()
            if not self.bench.loads.under_way:
                break
            await self.end_load()
        await self.bench.settle()
        left = {model_of(model.model_id) for model in self.bench.loads.made if model.in_memory}
        assert left <= loading, "only a load for a request outlives the end"
        assert [model for model in self.bench.loads.made if model.in_memory and "#" in model.model_id] == []

    @staticmethod
    def model(lease: Lease) -> FakeModel:
        assert isinstance(lease.runnable, FakeModel)
        return lease.runnable


async def play(seed: int, *, closes: bool) -> None:
    fuzz = Fuzz(seed)
    loop = asyncio.get_running_loop()

    def fault(_: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        fuzz.bench.faults.append(context)

    loop.set_exception_handler(fault)
    await fuzz.run()
    await (fuzz.close() if closes else fuzz.finish())
    bench = fuzz.bench
    assert bench.faults == []
    assert asyncio.all_tasks() == {asyncio.current_task()}, "a task is pending"
    if not closes:
        assert not any(bench.uses().values()), "a pin is left"
        assert bench.cache.waiting == 0
        in_memory = {id(model) for model in bench.loads.made if model.in_memory}
        assert in_memory == {id(model) for model in bench.manager._runnables.values()}, "memory is lost"
        assert not bench.manager._abandoned


@pytest.mark.slow
@pytest.mark.parametrize("closes", [False, True])
@pytest.mark.parametrize("batch", range(4))
async def test_nothing_runs_on_memory_that_is_gone_and_nothing_is_left(batch: int, closes: bool) -> None:
    for seed in range(50 * batch, 50 * (batch + 1)):
        await play(seed, closes=closes)
