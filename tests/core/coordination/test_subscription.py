"""Deltas of a large cluster: they cover what matters to a location, and of that never less than there is."""

from __future__ import annotations

import dataclasses
import pickle
import random

import pytest
from core_support import read, report, resident, take

from serve_app.core.cluster.cluster_view import ClusterView
from serve_app.core.cluster.directory import DirectoryEntry
from serve_app.core.cluster.reports import Demand, WorkerReport
from serve_app.core.coordination.coordinator_state import CoordinatorState
from serve_app.core.coordination.events import LinksMeasured, Reader, WorkerLeft
from serve_app.core.coordination.rules import CoordinatorRules, DeltaLimits
from serve_app.core.coordination.subscription import Subscription
from serve_app.core.links import Link
from serve_app.core.vocabulary import ModelState

PLACES = ("lima", "oslo", "paris", "quito", "rome", "tokyo")


#: Small numbers, so that small clusters are large ones.
LIMITS = DeltaLimits(small_cluster=1, peers=3, nearest=1, models=4, changes=3)


class Cluster:
    """Workers that report to one coordinator, and readers of its deltas."""

    def __init__(self, limits: DeltaLimits = LIMITS) -> None:
        self.now, self.lives, self._limits = 0.0, 0, limits
        self.last: dict[str, WorkerReport] = {}
        self.restart()

    def restart(self) -> None:
        self.lives += 1
        rules = CoordinatorRules(half_life_s=10.0, stale_after_s=5.0)
        self.state = CoordinatorState(epoch=f"life {self.lives}", rules=rules, limits=self._limits)

    def report(
        self, place: str, *held: str, asks: str = "", number: int = 1, loading: bool = False, **changes: object
    ) -> None:
        replica = f"{place}-{number}"
        before = self.last.get(replica)
        state = ModelState.LOADING if loading else ModelState.READY
        made = report(
            place,
            replica,
            sequence=before.sequence + 1 if before else 1,
            models=[resident(name, state=state) for name in held],
            loading=len(held) if loading else 0,
        )
        demand = tuple(Demand(location=place, model_id=name, count=1) for name in asks)
        made = self.last[replica] = dataclasses.replace(made, primary_for=frozenset(held), demand=demand, **changes)  # type: ignore[arg-type]
        take(self.state, made, self.now)

    def read(self, view: ClusterView, place: str) -> ClusterView:
        view.apply(read(self.state, view.epoch, view.version, self.now, place), self.now)
        return view


def matters(view: ClusterView, subscription: Subscription) -> dict[str, object]:
    """What a reader knows of the workers that matter to it, as far as it is interested."""
    return {
        replica: (
            worker.capacity_bytes,
            worker.queue_s,
            worker.leaving,
            {name: model for name, model in worker.models.items() if name in subscription.models},
            worker.primary_for & subscription.models.keys(),
            {name: s for name, s in worker.exec_s.items() if name in subscription.models and name in worker.models},
        )
        for replica, worker in view.workers.items()
    }


class Life(Cluster):
    """A cluster in which anything may happen."""

    READERS = ("oslo", "oslo", "rome")

    def __init__(self, seed: int, limits: DeltaLimits = LIMITS) -> None:
        super().__init__(limits)
        self.rng = random.Random(seed)
        self._views = [ClusterView() for _ in self.READERS]
        self.compared = 0

    def step(self) -> None:
        rng = self.rng
        (event,) = rng.choices(["report", "read", "depart", "wait", "restart"], [60, 30, 4, 6, 0.3])
        match event:
            case "report":
                held = [name for name in "abcdef" if rng.random() < 0.4]
                self.report(
                    rng.choice(PLACES), *held, number=rng.choice([1, 1, 2]), asks=rng.choice(["", *"abcdef"]),
                    loading=rng.random() < 0.2, queue_s=rng.choice([0.0, 0.1, 1.0]),
                    exec_s=dict.fromkeys(held, rng.choice([0.1, 0.2])),
                )  # fmt: skip
            case "read":
                number = rng.randrange(len(self.READERS))
                self.read(self._views[number], self.READERS[number])
                self.compare(self.READERS[number], self._views[number])
            case "depart":
                self.state.handle(WorkerLeft(replica=f"{rng.choice(PLACES)}-{rng.choice([1, 2])}"), self.now)
            case "wait":
                self.now += rng.choice([0.25, 3.0, 40.0])
            case "restart":
                self.restart()
                self._views = [ClusterView() for _ in self.READERS]

    def compare(self, place: str, view: ClusterView) -> None:
        """A reader of deltas knows what a new reader gets, and that is so."""
        self.compared += 1
        whole, reports = self.read(ClusterView(), place), self.state.directory
        self.read(view, place)
        subscription = self.state.subscription(place)
        if subscription is None:
            assert view == whole
            return
        assert matters(view, subscription) == matters(whole, subscription)
        assert set(view.workers) == (subscription.peers.keys() & reports.workers.keys()) | reports.replicas_at(place)
        for replica, worker in view.workers.items():
            last = reports.workers[replica]
            if worker.location == place:
                assert worker == dataclasses.replace(last, demand=())
                continue
            assert abs(worker.queue_s - last.queue_s) <= DirectoryEntry.QUEUE_S
            for name in sorted(subscription.models.keys()):
                known, there = worker.models.get(name), last.models.get(name)
                assert (known and known.state) == (there and there.state)


@pytest.mark.parametrize("limits", [LIMITS, DeltaLimits(), dataclasses.replace(LIMITS, small_cluster=4)])
@pytest.mark.parametrize("seed", range(5))
def test_reads_change_nothing_and_say_the_same_twice(seed: int, limits: DeltaLimits) -> None:
    life = Life(seed, limits)
    for _ in range(200):
        life.step()
        state, version = life.state, life.rng.randrange(40)
        before = pickle.dumps(state)
        for location, replica, epoch in (("oslo", None, "life 1"), ("rome", "rome-1", "life 1"), (None, None, "")):
            reader = Reader(location, replica, epoch, version)
            assert state.delta(reader, life.now) == state.delta(reader, life.now)
        assert state.snapshot(life.now) == state.snapshot(life.now)
        assert state.rates(life.now) == state.rates(life.now)
        assert pickle.dumps(state) == before


@pytest.mark.parametrize("seed", range(40))
def test_whatever_happens_readers_know_of_what_matters_what_a_new_reader_gets(seed: int) -> None:
    life = Life(seed)
    for _ in range(400):
        life.step()
    assert life.compared > 50, "each time both know the same"


def test_a_reader_goes_on_by_what_it_knew_when_the_coordinator_restarts() -> None:
    cluster, view = Cluster(), ClusterView()
    for place in PLACES:
        cluster.report(place, "a", asks="a")
    before = set(cluster.read(view, "oslo").workers)
    cluster.restart()
    cluster.report("oslo")
    cluster.report("lima")
    assert set(cluster.read(view, "oslo").workers) == before
    cluster.now += ClusterView.CARRY_S
    assert set(cluster.read(view, "oslo").workers) == {"oslo-1", "lima-1"}


def test_a_location_follows_a_holder_of_each_model_that_it_asks_for() -> None:
    cluster, view = Cluster(), ClusterView()
    for place in PLACES:
        cluster.report(place, place[0])
    cluster.read(view, "oslo")
    cluster.report("oslo", "o", asks="tq")
    cluster.read(view, "oslo")
    assert [list(view.holders(name)) for name in "tq"] == [["tokyo-1"], ["quito-1"]]


def test_a_peer_of_no_use_any_more_is_unsubscribed_and_not_taken_for_gone() -> None:
    cluster, view = Cluster(), ClusterView()
    for place in (*PLACES, "cairo", "delhi"):
        cluster.report(place, place[0])
    cluster.read(view, "oslo")
    for name in "tqrlcdp":
        cluster.report("oslo", "o", asks=name)
        delta = read(cluster.state, view.epoch, view.version, cluster.now, "oslo")
        assert view.apply(delta, cluster.now) == ()
        assert len(view.workers) <= 1 + LIMITS.peers
    assert list(view.holders("p")) == ["paris-1"]


def test_the_nearest_holder_is_followed() -> None:
    cluster, view = Cluster(), ClusterView()
    for place in PLACES:
        cluster.report(place, *("m" if place not in ("oslo", "lima") else ()))
    near = {("oslo", place): Link(rtt_s=0.01 * (7 - number), bytes_per_s=1e9) for number, place in enumerate(PLACES)}
    links = {**near, ("oslo", "lima"): Link(rtt_s=0.001, bytes_per_s=1e9)}
    cluster.state.handle(LinksMeasured(links=links), cluster.now)
    cluster.read(view, "oslo")
    assert set(view.workers) == {"oslo-1", "lima-1"}
    cluster.report("oslo", asks="m")
    cluster.read(view, "oslo")
    assert set(view.holders("m")) == {"tokyo-1"}


def test_noise_of_distant_workers_is_published_only_now_and_then() -> None:
    cluster, view = Cluster(), ClusterView()
    for place in PLACES[:3]:
        cluster.report(place, "a", asks="a")
    cluster.read(view, "oslo")
    published = []
    for _ in range(DirectoryEntry.EVERY_REPORTS):
        cluster.report("paris", "a", queue_s=0.1)
        delta = read(cluster.state, view.epoch, view.version, cluster.now, "oslo")
        view.apply(delta, cluster.now)
        published.append(len(delta.changes))
    every = DirectoryEntry.EVERY_REPORTS
    assert published == [0] * (every - 1) + [1]
    assert (view.workers["paris-1"].sequence, view.workers["paris-1"].queue_s) == (
        1 + DirectoryEntry.EVERY_REPORTS,
        0.1,
    )


def test_a_delta_says_at_once_how_a_distant_worker_divides_its_memory_now() -> None:
    cluster, view = Cluster(), ClusterView()
    for place in PLACES[:3]:
        cluster.report(place, "a", asks="a")
    cluster.read(view, "oslo")
    cluster.report("paris", "a", workspace_bytes=40)
    delta = read(cluster.state, view.epoch, view.version, cluster.now, "oslo")
    assert [change.workspace_bytes for change in delta.changes] == [40]
    view.apply(delta, cluster.now)
    assert view.workers["paris-1"].model_capacity_bytes == view.workers["paris-1"].capacity_bytes - 40


def test_few_workers_become_many_and_few_again() -> None:
    cluster, view = Cluster(dataclasses.replace(LIMITS, small_cluster=3)), ClusterView()
    for place in PLACES:
        cluster.report(place, "a")
        cluster.read(view, "oslo")
    assert view.partial
    assert "oslo-1" in view.workers
    assert len(view.workers) == 1 + LIMITS.nearest
    for place in PLACES[:1] + PLACES[2:4]:
        cluster.state.handle(WorkerLeft(replica=f"{place}-1"), cluster.now)
        cluster.read(view, "oslo")
    assert not view.partial
    assert set(view.workers) == {"oslo-1", "rome-1", "tokyo-1"}


def test_a_worker_gets_its_commands_and_its_deltas_though_it_reads_less_often() -> None:
    cluster, view = Cluster(), ClusterView()
    for place in PLACES[:4]:
        cluster.report(place, place[0], asks="p")
    worker = cluster.last["oslo-1"]
    versions = []
    for step in range(16):
        cluster.now += 0.25
        cluster.report("paris", "p", "b" if step % 2 else "c")
        worker = dataclasses.replace(worker, sequence=worker.sequence + 1)
        view.apply(cluster.state.exchange(worker, view.epoch, view.version, cluster.now), cluster.now)
        versions.append(view.version)
    assert len(set(versions)) == 2
    assert "oslo-1" not in view.workers
    assert "p" in view.workers["paris-1"].models


def test_rates_are_those_of_the_location_and_fall() -> None:
    cluster, view = Cluster(), ClusterView()
    for place in PLACES:
        cluster.report(place, asks=place[0])
    cluster.read(view, "oslo")
    assert set(view.rates) == {"oslo"}
    before = view.rate("oslo", "o")
    cluster.now += 4.0
    cluster.read(view, "oslo")
    assert 0 < view.rate("oslo", "o") < before


def test_a_reader_of_no_location_follows_all_workers() -> None:
    cluster, view = Cluster(), ClusterView()
    for place in PLACES:
        cluster.report(place, "a", asks="a")
    view.apply(read(cluster.state, "", 0, cluster.now), cluster.now)
    cluster.report("rome", "b")
    view.apply(read(cluster.state, view.epoch, view.version, cluster.now), cluster.now)
    assert set(view.workers) == {f"{place}-1" for place in PLACES}
    assert set(view.workers["rome-1"].models) == {"b"}
    assert set(view.rates) == set(PLACES)


def test_a_snapshot_has_everything() -> None:
    cluster = Cluster()
    for place in PLACES:
        cluster.report(place, "a", asks="a")
    whole = cluster.state.snapshot(cluster.now)
    assert {worker.replica for worker in whole.workers} == {f"{place}-1" for place in PLACES}
    assert not any(worker.demand for worker in whole.workers)
