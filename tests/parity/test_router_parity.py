"""The simulated router sends as the live one does: the same replies bring forth the same attempts in both.

Each scene has some locations with a worker each, one request in Paris, and a script: what comes of each attempt, and
how long that takes.
"""

from __future__ import annotations

import asyncio
import math
import random
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
from fakes import ManualClock, done, make_router, report

from serve_app.core.catalog import ModelProfile
from serve_app.core.cluster.reports import ViewDelta, WorkerReport
from serve_app.core.links import Link
from serve_app.core.routing.dispatch import Absent, AttemptResult, Finished, Lost, Rejected
from serve_app.core.routing.router_view import RouterView
from serve_app.core.routing.rules import RoutingRules
from serve_app.errors import DeadlineExceeded, DoesNotFit, EdgeServeError, StoreError, Unavailable
from serve_app.serving.router.request import InferenceRequest
from serve_app.serving.transport.messages import InferenceRejected, InferenceTask, NotResident
from serve_app.serving.transport.worker_pool import WorkerLost
from serve_app.simulator.discrete_event.event_queue import EventQueue
from serve_app.simulator.discrete_event.results import DiscreteEventResults
from serve_app.simulator.discrete_event.router import SimulatedRouter
from serve_app.simulator.discrete_event.worker import Job
from serve_app.tasks.base import RawInput

LOCATIONS = ("paris", "tokyo", "oslo", "lima")
REQUEST_TIME_S = 5.0
MODEL = ModelProfile(model_id="small", size_bytes=100, load_s=0.01, exec_s=0.01, accuracy=0.5)
LINK = Link(rtt_s=0.001, bytes_per_s=1e9)
RULES = RoutingRules(profiles={"small": MODEL}, links={}, default_link=LINK, horizon_s=10.0)
PAYLOAD = b"an image"

#: What can come of an attempt, by name; ``DONE`` and ``ABSENT`` name the replica that answers.
DONE, ABSENT, LOST = "done", "absent", "lost"
ERRORS: dict[str, EdgeServeError] = {
    "no room": Unavailable("too many requests wait for memory"),
    "broken store": StoreError("the weights are cut short"),
    "too large": DoesNotFit("larger than the memory"),
    "deadline": DeadlineExceeded("did not answer before its deadline"),
}

#: One attempt: where to, and whether only if the model is resident there.
Attempt = tuple[str, bool]


@dataclass(frozen=True, slots=True, kw_only=True)
class Scene:
    workers: tuple[WorkerReport, ...]
    rate: float = 0.0
    script: Sequence[tuple[str, float]]

    def tell(self, view: RouterView) -> None:
        rates = {"paris": {"small": self.rate}}
        view.apply(ViewDelta(epoch="e", version=2, full=True, workers=self.workers, gone=(), rates=rates), 0.0)


@dataclass(slots=True)
class Course:
    """What became of a scene's request, and what the router believes afterwards."""

    attempts: list[Attempt]
    preloads: list[str]
    is_served: bool = False
    believed: object = None

    def close(self, view: RouterView) -> Course:
        usable = {worker.replica for worker in view.workers()}
        self.believed = {
            replica: (replica in usable, view.state(worker, "small"), view.loading(worker), view.queue_s(worker))
            for replica, worker in view.cluster.workers.items()
        }
        return self


# The live router


class ScriptedPool:
    """Workers that answer as the script says, whichever is asked."""

    def __init__(self, scene: Scene, clock: ManualClock) -> None:
        self._script = iter(scene.script)
        self._clock = clock
        self.course = Course([], [])

    async def infer(self, location: str, replica: str | None, work: InferenceTask) -> Any:
        self.course.attempts.append((location, work.only_if_resident))
        name, seconds = next(self._script)
        self._clock.now += seconds
        if name == DONE:
            return done(f"{location}-1")
        if name == ABSENT:
            return NotResident(replica=f"{location}-1", sequence=2)
        if name == LOST:
            raise WorkerLost("gone")
        return InferenceRejected(error=ERRORS[name])

    async def preload(self, location: str, replica: str, model_id: str) -> None:
        self.course.preloads.append(replica)


async def live(scene: Scene) -> Course:
    clock = ManualClock()
    pool = ScriptedPool(scene, clock)
    router = make_router(pool, clock=clock, rules=RULES, locations=LOCATIONS, request_time_s=REQUEST_TIME_S)
    scene.tell(router.view)
    try:
        await router.serve(InferenceRequest(name="small", location="paris", payload=RawInput(data=PAYLOAD)))
        pool.course.is_served = True
    except EdgeServeError:
        pass
    await asyncio.sleep(0)
    return pool.course.close(router.view)


# The simulated router


class ScriptedWorker:
    """The worker of one location, which answers as the script says."""

    def __init__(self, location: str, script: Iterator[tuple[str, float]], course: Course) -> None:
        self.location = location
        self.replica = f"{location}-1"
        self._script = script
        self._course = course

    def take(self, job: Job, now: float) -> None:
        self._course.attempts.append((self.location, job.only_if_resident))
        name, seconds = next(self._script)
        job.result = self._result(name)
        job.sender.replied(job, now + seconds)

    def _result(self, name: str) -> AttemptResult:
        if name == DONE:
            return Finished(self.replica, 2)
        if name == ABSENT:
            return Absent(self.replica, 2)
        return Lost() if name == LOST else Rejected(ERRORS[name])

    def preload(self, model: ModelProfile, now: float) -> None:
        self._course.preloads.append(self.replica)


class NoNews:
    """A coordinator of which nothing new comes."""

    def tick(self, now: float) -> int:
        return -1


def simulated(scene: Scene) -> Course:
    script, course, events = iter(scene.script), Course([], []), EventQueue()
    workers: dict[str, Any] = {f"{name}-1": ScriptedWorker(name, script, course) for name in LOCATIONS}
    tally = DiscreteEventResults(latencies=array("d", [math.nan]))
    news: Any = NoNews()
    router = SimulatedRouter(
        worker=workers["paris-1"],
        workers=workers,
        coordinator=news,
        rules=RULES,
        payload_bytes=len(PAYLOAD),
        event_queue=events,
        results=tally,
        request_time_s=REQUEST_TIME_S,
    )
    scene.tell(router.view)
    router.request(0, MODEL, 0.0)
    while events.step():
        pass
    assert tally.requests == 1
    course.is_served = not tally.rejected
    return course.close(router.view)


# Both

HOLDING = report("tokyo", "small")
SCENES = {
    "done here": Scene(workers=(report("paris", "small"),), script=[(DONE, 0.0)]),
    "done elsewhere": Scene(workers=(report("paris"), HOLDING), script=[(DONE, 0.0)]),
    "loaded here meanwhile": Scene(
        workers=(report("paris", load_s={"small": 0.5}), HOLDING), rate=100.0, script=[(DONE, 0.0)]
    ),
    "not resident": Scene(workers=(report("paris"), HOLDING), script=[(ABSENT, 0.0), (DONE, 0.0)]),
    "no room here": Scene(workers=(report("paris", "small"), HOLDING), script=[("no room", 0.0), (DONE, 0.0)]),
    "no room anywhere": Scene(workers=(report("paris", "small"), HOLDING), script=[("no room", 0.0)] * 2),
    "lost": Scene(workers=(report("paris", "small"), report("oslo")), script=[(LOST, 0.0), (DONE, 0.0)]),
    "lost, all of them": Scene(workers=(report("paris"), HOLDING), script=[(LOST, 0.0)] * 5),
    "rejected for good": Scene(workers=(report("paris"), HOLDING), script=[("too large", 0.0)]),
    "deadline at the worker": Scene(workers=(report("paris"), HOLDING), script=[("deadline", 5.0)]),
    "deadline between two attempts": Scene(workers=(report("paris"), HOLDING), script=[(LOST, 6.0)]),
    "no worker known": Scene(workers=(), script=[(LOST, 0.0), (DONE, 0.0)]),
}


@pytest.mark.parametrize("scene", SCENES.values(), ids=SCENES)
async def test_the_simulated_router_sends_as_the_live_one_does(scene: Scene) -> None:
    course = await live(scene)
    assert len(course.attempts) == len(scene.script)
    assert simulated(scene) == course


def drawn(seed: int) -> Scene:
    rng = random.Random(seed)
    workers = [
        report(
            location,
            *(["small"] if rng.random() < 0.5 else []),
            queue_s=rng.choice([0.0, 0.0, 0.02, 0.3]),
            load_s={"small": rng.choice([0.0005, 0.01, 0.5])},
            loading=rng.randrange(3),
        )
        for location in LOCATIONS
        if rng.random() < 0.8
    ]
    names = rng.choices(
        [DONE, ABSENT, LOST, "no room", "broken store", "too large", "deadline"], [2, 5, 5, 5, 3, 1, 1], k=9
    )
    times = rng.choices([0.0, 1.0, 6.0], [20, 4, 1], k=9)
    return Scene(
        workers=tuple(workers), rate=rng.choice([0.0, 1.0, 100.0]), script=list(zip(names, times, strict=True))
    )


async def test_random_scripts_bring_forth_the_same_attempts_in_both() -> None:
    lengths, served, preloads, hints = set(), set(), 0, 0
    for seed in range(300):
        course = await live(drawn(seed))
        assert simulated(drawn(seed)) == course, f"seed {seed}"
        lengths.add(len(course.attempts))
        served.add(course.is_served)
        preloads += len(course.preloads)
        hints += any(only_if_resident for _, only_if_resident in course.attempts)
    # Or it would mean little to agree.
    assert lengths == {1, 2, 3, 4, 5}
    assert served == {True, False}
    assert preloads
    assert hints
