"""A participant's connection to the coordinator, which is none here, and what is done again and again."""

from __future__ import annotations

import asyncio
import threading
from types import SimpleNamespace
from typing import Any

import pytest
import ray
from fakes import view

from serve_app.core.coordination.rules import CoordinatorRules
from serve_app.serving.coordinator import client
from serve_app.serving.coordinator.client import CoordinatorClient
from serve_app.serving.periodic import every

OLD = CoordinatorRules(issued=1, half_life_s=60.0, stale_after_s=2.0)
NEW = CoordinatorRules(issued=2, half_life_s=10.0, stale_after_s=2.0)


class FakeRay:
    """As much of ``ray`` as finds an actor and tells it rules; that takes until ``connected``."""

    exceptions = ray.exceptions

    def __init__(self) -> None:
        self.told: list[CoordinatorRules] = []
        self.connecting = threading.Event()
        self.connected = threading.Event()

    def remote(self, actor: type) -> Any:
        return SimpleNamespace(options=lambda **_: SimpleNamespace(remote=self._find))

    def _find(self, rules: CoordinatorRules) -> Any:
        return SimpleNamespace(configure=SimpleNamespace(remote=self._tell), read=SimpleNamespace(remote=self._answer))

    def _tell(self, rules: CoordinatorRules) -> None:
        self.told.append(rules)
        self.connecting.set()
        assert self.connected.wait(10)

    async def _answer(self, *_: object) -> Any:
        return view()


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> FakeRay:
    fake = FakeRay()
    monkeypatch.setattr(client, "ray", fake)
    return fake


async def test_rules_that_change_while_it_connects_reach_the_coordinator(cluster: FakeRay) -> None:
    link = CoordinatorClient(OLD)
    exchange = asyncio.create_task(link.exchange({}, "", 0))
    await asyncio.to_thread(cluster.connecting.wait, 10)
    link.configure(NEW)
    cluster.connected.set()
    assert await exchange is not None
    await link.exchange({}, "", 0)
    assert cluster.told[-1] == NEW


async def test_a_client_that_has_found_the_coordinator_does_not_look_for_it_again(cluster: FakeRay) -> None:
    cluster.connected.set()
    link = CoordinatorClient(OLD)
    for _ in range(3):
        await link.exchange({}, "", 0)
    assert cluster.told == [OLD]


async def test_a_periodic_task_goes_on_when_what_it_waited_for_was_canceled() -> None:
    rounds: list[int] = []
    again = asyncio.Event()

    async def act() -> None:
        rounds.append(len(rounds))
        if len(rounds) > 1:
            again.set()
        canceled = asyncio.get_running_loop().create_future()
        canceled.cancel()
        await canceled

    task = asyncio.create_task(every(0.0, act))
    async with asyncio.timeout(10):
        await again.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
