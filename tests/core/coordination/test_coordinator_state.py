"""The coordinator's state machine: which workers there are, what they hold, and that deltas lack nothing."""

from __future__ import annotations

import dataclasses

import pytest
from core_support import read, report, resident, take
from hypothesis import given, settings
from hypothesis import strategies as st

from serve_app.core.cluster.cluster_view import ClusterView
from serve_app.core.cluster.reports import Demand, ViewDelta, WorkerReport
from serve_app.core.coordination.coordinator_state import CoordinatorState
from serve_app.core.coordination.events import RulesChanged, WorkerLeft
from serve_app.core.coordination.rules import CoordinatorRules, DeltaLimits

STALE_AFTER_S = 2.0
LN2 = 0.6931471805599453


#: Remembers only two of the replicas that have left.
FORGETFUL = DeltaLimits(departed=2)


def coordinator(epoch: str = "first", limits: DeltaLimits = DeltaLimits()) -> CoordinatorState:  # noqa: B008
    rules = CoordinatorRules(half_life_s=10.0, stale_after_s=STALE_AFTER_S)
    return CoordinatorState(epoch=epoch, rules=rules, limits=limits)


def everything(state: CoordinatorState, now: float) -> ViewDelta:
    return read(state, "", 0, now)


def replicas(delta: ViewDelta) -> set[str]:
    return {worker.replica for worker in delta.workers}


# Joining and leaving


def test_a_coordinator_begins_with_nothing() -> None:
    delta = everything(coordinator(), 0.0)
    assert delta == ViewDelta(epoch="first", version=0, full=True, workers=(), gone=(), rates={})


def test_a_replica_joins_with_its_first_report() -> None:
    state = coordinator()
    take(state, report("paris", models=[resident("a")]), 0.0)
    take(state, report("tokyo", models=[resident("a"), resident("b")]), 0.0)
    assert replicas(everything(state, 0.0)) == {"paris-1", "tokyo-1"}
    assert list(state.directory.holders("a")) == ["paris-1", "tokyo-1"]
    assert list(state.directory.holders("b")) == ["tokyo-1"]
    assert state.directory.held_models() == {"a", "b"}


def test_a_later_report_replaces_the_last_one() -> None:
    state = coordinator()
    take(state, report("paris", sequence=1, models=[resident("a")]), 0.0)
    take(state, report("paris", sequence=2, models=[resident("b")]), 0.1)
    assert not state.directory.holders("a")
    assert list(state.directory.holders("b")) == [
        "paris-1",
    ]


@pytest.mark.parametrize("sequence", [3, 2, 1])
def test_a_report_that_was_overtaken_or_comes_twice_is_ignored(sequence: int) -> None:
    state = coordinator()
    take(state, report("paris", sequence=3, models=[resident("new")], demand={"a": 1}), 0.0)
    before = everything(state, 0.5)
    take(state, report("paris", sequence=sequence, models=[resident("old")], demand={"a": 5}), 0.5)
    assert everything(state, 0.5) == before


def test_an_overtaken_report_does_not_keep_a_silent_replica_alive() -> None:
    state = coordinator()
    take(state, report("paris", sequence=2), 0.0)
    take(state, report("paris", sequence=1), 1.9)
    assert replicas(everything(state, 2.1)) == set()


def test_a_silent_replica_leaves_after_the_limit_and_not_before() -> None:
    state = coordinator()
    take(state, report("paris", models=[resident("a")]), 10.0)
    assert replicas(everything(state, 10.0 + STALE_AFTER_S)) == {"paris-1"}
    assert replicas(everything(state, 10.0 + STALE_AFTER_S + 0.01)) == set()
    assert not state.directory.holders("a")


def test_the_reports_of_others_are_enough_to_notice_a_silent_replica() -> None:
    state = coordinator()
    take(state, report("paris", models=[resident("a")]), 0.0)
    take(state, report("tokyo"), 5.0)
    assert not state.directory.holders("a")


def test_a_replica_that_was_taken_for_dead_joins_again() -> None:
    state = coordinator()
    take(state, report("paris", sequence=7), 0.0)
    version = everything(state, 0.0).version
    assert read(state, "first", version, 5.0).gone == ("paris-1",)
    take(state, report("paris", sequence=8), 6.0)
    delta = read(state, "first", version, 6.0)
    assert (replicas(delta), delta.gone) == ({"paris-1"}, ())


def test_a_replica_that_deregisters_leaves_at_once() -> None:
    state = coordinator()
    take(state, report("paris"), 0.0)
    take(state, report("tokyo"), 0.0)
    state.handle(WorkerLeft(replica="paris-1"), 0.0)
    assert replicas(everything(state, 0.0)) == {"tokyo-1"}


def test_the_departure_of_an_unknown_replica_changes_nothing() -> None:
    state = coordinator()
    take(state, report("paris"), 0.0)
    before = everything(state, 0.0)
    state.handle(WorkerLeft(replica="nobody"), 0.0)
    assert everything(state, 0.0) == before


# Deltas


def test_deltas_hold_what_has_changed_and_nothing_else() -> None:
    state = coordinator()
    for location in ("paris", "tokyo", "virginia"):
        take(state, report(location), 0.0)
    seen = everything(state, 0.0).version
    take(state, report("tokyo", sequence=2), 0.1)
    state.handle(WorkerLeft(replica="virginia-1"), 0.1)
    delta = read(state, "first", seen, 0.1)
    assert (delta.full, replicas(delta), delta.gone) == (False, {"tokyo-1"}, ("virginia-1",))


def test_a_reader_that_has_seen_everything_gets_nothing() -> None:
    state = coordinator()
    take(state, report("paris"), 0.0)
    state.handle(WorkerLeft(replica="paris-1"), 0.0)
    seen = everything(state, 0.0).version
    assert read(state, "first", seen, 0.0) == ViewDelta(
        epoch="first", version=seen, full=False, workers=(), gone=(), rates={}
    )


@pytest.mark.parametrize(("epoch", "version"), [("", 0), ("another life", 1), ("first", 99)])
def test_a_reader_that_knows_another_epoch_or_the_future_reads_everything(epoch: str, version: int) -> None:
    state = coordinator()
    take(state, report("paris"), 0.0)
    delta = read(state, epoch, version, 0.0)
    assert (delta.full, replicas(delta), delta.epoch) == (True, {"paris-1"}, "first")


def test_a_reader_that_lags_behind_the_memory_of_departures_reads_everything() -> None:
    state = coordinator(limits=FORGETFUL)
    for location in ("a", "b", "c"):
        take(state, report(location), 0.0)
    seen = everything(state, 0.0).version
    state.handle(WorkerLeft(replica="a-1"), 0.0)
    after_a = everything(state, 0.0).version
    state.handle(WorkerLeft(replica="b-1"), 0.0)
    assert not read(state, "first", seen, 0.0).full
    state.handle(WorkerLeft(replica="c-1"), 0.0)
    assert read(state, "first", seen, 0.0).full
    assert read(state, "first", after_a, 0.0).gone == ("b-1", "c-1")


def test_demand_becomes_a_rate_of_the_users_location() -> None:
    state = coordinator()
    take(state, report("tokyo", demand={"a": 2}, origin="paris"), 0.0)
    take(state, report("paris", demand={"a": 1, "b": 1}), 0.0)
    assert state.rates(0.0) == {
        "paris": {"a": pytest.approx(3 * LN2 / 10), "b": pytest.approx(LN2 / 10)},
    }
    assert everything(state, 10.0).rates == {
        "paris": {"a": pytest.approx(3 * LN2 / 20), "b": pytest.approx(LN2 / 20)},
    }


def test_demand_is_counted_and_not_passed_on() -> None:
    state = coordinator()
    take(state, report("paris", demand={"a": 1}), 0.0)
    assert [worker.demand for worker in everything(state, 0.0).workers] == [()]


def test_rates_fall_for_readers_even_where_no_worker_is_left() -> None:
    state = coordinator()
    view = ClusterView()
    take(state, report("paris", demand={"a": 1}), 0.0)
    view.apply(everything(state, 0.0), 0.0)
    view.apply(read(state, view.epoch, view.version, 10.0), 10.0)
    assert "paris-1" not in view.workers
    assert view.rate("paris", "a") == pytest.approx(LN2 / 20)
    view.apply(read(state, view.epoch, view.version, 1000.0), 1000.0)
    assert view.rates == {}


def test_deltas_cannot_be_changed() -> None:
    delta = everything(coordinator(), 0.0)
    with pytest.raises(dataclasses.FrozenInstanceError):
        delta.version = 5


# Whatever happens

REPLICAS = st.sampled_from(["paris-1", "paris-2", "tokyo-1", "oslo-1"])
READERS = range(3)
EVENTS = st.lists(
    st.one_of(
        st.tuples(st.just("report"), REPLICAS, st.integers(-1, 2), st.sets(st.sampled_from("abc"))),
        st.tuples(st.just("depart"), REPLICAS),
        st.tuples(st.just("wait"), st.sampled_from([0.1, 1.5, 3.0, 500.0])),
        st.tuples(st.just("read"), st.sampled_from(READERS)),
        st.tuples(st.just("restart")),
    ),
    max_size=60,
)


def reported(replica: str, sequence: int, held: set[str]) -> WorkerReport:
    location = replica.split("-")[0]
    demand = tuple(Demand(location=location, model_id=model_id, count=1) for model_id in sorted(held))
    models = [resident(model_id) for model_id in sorted(held)]
    return dataclasses.replace(report(location, replica, sequence=sequence, models=models), demand=demand)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(events=EVENTS)
def test_a_reader_of_deltas_knows_what_a_reader_of_everything_knows(events: list[tuple]) -> None:
    now, lives = 0.0, 0
    state = coordinator("life 0", FORGETFUL)
    sequences: dict[str, int] = {}
    views = [ClusterView() for _ in READERS]

    def catch_up(view: ClusterView) -> None:
        view.apply(read(state, view.epoch, view.version, now), now)

    for event, *details in events:
        match event, details:
            case "report", [replica, step, held]:
                sequences[replica] = max(1, sequences.get(replica, 0) + step)
                take(state, reported(replica, sequences[replica], held), now)
            case "depart", [replica]:
                state.handle(WorkerLeft(replica=replica), now)
            case "wait", [seconds]:
                now += seconds
            case "read", [reader]:
                catch_up(views[reader])
            case "restart", []:
                lives += 1
                state = coordinator(f"life {lives}", FORGETFUL)
    for view in views:
        catch_up(view)
    # What a new coordinator has not confirmed by then is forgotten.
    now += ClusterView.CARRY_S
    whole = ClusterView()
    catch_up(whole)
    for view in views:
        catch_up(view)
        assert view == whole


def test_of_rules_that_were_issued_at_once_the_first_ones_count() -> None:
    """Each host measures its own models, so their rules differ a little; reconnecting must not change them."""
    state = coordinator()
    rules = CoordinatorRules(half_life_s=10.0, stale_after_s=100 * STALE_AFTER_S)
    state.handle(RulesChanged(rules=rules), 0.0)
    take(state, report("paris"), 0.0)
    assert replicas(everything(state, 2 * STALE_AFTER_S)) == set()
    state.handle(RulesChanged(rules=dataclasses.replace(rules, issued=1)), 0.0)
    take(state, report("paris"), 0.0)
    assert replicas(everything(state, 2 * STALE_AFTER_S)) == {"paris-1"}
