"""Routers of a large cluster, for ``loadtests.scale``: they take in deltas, and decide.

They are in a process of their own, without the coordinator, as in service: the reports of a thousand workers fill
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

#: Decisions of every router between two deltas; and of all together.
REQUESTS = 10
DECISIONS = 20_000
_PAYLOAD_BYTES = 100_000


class _Router:
    """One router, which has measured the links to all locations that it knows of, as in service."""

    def __init__(self, location: str, world: World, rng: random.Random) -> None:
        self._location, self._world, self._rng = location, world, rng
        self._known = RouterView()
        self._links = LinkTable(location, world.rules.link)
        self._probed = {location}

    def apply(self, delta: bytes, now: float) -> float:
        """Take in a delta; returns the seconds that it took."""
        before_s = time.thread_time()
        self._known.apply(pickle.loads(delta), now)
        took_s = time.thread_time() - before_s
        self._probe()
        before_s = time.thread_time()
        self._known.precompute(self._location, self._world.rules, self._links)
        return took_s + time.thread_time() - before_s

    def _probe(self) -> None:
        for other in {report.location for report in self._known.workers()} - self._probed:
            self._probed.add(other)
            link = self._world.link(self._location, other)
            for payload_bytes in (0, 0, _PAYLOAD_BYTES, _PAYLOAD_BYTES):
                self._links.add(other, payload_bytes, link.seconds(payload_bytes))

    def decide(self, took: dict[str, list[int]]) -> None:
        """Decide on a few requests, and take in their answers; one load in five is still under way."""
        known, rules, links = self._known, self._world.rules, self._links
        for _ in range(REQUESTS):
            model = self._world.profiles[self._world.draw(self._location)]
            request = RoutingRequest(model=model, here=self._location, payload_bytes=_PAYLOAD_BYTES)
            before_ns = time.thread_time_ns()
            route = choose(request, known, rules, links)
            took[route.outcome.value].append(time.thread_time_ns() - before_ns)
            if route.replica is None:
                continue
            known.sent(route.replica, model.exec_s)
            for replica in (route.preload, route.replica if route.outcome is Outcome.LOAD else None):
                if replica is not None:
                    known.expect_load(replica, model.model_id)
                    if self._rng.random() < 0.8:
                        sequence = known.cluster.workers[replica].sequence + 1
                        known.observe(replica, model.model_id, ModelState.READY, sequence)
            known.returned(route.replica, model.exec_s)


def decide(locations: int, models: int, seed: int, announced: Sequence[dict[str, bytes]]) -> dict[str, float]:
    """Figures by name.

    Args:
        locations: of the world, as for ``World``.
        models: likewise.
        seed: likewise.
        announced: the deltas of every router four times a second, everything at first.
    """
    world, rng = World(locations, models, seed), random.Random(seed)
    world.workers.clear()
    routers = {location: _Router(location, world, rng) for location in announced[0]}
    took: dict[str, list[int]] = {outcome.value: [] for outcome in Outcome}
    applied_s: list[float] = []
    for number, deltas in enumerate(announced):
        for location, router in routers.items():
            seconds = router.apply(deltas[location], number * TICK_S)
            if number:
                applied_s.append(seconds)
                router.decide(took)
    values: dict[str, float] = {}
    everything = [nanoseconds for kind in took.values() for nanoseconds in kind]
    for name, samples in (*took.items(), ("all", everything)):
        values[f"decision p50, {name} (us)"] = _quantile(samples, 0.5) / 1e3
        values[f"decision p99, {name} (us)"] = _quantile(samples, 0.99) / 1e3
    values["delta taken in by a router (ms)"] = statistics.median(applied_s) * 1e3
    return values


def _quantile(samples: Sequence[float], share: float) -> float:
    return sorted(samples)[min(len(samples) - 1, int(len(samples) * share))] if samples else float("nan")
