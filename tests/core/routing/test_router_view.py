"""The router's view: the cluster as reported, corrected by replies, until a report that is younger."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Mapping

import pytest
from core_support import report, resident

from serve_app.core.cluster.cluster_view import ClusterView
from serve_app.core.cluster.reports import ViewDelta, WorkerReport
from serve_app.core.links import HERE, LinkTable
from serve_app.core.routing.router_view import RouterView
from serve_app.core.vocabulary import ModelState

READY, LOADING = ModelState.READY, ModelState.LOADING
LINKS = LinkTable("oslo", lambda here, there: HERE)


def delta(
    *workers: WorkerReport,
    full: bool = False,
    gone: tuple[str, ...] = (),
    version: int = 1,
    rates: Mapping[str, Mapping[str, float]] | None = None,
) -> ViewDelta:
    return ViewDelta(epoch="e", version=version, full=full, workers=workers, gone=gone, rates=rates or {})


def view_of(*workers: WorkerReport) -> RouterView:
    known = RouterView()
    known.apply(delta(*workers, full=True), 0.0)
    return known


def state(known: RouterView, replica: str, model_id: str) -> ModelState | None:
    return known.state(known.cluster.workers[replica], model_id)


def replicas(known: RouterView) -> list[str]:
    return [worker.replica for worker in known.workers()]


# The view


def test_a_view_that_was_never_updated_has_no_age() -> None:
    view = ClusterView()
    assert view.age_s(100.0) is None
    view.apply(delta(), 100.0)
    assert view.age_s(100.5) == 0.5
    assert view.age_s(99.0) == 0.0


def test_a_delta_replaces_adds_and_removes_workers() -> None:
    view = ClusterView()
    view.apply(delta(report("paris"), report("tokyo"), full=True), 0.0)
    view.apply(delta(report("paris", sequence=2), report("oslo"), gone=("tokyo-1",), version=2), 1.0)
    assert {replica: worker.sequence for replica, worker in view.workers.items()} == {"paris-1": 2, "oslo-1": 1}
    assert (view.version, view.epoch) == (2, "e")


def test_a_full_view_replaces_everything() -> None:
    view = ClusterView()
    view.apply(delta(report("paris"), full=True, rates={"paris": {"a": 1.0}}), 0.0)
    view.apply(delta(report("tokyo"), full=True, rates={"tokyo": {"b": 2.0}}), 1.0)
    assert set(view.workers) == {"tokyo-1"}
    assert view.rate("paris", "a") == 0.0
    assert view.rate("tokyo", "b") == 2.0


def test_what_is_not_in_the_rates_has_none() -> None:
    assert ClusterView().rate("paris", "a") == 0.0


def test_workers_that_leave_are_left_out_unless_all_do() -> None:
    paris, tokyo = report("paris"), report("tokyo")
    leaving = dataclasses.replace(paris, leaving=True)
    assert replicas(view_of(leaving, tokyo)) == ["tokyo-1"]
    assert replicas(view_of(leaving)) == ["paris-1"]


# Observations


def test_the_last_report_tells_what_a_worker_holds() -> None:
    known = view_of(report("paris", models=[resident("a"), resident("b", state=LOADING)]))
    assert [state(known, "paris-1", model_id) for model_id in "abc"] == [READY, LOADING, None]


def test_a_reply_counts_until_a_younger_report() -> None:
    known = view_of(report("paris", sequence=4, models=[resident("victim")]))
    known.observe("paris-1", "new", READY, 5)
    known.observe("paris-1", "victim", None, 5)
    assert (state(known, "paris-1", "new"), state(known, "paris-1", "victim")) == (READY, None)
    known.apply(delta(report("tokyo"), version=2), 1.0)
    assert (state(known, "paris-1", "new"), state(known, "paris-1", "victim")) == (READY, None)
    known.apply(delta(report("paris", sequence=5, models=[resident("victim")]), version=3), 2.0)
    assert (state(known, "paris-1", "new"), state(known, "paris-1", "victim")) == (None, READY)


def test_a_reply_that_is_older_than_the_last_report_counts_nothing() -> None:
    known = view_of(report("paris", sequence=6, models=[resident("b")]))
    known.observe("paris-1", "a", READY, 6)
    known.observe("paris-1", "b", None, 3)
    assert (state(known, "paris-1", "a"), state(known, "paris-1", "b")) == (None, READY)


def test_the_latest_of_two_replies_counts() -> None:
    known = view_of(report("paris"))
    known.observe("paris-1", "a", READY, 2)
    known.observe("paris-1", "a", None, 2)
    assert state(known, "paris-1", "a") is None


def test_an_observation_is_of_one_replica() -> None:
    known = view_of(report("paris"), report("paris", "paris-2"))
    known.observe("paris-1", "a", READY, 2)
    assert state(known, "paris-2", "a") is None


def test_an_expected_load_can_be_joined_until_the_report_after_the_next() -> None:
    known = view_of(report("paris", sequence=4))
    known.expect_load("paris-1", "a")
    assert state(known, "paris-1", "a") is LOADING
    known.apply(delta(report("paris", sequence=5), version=2), 1.0)
    assert state(known, "paris-1", "a") is LOADING
    known.apply(delta(report("paris", sequence=6), version=3), 2.0)
    assert state(known, "paris-1", "a") is None


def test_the_reply_to_an_expected_load_replaces_the_expectation() -> None:
    known = view_of(report("paris", sequence=4))
    known.expect_load("paris-1", "a")
    known.observe("paris-1", "a", READY, 5)
    assert state(known, "paris-1", "a") is READY


def test_nothing_is_expected_of_an_unknown_replica() -> None:
    known = view_of(report("paris"))
    known.expect_load("unknown", "a")
    known.apply(delta(report("paris", "unknown", sequence=1), version=2), 1.0)
    assert state(known, "unknown", "a") is None


def test_observations_of_a_replica_go_with_it() -> None:
    known = view_of(report("paris", sequence=1))
    known.observe("paris-1", "a", READY, 9)
    known.apply(delta(gone=("paris-1",), version=2), 1.0)
    known.apply(delta(report("paris", sequence=2), version=3), 2.0)
    assert state(known, "paris-1", "a") is None


# Suspects


def test_a_replica_that_has_failed_is_avoided_until_it_reports_again() -> None:
    known = view_of(report("paris", sequence=4), report("tokyo"))
    known.suspect("paris-1")
    assert replicas(known) == ["tokyo-1"]
    known.apply(delta(report("tokyo", sequence=2), version=2), 1.0)
    assert replicas(known) == ["tokyo-1"]
    known.apply(delta(report("paris", sequence=5), version=3), 2.0)
    assert sorted(replicas(known)) == ["paris-1", "tokyo-1"]


def test_a_full_view_with_the_same_old_report_clears_no_suspect() -> None:
    known = view_of(report("paris", sequence=4))
    known.suspect("paris-1")
    known.apply(delta(report("paris", sequence=4), full=True, version=9), 1.0)
    assert replicas(known) == []


def test_observations_of_a_suspect_count_no_more() -> None:
    known = view_of(report("paris", sequence=1))
    known.observe("paris-1", "a", READY, 9)
    known.suspect("paris-1")
    known.apply(delta(report("paris", sequence=2), version=2), 1.0)
    assert state(known, "paris-1", "a") is None


def test_a_suspect_that_has_left_may_come_back_unsuspected() -> None:
    known = view_of(report("paris", sequence=4))
    known.suspect("paris-1")
    known.apply(delta(gone=("paris-1",), version=2), 1.0)
    known.apply(delta(report("paris", sequence=1), version=3), 2.0)
    assert replicas(known) == ["paris-1"]


def test_an_unknown_replica_cannot_be_suspected() -> None:
    known = view_of(report("paris"))
    known.suspect("unknown")
    assert replicas(known) == ["paris-1"]


# Backlog


def test_the_queue_is_what_the_worker_says_or_what_was_sent_there_whichever_is_more() -> None:
    worker = report("paris", queue_s=0.3, exec_slots=2)
    known = view_of(worker)
    assert known.queue_s(worker) == 0.3
    known.sent("paris-1", 0.4)
    assert known.queue_s(worker) == 0.3
    known.sent("paris-1", 3.6)
    # Two run, 2 s each on average; with half of that left, one of the two slots is free after half a second.
    assert known.queue_s(worker) == pytest.approx(0.5)
    known.returned("paris-1", 3.6)
    known.returned("paris-1", 0.4)
    assert known.queue_s(worker) == 0.3


def test_a_backlog_is_of_one_replica() -> None:
    known = view_of(report("paris"), report("tokyo"))
    known.sent("paris-1", 1.0)
    assert known.queue_s(report("tokyo")) == 0.0


def test_no_backlog_is_left_when_everything_came_back() -> None:
    known, worker = view_of(report("paris")), report("paris")
    for exec_s in (0.1, 0.2, 0.3):
        known.sent("paris-1", exec_s)
    for exec_s in (0.3, 0.2, 0.1):
        known.returned("paris-1", exec_s)
    # In floating point the difference is 2.8e-17.
    assert known.queue_s(worker) == 0.0
    known.returned("paris-1", 0.1)
    assert known.queue_s(worker) == 0.0


def of_next_epoch(*workers: WorkerReport, version: int = 1, full: bool = True) -> ViewDelta:
    """A delta of a coordinator that has started after the one before."""
    return ViewDelta(epoch="next", version=version, full=full, workers=workers, gone=(), rates={})


def test_the_view_of_the_last_coordinator_counts_until_all_workers_have_reported_to_the_new_one() -> None:
    view = ClusterView()
    view.apply(delta(report("paris"), report("tokyo")), 0.0)
    assert view.apply(of_next_epoch(report("tokyo", sequence=9)), 10.0) == ()
    assert set(view.workers) == {"paris-1", "tokyo-1"}
    assert view.workers["tokyo-1"].sequence == 9
    assert view.apply(of_next_epoch(report("paris"), version=2, full=False), 10.5) == ()
    assert view.apply(of_next_epoch(version=3, full=False), 99.0) == ()
    assert set(view.workers) == {"paris-1", "tokyo-1"}


def test_a_worker_that_does_not_report_to_the_new_coordinator_is_gone() -> None:
    view = ClusterView()
    view.apply(delta(report("paris"), report("tokyo")), 0.0)
    view.apply(of_next_epoch(report("tokyo")), 10.0)
    assert view.apply(of_next_epoch(version=2, full=False), 10.0 + ClusterView.CARRY_S) == ("paris-1",)
    assert set(view.workers) == {"tokyo-1"}


def test_a_full_view_of_the_same_coordinator_names_the_replicas_that_are_gone() -> None:
    view = ClusterView()
    view.apply(delta(report("paris"), report("tokyo")), 0.0)
    assert view.apply(delta(report("tokyo"), full=True, version=5), 1.0) == ("paris-1",)


# Possible holders


@pytest.mark.parametrize("seed", range(20))
def test_every_known_holder_of_a_model_is_among_its_possible_holders(seed: int) -> None:
    rng, known, sequence = random.Random(seed), RouterView(), 0
    places = ("oslo", "paris", "rome", "tokyo")
    for version in range(300):
        place, name, sequence = rng.choice(places), rng.choice("abc"), sequence + 1
        held = [resident(model_id) for model_id in "abc" if rng.random() < 0.5]
        worker = dataclasses.replace(report(place, sequence=sequence, models=held), leaving=rng.random() < 0.1)
        match rng.randrange(6):
            case 0:
                known.apply(delta(worker, version=version), 0.0)
            case 1:
                known.observe(f"{place}-1", name, rng.choice([READY, LOADING, None]), sequence + rng.randrange(3))
            case 2:
                known.expect_load(f"{place}-1", name)
            case 3:
                known.suspect(f"{place}-1")
            case 4:
                (known.reconnect if rng.random() < 0.7 else known.cut_off)(place)
            case 5:
                known.apply(delta(worker, gone=(f"{rng.choice(places)}-1",), version=version), 0.0)
        usable = known.workers()
        assert [worker for place in places for worker in known.workers_at(place)] == sorted(
            usable, key=lambda w: w.location
        )
        for model_id in "abc":
            holding = [worker for worker in usable if known.state(worker, model_id) is not None]
            found = [worker for worker in usable if worker.replica in known.possible_holders(model_id)]
            assert [worker for worker in found if known.state(worker, model_id) is not None] == holding
            nearest = known.neighbors("oslo", LINKS).nearest(known.possible_holders(model_id), 99)
            elsewhere = [worker for worker, _ in nearest if known.state(worker, model_id) is not None]
            assert sorted(worker.replica for worker in elsewhere) == sorted(
                worker.replica for worker in holding if worker.location != "oslo"
            )
