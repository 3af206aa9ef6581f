"""What the simulator says is what a worker does: the same requests bring forth the same decisions in both.

``ModelManager`` runs on a real event loop with a clock and a backend of the test; ``replay`` plays the same stream. In
both, a load for a request is over at once, and a background load ends ``load_s`` after it began.
"""

from __future__ import annotations

import asyncio
import heapq
import math
import random
from collections.abc import Callable, Mapping
from concurrent.futures import Executor, Future
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

import pytest

from serve_app.core.cache.decisions import (
    Action,
    Answer,
    Evict,
    Hit,
    Join,
    Load,
    StartExchange,
    StartLoad,
    StartShrink,
    Wait,
)
from serve_app.core.cache.events import Event, ExchangeSuggested, ModelsKnown
from serve_app.core.cache.model_cache import ModelCache
from serve_app.core.catalog import ModelProfile
from serve_app.core.forms import FormChanges, key_of_tier, model_of
from serve_app.core.policies.registry import POLICIES, make_policy
from serve_app.core.vocabulary import ModelState
from serve_app.serving.worker.model_manager import Lease, ModelManager
from serve_app.simulator.forms import FormsInMemory, Ladder
from serve_app.simulator.load_delay import replay
from serve_app.tasks.tensors import Tensors
from serve_app.workload.profiles import FormProfile
from serve_app.workload.spec import parse_trace
from serve_app.workload.trace import Trace

pytestmark = pytest.mark.slow

#: Rounds of the event loop after which nothing moves any more.
ROUNDS = 12
MEMORY_SHARE = 0.25
MAX_PRELOADS = 1

#: Independent requests with gaps that are short beside the loads, and users who come back to their models.
STREAMS = {
    "zipf": "zipf:models=40&requests=1500&rate=0.2&exponent=0.9",
    "sessions": "sessions:days=3&models=40&sessions_per_day=120",
}
#: Every policy as it is, and the one that preloads also at its most eager.
CHOICES: dict[str, tuple[str, dict[str, float]]] = {
    **{name: (name, {}) for name in POLICIES},
    "edgeserve, eager": ("edgeserve", {"margin": 1.0, "short_s": 30.0, "review_every_s": 0.5}),
}


class Recorded(ModelCache):
    """Writes down what it decides and when."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.decisions: list[tuple[object, ...]] = []
        self.last: Answer | Wait | None = None

    def request(self, model: ModelProfile, now: float) -> Answer | Wait:
        self.last = super().request(model, now)
        self.decisions.append((now, model, self.last))
        return self.last

    def handle(self, event: Event, now: float) -> tuple[Action, ...]:
        actions = super().handle(event, now)
        self.decisions += [(now, action) for action in actions]
        return actions

    def resident(self) -> dict[str, ModelState]:
        return {model.model_id: model.state for model in self.models()}

    def kinds(self) -> set[type]:
        """All kinds of its answers."""
        return {type(decision[-1]) for decision in self.decisions}


@dataclass(frozen=True, slots=True, kw_only=True)
class Scene:
    trace: Trace
    profiles: tuple[ModelProfile, ...]
    ladders: Mapping[str, Ladder] = field(default_factory=dict)

    def forms(self) -> FormsInMemory | None:
        return FormsInMemory(self.ladders) if self.ladders else None

    def cache(self, choice: str) -> Recorded:
        name, parameters = CHOICES[choice]
        return Recorded(
            capacity_bytes=int(MEMORY_SHARE * sum(profile.size_bytes for profile in self.profiles)),
            policy=make_policy(name, random.Random(1), **parameters),
            max_preloads=MAX_PRELOADS,
        )


@cache
def scene(stream: str, seed: int) -> Scene:
    trace = parse_trace(STREAMS[stream], seed=seed)
    rng = random.Random(seed)
    return Scene(
        trace=trace,
        profiles=tuple(
            ModelProfile(
                model_id=model, size_bytes=rng.randint(10, 100), load_s=rng.uniform(0.5, 8.0), exec_s=0.1, accuracy=None
            )
            for model in trace.models
        ),
    )


def with_forms(played: Scene) -> Scene:
    """The same with a form of each model that runs faster, and takes more memory and longer to load."""
    ladders = {
        profile.model_id: Ladder(
            loaded=FormProfile(form="mapped", profile=profile),
            faster=(
                FormProfile(
                    form="fast",
                    profile=replace(
                        profile, size_bytes=profile.size_bytes * 3 // 2, load_s=profile.load_s / 4, exec_s=0.02, tier=1
                    ),
                ),
            ),
        )
        for profile in played.profiles
    }
    return Scene(trace=played.trace, profiles=played.profiles, ladders=ladders)


# The simulator


def simulated(played: Scene, choice: str) -> Recorded:
    made: list[Recorded] = []

    def make(location: int) -> ModelCache:
        made.append(played.cache(choice))
        return made[-1]

    replay(played.trace, played.profiles, make, make_forms=played.forms if played.ladders else None)
    return made[0]


# The worker


class FakeModel:
    """A model in memory: it goes once."""

    own_bytes = 0

    def __init__(self, key: str) -> None:
        self.in_memory = True
        self.form = "mapped" if model_of(key) == key else "fast"

    def run(self, inputs: Tensors, threads: int = 0) -> Tensors:
        raise AssertionError("nothing is run here")

    def unload(self) -> None:
        assert self.in_memory
        self.in_memory = False


class Unobserved:
    """Lets every measurement pass."""

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *_: None


@dataclass(slots=True)
class ManualTimer:
    when_s: float
    callback: Callable[[], None]
    is_set: bool = True

    def cancel(self) -> None:
        self.is_set = False


@dataclass(slots=True)
class Bench(Executor):
    """Backend, clock and timer of a manager; as an executor it runs loads for requests, which are over at once."""

    load_s: dict[str, float]
    #: Whether a load for requests is one of a smaller form, which takes its time.
    takes_time: Callable[[str], bool]
    now: float = 0.0
    timer: ManualTimer | None = None
    #: Background loads under way: when each ends.
    under_way: list[tuple[float, str, Future[FakeModel]]] = field(default_factory=list)

    def check(self, model_id: str) -> None:
        """All files are there."""

    def load(self, model_id: str) -> FakeModel:
        return FakeModel(model_id)

    def submit(self, function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        (model_id,) = args
        job: Future[FakeModel] = Future()
        if self.takes_time(model_id):
            heapq.heappush(self.under_way, (self.now + self.load_s[model_id], model_id, job))
        else:
            job.set_result(function(model_id))
        return job

    def call_at(self, when_s: float, callback: Callable[[], None]) -> ManualTimer:
        assert self.timer is None or not self.timer.is_set, "there are two timers"
        self.timer = ManualTimer(when_s, callback)
        return self.timer

    def timer_s(self) -> float:
        return self.timer.when_s if self.timer is not None and self.timer.is_set else math.inf

    def go_off(self) -> None:
        assert self.timer is not None
        self.timer.is_set = False
        self.timer.callback()

    def end_now(self, model_id: str) -> None:
        """A background load that a request has taken over is a load for a request."""
        (entry,) = [entry for entry in self.under_way if entry[1] == model_id]
        self.under_way.remove(entry)
        heapq.heapify(self.under_way)
        entry[2].set_result(FakeModel(model_id))


class Background(Executor):
    """Runs background loads, which take their time."""

    def __init__(self, bench: Bench) -> None:
        self._bench = bench

    def submit(self, function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        (model_id,) = args
        job: Future[FakeModel] = Future()
        assert job.set_running_or_notify_cancel()
        assert all(running != model_id for _, running, _ in self._bench.under_way), "two loads of one model at a time"
        heapq.heappush(self._bench.under_way, (self._bench.now + self._bench.load_s[model_id], model_id, job))
        return job


class Live:
    """A manager whose requests come, load and end as those of a replay do."""

    def __init__(self, cache: Recorded, played: Scene) -> None:
        self.cache = cache
        self.profiles = played.profiles
        self.ladders = played.ladders
        self.form_changes = FormChanges({model_id: ladder.faster for model_id, ladder in played.ladders.items()})
        faster = [form.profile for ladder in played.ladders.values() for form in ladder.faster]
        self.bench = Bench(
            {profile.model_id: profile.load_s for profile in played.profiles}
            | {key_of_tier(profile.model_id, profile.tier): profile.load_s for profile in faster},
            lambda model_id: cache._entries[model_id].shrinking,
        )
        self.manager = ModelManager(
            cache=cache,
            backend=self.bench,
            loaders=self.bench,
            preloaders=Background(self.bench),
            clock=lambda: self.bench.now,
            call_at=self.bench.call_at,
            observer=Unobserved(),
        )
        self.joining: list[asyncio.Task[Lease]] = []
        self.taken_back = 0

    async def play(self, trace: Trace) -> None:
        self.bench.now = trace.arrival_s[0]
        self.manager.handle(ModelsKnown(self.profiles))
        for now, number in zip(trace.arrival_s, trace.model, strict=True):
            await self.until(now)
            self.bench.now = now
            await self.request(self.profiles[number])

    async def request(self, model: ModelProfile) -> None:
        request = asyncio.get_running_loop().create_task(self.manager.acquire(model))
        await settle()
        if not request.done() and isinstance(self.cache.last, Load):
            self.taken_back += 1
            self.bench.end_now(model.model_id)
            await settle()
        self.joining.append(request)
        form = request.result().runnable.form if request.done() else "mapped"
        self.release()
        if self.ladders:
            # As a worker does when it has executed; here that takes no time.
            other = self.form_changes.executed(self.ladders[model.model_id].loaded, form, 1.0)
            if other is not None:
                self.manager.handle(ExchangeSuggested(other))
                await settle()

    async def until(self, now: float) -> None:
        """Let what is due happen, each at its time."""
        bench = self.bench
        while True:
            ending_s = bench.under_way[0][0] if bench.under_way else math.inf
            due_s = min(ending_s, bench.timer_s())
            if due_s > now:
                return
            bench.now = max(bench.now, due_s)
            if ending_s <= due_s:
                _, key, job = heapq.heappop(bench.under_way)
                job.set_result(FakeModel(key))
                await settle()
                self.release()
            else:
                bench.go_off()

    def release(self) -> None:
        for request in [request for request in self.joining if request.done()]:
            self.joining.remove(request)
            self.manager.release(request.result())

    async def close(self) -> None:
        self.manager.close()
        while self.bench.under_way:
            _, key, job = heapq.heappop(self.bench.under_way)
            job.set_result(FakeModel(key))
        await settle()
        self.release()


async def settle() -> None:
    for _ in range(ROUNDS):
        await asyncio.sleep(0)


# Both


async def require_same(played: Scene, choice: str, expected: Recorded) -> None:
    """Require that a worker decides, holds and counts as its simulation has."""
    live = Live(played.cache(choice), played)
    await live.play(played.trace)
    assert live.cache.decisions == expected.decisions
    assert live.cache.resident() == expected.resident()
    assert live.cache.counters == expected.counters
    await live.close()


@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("stream", STREAMS)
@pytest.mark.parametrize("choice", CHOICES)
async def test_a_worker_decides_as_its_simulation_does(choice: str, stream: str, seed: int) -> None:
    played = scene(stream, seed)
    expected = simulated(played, choice)
    await require_same(played, choice, expected)


@pytest.mark.parametrize("stream", STREAMS)
@pytest.mark.parametrize("choice", ["lru", "gdsf", "edgeserve"])
async def test_a_worker_changes_forms_as_its_simulation_does(choice: str, stream: str) -> None:
    played = with_forms(scene(stream, 1))
    expected = simulated(played, choice)
    assert {StartExchange, StartShrink} <= expected.kinds() | {
        type(action) for decision in expected.decisions if isinstance(decision[-1], Load)
        for action in decision[-1].actions(played.profiles[0])
    }  # fmt: skip
    await require_same(played, choice, expected)


async def test_the_streams_leave_nothing_out() -> None:
    """Background loads are joined, evicted for requests, and taken back, or it would mean little to agree."""
    kinds: set[type] = set()
    taken_back = wasted = 0
    for seed in (3, 4, 5, 6):
        played = scene("zipf", seed)
        live = Live(played.cache("edgeserve, eager"), played)
        await live.play(played.trace)
        kinds |= live.cache.kinds()
        taken_back += live.taken_back
        wasted += live.cache.counters.wasted_preloads
        await live.close()
    assert kinds == {Hit, Join, Load, Evict, StartLoad}
    assert taken_back
    assert wasted
