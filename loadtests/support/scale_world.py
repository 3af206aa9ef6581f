"""A cluster of any size for ``loadtests.scale``: copies, demand and the reports of both.

Reports are those that workers would send, and go through ``pickle`` as between processes. Every location has one
worker. It holds ``HELD`` models, and ``ASKED`` ones are requested by Zipf's law: the most popular ones everywhere, and
some that are only its own. Locations lie on a plane; each has measured the links to the nearest and to some others.
"""

from __future__ import annotations

import dataclasses
import math
import pickle
import random
from collections.abc import Iterator

from serve_app.core.catalog import ModelProfile
from serve_app.core.cluster.reports import Demand, OutcomeCounts, WorkerReport
from serve_app.core.links import Link
from serve_app.core.routing.rules import RoutingRules
from serve_app.core.vocabulary import ModelState, ResidentModel

TICK_S = 0.25
HELD = 40
ASKED = 250
#: Of every location's users, and how often its worker loads a model in the place of another.
REQUESTS_PER_S = 10.0
SWAPS_PER_S = 1.0
_LINKS = 48
_MB = 1 << 20


class World:
    """The cluster.

    Args:
        locations: how many, with one worker each.
        models: how many there are in the catalog.
        seed: of everything.
    """

    def __init__(self, locations: int, models: int, seed: int) -> None:
        self._rng = rng = random.Random(seed)
        self.locations = [f"location-{number:04}" for number in range(locations)]
        self.models = [f"model-{number:05}" for number in range(models)]
        self.profiles = {
            name: ModelProfile(
                model_id=name,
                size_bytes=rng.randrange(10, 200) * _MB,
                load_s=rng.uniform(0.05, 2.0),
                exec_s=rng.uniform(0.01, 0.2),
            )
            for name in self.models
        }
        self._places = {location: (rng.random(), rng.random()) for location in self.locations}
        self.rules = RoutingRules(
            profiles=self.profiles,
            links={},
            default_link=Link(rtt_s=0.04, bytes_per_s=12.5e6),
            horizon_s=10.0,
            staleness_s=2 * TICK_S,
        )
        popular = self.models[: ASKED // 5]
        self.asked = {
            location: popular + rng.sample(self.models[len(popular) :], min(ASKED, models) - len(popular))
            for location in self.locations
        }
        self._weights = [1.0 / (rank + 1) for rank in range(ASKED)]
        self.workers = {location: self._worker(location) for location in self.locations}

    def links(self, location: str) -> dict[tuple[str, str], Link]:
        """The links that a location has measured."""
        others = [other for other in self.locations if other != location]
        near = sorted(others, key=lambda other: self._distance(location, other))[: _LINKS // 3]
        far = self._rng.sample(others, min(len(others), _LINKS - len(near)))
        return {(location, other): self.link(location, other) for other in (*near, *far)}

    def link(self, here: str, there: str) -> Link:
        """The link from one location to another."""
        return Link(rtt_s=0.001 + 0.08 * self._distance(here, there), bytes_per_s=12.5e6)

    def tick(self) -> Iterator[WorkerReport]:
        """The next report of every worker, in an order of its own."""
        for location in self._rng.sample(self.locations, len(self.locations)):
            worker = self.workers[location] = self._next(self.workers[location])
            sent: WorkerReport = pickle.loads(pickle.dumps(worker, pickle.HIGHEST_PROTOCOL))
            yield sent

    def history(self) -> Iterator[WorkerReport]:
        """Reports of all demand of every location's users, so that it is known for long."""
        for location, worker in self.workers.items():
            demand = tuple(Demand(location=location, model_id=name, count=1) for name in self.asked[location])
            self.workers[location] = dataclasses.replace(worker, sequence=worker.sequence + 1)
            yield dataclasses.replace(self.workers[location], demand=demand)

    def draw(self, location: str) -> str:
        """A model that a user of a location asks for."""
        return self._rng.choices(self.asked[location], self._weights)[0]

    def _distance(self, here: str, there: str) -> float:
        return math.dist(self._places[here], self._places[there])

    def _worker(self, location: str) -> WorkerReport:
        rng = self._rng
        own = self.asked[location]
        names = dict.fromkeys([*own[: HELD // 4], *rng.sample(own, HELD // 2), *rng.sample(self.models, HELD)])
        held = [self._resident(name) for name in list(names)[:HELD]]
        used_bytes = sum(model.size_bytes for model in held)
        return WorkerReport(
            location=location,
            replica=f"{location}#worker#{rng.randrange(16**8):08x}",
            sequence=1,
            capacity_bytes=used_bytes + 20 * _MB,
            used_bytes=used_bytes,
            rss_bytes=used_bytes + 500 * _MB,
            models={model.model_id: model for model in held},
            exec_slots=2,
            queue_s=0.0,
            inflight=0,
            exec_s={model.model_id: self.profiles[model.model_id].exec_s for model in held},
            load_s={model.model_id: self.profiles[model.model_id].load_s for model in held},
            loads=0,
            load_failures=0,
            evictions=0,
            outcomes={location: OutcomeCounts()},
            primary_for=frozenset(names),
        )

    def _resident(self, name: str) -> ResidentModel:
        size_bytes = self.profiles[name].size_bytes
        return ResidentModel(model_id=name, state=ModelState.READY, size_bytes=size_bytes, uses=0, unevictable=False)

    def _next(self, before: WorkerReport) -> WorkerReport:
        rng, location = self._rng, before.location
        models, exec_s = dict(before.models), dict(before.exec_s)
        asked = [self.draw(location) for _ in range(round(rng.expovariate(1 / (REQUESTS_PER_S * TICK_S))))]
        for name in asked:
            if name in exec_s:
                exec_s[name] *= rng.uniform(0.98, 1.02)
        if rng.random() < SWAPS_PER_S * TICK_S:
            models.pop(rng.choice(list(models)))
            new = asked[0] if asked else self.draw(location)
            models[new] = self._resident(new)
            exec_s[new] = self.profiles[new].exec_s
        used_bytes = sum(model.size_bytes for model in models.values())
        return dataclasses.replace(
            before,
            sequence=before.sequence + 1,
            models=models,
            used_bytes=used_bytes,
            capacity_bytes=max(before.capacity_bytes, used_bytes),
            queue_s=rng.choice([0.0, 0.0, 0.0, rng.uniform(0.0, 0.3)]),
            inflight=len(asked),
            exec_s=exec_s,
            outcomes={location: before.outcomes[location] + OutcomeCounts(requests=len(asked), hits=len(asked))},
            demand=tuple(Demand(location=location, model_id=name, count=1) for name in asked),
            primary_for=frozenset(models),
        )
