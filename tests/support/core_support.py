"""Small values for the tests of ``core``: every default is chosen so that sums can be done in the head."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple

from serve_app.core.cache.decisions import Action, Evict, Grant, Load, StartLoad, StartShrink
from serve_app.core.cache.events import (
    TICK,
    LoadEnded,
    LoadFailed,
    PreloadSuggested,
    UnloadRequested,
    WaitCanceled,
    WithdrawSuggested,
)
from serve_app.core.cache.model_cache import ModelCache
from serve_app.core.catalog import ModelProfile
from serve_app.core.cluster.reports import Demand, OutcomeCounts, ViewDelta, WorkerReport
from serve_app.core.coordination.coordinator_state import CoordinatorState
from serve_app.core.coordination.events import Reader, ReaderSeen, WorkerReported
from serve_app.core.policies.base import EvictionPolicy, PreloadCandidates
from serve_app.core.vocabulary import ModelState, ResidentModel


class Ranked(EvictionPolicy):
    """A policy that does what the test says: ``worth`` is the utility of each model, 0 where it says nothing.

    Its candidates are the models in ``wanted``, and it accepts what is worth more than all victims together.
    """

    def __init__(self, **worth: float) -> None:
        self.worth = dict(worth)
        self.wanted: list[ModelProfile] = []
        self.told: list[tuple[str, str]] = []
        self.forward_s: Mapping[str, float] = {}

    def on_request(self, model: ModelProfile, now: float) -> None:
        self.told.append(("request", model.model_id))

    def on_load(self, model: ModelProfile, now: float) -> None:
        self.told.append(("load", model.model_id))

    def on_evict(self, model: ModelProfile, now: float) -> None:
        self.told.append(("evict", model.model_id))

    def on_unload(self, model: ModelProfile, now: float) -> None:
        self.told.append(("unload", model.model_id))

    def on_forward_costs(self, forward_s: Mapping[str, float]) -> None:
        self.forward_s = forward_s

    def on_catalog(self, models: Iterable[ModelProfile], now: float) -> None:
        self.told += [("know", model.model_id) for model in models]

    def utility(self, model: ModelProfile, now: float) -> float:
        return self.worth.get(model.model_id, 0.0)

    def lowered(self, now: float) -> Iterable[str]:
        return tuple(self.worth)

    def preload_candidates(self, now: float, free_bytes: int) -> PreloadCandidates:
        for model in tuple(self.wanted):  # noqa: UP028 - a tuple cannot be sent a verdict
            yield model

    def accept_preload(self, model: ModelProfile, victims: Iterable[ModelProfile], now: float) -> bool:
        return self.utility(model, now) > sum(self.utility(victim, now) for victim in victims)


class Trimming(Ranked):
    """The same, but of several victims only the largest that suffice go."""

    trim_victims = True


# What a cache decides


class Preload(NamedTuple):
    """A background load, what is evicted for it, and what goes over to these smaller forms."""

    model: ModelProfile
    victims: tuple[str, ...]
    shrunk: tuple[ModelProfile, ...] = ()


class Decided(NamedTuple):
    """Actions by kind: what is evicted for no load, requests that are answered, background loads that begin."""

    evicted: tuple[str, ...] = ()
    grants: tuple[Grant, ...] = ()
    preloads: tuple[Preload, ...] = ()


def decided(actions: Iterable[Action]) -> Decided:
    """Sort actions by kind; each load must stand right behind its evictions, and before the grant that reports it."""
    evicted, grants, preloads = list[str](), list[Grant](), list[Preload]()
    victims, shrunk, load = list[Evict](), list[ModelProfile](), None
    for action in actions:
        match action:
            case Evict(reason="capacity" | "preload"):
                victims.append(action)
            case Evict():
                evicted.append(action.model_id)
            case StartShrink():
                shrunk.append(action.model)
            case StartLoad():
                assert {victim.reason for victim in victims} <= {"preload" if action.background else "capacity"}
                load = Preload(action.model, tuple(victim.model_id for victim in victims), tuple(shrunk))
                victims, shrunk = [], []
                if action.background:
                    preloads.append(load)
                    load = None
            case Grant(answer=Load(granted, made_smaller)):
                assert load == Preload(load.model, granted, made_smaller)
                assert load.model.model_id == action.model_id
                grants.append(action)
                load = None
            case Grant():
                grants.append(action)
        assert load is None or isinstance(action, StartLoad)
    assert not victims
    assert not shrunk
    assert load is None
    return Decided(tuple(evicted), tuple(grants), tuple(preloads))


def granted(actions: Iterable[Action]) -> tuple[Grant, ...]:
    """The requests that are answered, where nothing else happens."""
    evicted, grants, preloads = decided(actions)
    assert not evicted
    assert not preloads
    return grants


def load_ended(cache: ModelCache, model_id: str, now: float) -> tuple[Grant, ...]:
    return granted(cache.handle(LoadEnded(model_id), now))


def load_failed(cache: ModelCache, model_id: str, detail: str, now: float) -> tuple[Grant, ...]:
    return granted(cache.handle(LoadFailed(model_id, detail), now))


def finish(cache: ModelCache, model_id: str, now: float) -> tuple[Grant, ...]:
    return granted(cache.finish(model_id, now))


def cancel_wait(cache: ModelCache, ticket: int, now: float) -> tuple[Grant, ...]:
    return granted(cache.handle(WaitCanceled(ticket), now))


def unload(cache: ModelCache, model_id: str, now: float) -> tuple[Grant, ...]:
    eviction, *others = cache.handle(UnloadRequested(model_id), now)
    assert eviction == Evict(model_id, "unload")
    return granted(others)


def withdraw(cache: ModelCache, model_id: str, now: float) -> tuple[Grant, ...] | None:
    """The requests that are answered; None where the model stays."""
    actions = cache.handle(WithdrawSuggested(model_id), now)
    if not actions:
        return None
    assert actions[0] == Evict(model_id, "placement")
    return granted(actions[1:])


def suggest(cache: ModelCache, model: ModelProfile, now: float, *, required: bool = False) -> Preload | None:
    """The preload that begins at once."""
    return _only_preload(cache.handle(PreloadSuggested(model, required), now))


def tick(cache: ModelCache, now: float) -> Preload | None:
    """The one preload that begins."""
    return _only_preload(cache.handle(TICK, now))


def _only_preload(actions: Iterable[Action]) -> Preload | None:
    evicted, grants, preloads = decided(actions)
    assert not evicted
    assert not grants
    assert len(preloads) <= 1
    return preloads[0] if preloads else None


# Models and reports


def profile(
    model_id: str, size: int = 10, *, load_s: float = 1.0, exec_s: float = 0.1, accuracy: float | None = None
) -> ModelProfile:
    return ModelProfile(model_id=model_id, size_bytes=size, load_s=load_s, exec_s=exec_s, accuracy=accuracy)


def resident(
    model_id: str, size: int = 10, *, state: ModelState = ModelState.READY, uses: int = 0, pinned: bool = False
) -> ResidentModel:
    return ResidentModel(model_id=model_id, state=state, size_bytes=size, uses=uses, unevictable=pinned)


def report(
    location: str = "paris",
    replica: str | None = None,
    *,
    sequence: int = 1,
    capacity: int = 100,
    models: Iterable[ResidentModel] = (),
    exec_slots: int = 1,
    queue_s: float = 0.0,
    exec_s: Mapping[str, float] | None = None,
    load_s: Mapping[str, float] | None = None,
    demand: Mapping[str, int] | None = None,
    origin: str | None = None,
    loading: int = 0,
    load_slots: int = 1,
) -> WorkerReport:
    """A report of the worker ``<location>-1``; ``demand`` is of users of ``origin``, else of its own location."""
    held = {model.model_id: model for model in models}
    return WorkerReport(
        location=location,
        replica=replica or f"{location}-1",
        sequence=sequence,
        capacity_bytes=capacity,
        used_bytes=sum(model.size_bytes for model in held.values()),
        rss_bytes=0,
        models=held,
        exec_slots=exec_slots,
        loading=loading,
        load_slots=load_slots,
        queue_s=queue_s,
        inflight=0,
        exec_s=exec_s or {},
        load_s=load_s or {},
        loads=0,
        load_failures=0,
        evictions=0,
        outcomes={location: OutcomeCounts()},
        demand=tuple(
            Demand(location=origin or location, model_id=model_id, count=count)
            for model_id, count in (demand or {}).items()
        ),
    )


def take(state: CoordinatorState, sent: WorkerReport, now: float) -> None:
    """A coordinator takes in a report."""
    state.handle(WorkerReported(sent), now)


def read(state: CoordinatorState, epoch: str, version: int, now: float, location: str | None = None) -> ViewDelta:
    """What a router reads that has that version."""
    reader = Reader(location, None, epoch, version)
    state.handle(ReaderSeen(reader), now)
    return state.delta(reader, now)


def assert_accounting_adds_up(cache: ModelCache) -> None:
    """What holds of every cache at every moment, whatever has happened to it."""
    models = cache.models()
    assert cache.used_bytes == sum(model.size_bytes for model in models) <= cache.model_capacity_bytes
    gone = cache.counters.load_failures + cache.counters.evictions + cache.counters.unloads
    assert cache.counters.loads + cache.counters.preloads - gone == len(models)
    assert all(model.uses >= 0 for model in models)
