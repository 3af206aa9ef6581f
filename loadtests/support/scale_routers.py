"""What routers of a large cluster do with their news, for ``loadtests.scale``: take them in, and decide.

They are in a process of their own, without the coordinator, as in service: what a thousand others have reported fills
neither their memory nor the caches of their processor.
"""

from __future__ import annotations

import pickle
import random
import statistics
import time
from collections.abc import Sequence

from loadtests.support.scale_world import TICK_S, World
from serve_app.core.links import LinkTable
from serve_app.core.routing.choose import RoutingRequest, choose
from serve_app.core.routing.router_view import RouterView
from serve_app.core.vocabulary import ModelState, Outcome

#: Of every router between two views; and of all together.
REQUESTS = 10
DECISIONS = 20_000
_PAYLOAD_BYTES = 100_000


class _Router:
    """One of them, and what it has measured: the ways to all that it knows of, as it does in service."""

    def __init__(self, location: str, world: World, rng: random.Random) -> None:
        self._location, self._world, self._rng = location, world, rng
        self._known = RouterView()
        self._ways = LinkTable(location, world.rules.link)
        self._probed = {location}

    def hear(self, news: bytes, now: float) -> float:
        """Take in news; returns the seconds that it took."""
        before_s = time.thread_time()
        self._known.apply(pickle.loads(news), now)
        took_s = time.thread_time() - before_s
        self._probe()
        before_s = time.thread_time()
        self._known.precompute(self._location, self._world.rules, self._ways)
        return took_s + time.thread_time() - before_s

    def _probe(self) -> None:
        for other in {report.location for report in self._known.workers()} - self._probed:
            self._probed.add(other)
            link = self._world.link(self._location, other)
            for payload_bytes in (0, 0, _PAYLOAD_BYTES, _PAYLOAD_BYTES):
                self._ways.add(other, payload_bytes, link.seconds(payload_bytes))

    def decide(self, took: dict[str, list[int]]) -> None:
        """A few requests, with what each and its answer tell the router; one load in five is still under way."""
        known, rules, ways = self._known, self._world.rules, self._ways
        for _ in range(REQUESTS):
            model = self._world.profiles[self._world.draw(self._location)]
            errand = RoutingRequest(model=model, here=self._location, payload_bytes=_PAYLOAD_BYTES)
            before_ns = time.thread_time_ns()
            plan = choose(errand, known, rules, ways)
            took[plan.outcome.value].append(time.thread_time_ns() - before_ns)
            if plan.replica is None:
                continue
            known.sent(plan.replica, model.exec_s)
            for replica in (plan.preload, plan.replica if plan.outcome is Outcome.LOAD else None):
                if replica is not None:
                    known.expect_load(replica, model.model_id)
                    if self._rng.random() < 0.8:
                        sequence = known.cluster.workers[replica].sequence + 1
                        known.observe(replica, model.model_id, ModelState.READY, sequence)
            known.returned(plan.replica, model.exec_s)


def decide(locations: int, models: int, seed: int, announced: Sequence[dict[str, bytes]]) -> dict[str, float]:
    """Figures by name.

    Args:
        locations: of the world, as for ``World``.
        models: likewise.
        seed: likewise.
        announced: what every router is told four times a second, everything at first.
    """
    world, rng = World(locations, models, seed), random.Random(seed)
    world.workers.clear()
    routers = {location: _Router(location, world, rng) for location in announced[0]}
    took: dict[str, list[int]] = {outcome.value: [] for outcome in Outcome}
    heard_s: list[float] = []
    for number, news in enumerate(announced):
        for location, router in routers.items():
            seconds = router.hear(news[location], number * TICK_S)
            if number:
                heard_s.append(seconds)
                router.decide(took)
    values: dict[str, float] = {}
    everything = [nanoseconds for kind in took.values() for nanoseconds in kind]
    for name, samples in (*took.items(), ("all", everything)):
        values[f"decision p50, {name} (us)"] = _quantile(samples, 0.5) / 1e3
        values[f"decision p99, {name} (us)"] = _quantile(samples, 0.99) / 1e3
    values["news taken in by a router (ms)"] = statistics.median(heard_s) * 1e3
    return values


def _quantile(samples: Sequence[float], share: float) -> float:
    return sorted(samples)[min(len(samples) - 1, int(len(samples) * share))] if samples else float("nan")
