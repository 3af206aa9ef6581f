"""Primary holders of a model: always one, also where views are old, and in the end no more than needed."""

from __future__ import annotations

import dataclasses

import pytest
from core_support import report, resident
from hypothesis import given, settings
from hypothesis import strategies as st

from serve_app.core.cluster.primaries import PrimaryTracker, primaries_at, rendezvous_rank
from serve_app.core.cluster.reports import WorkerReport

REPLICAS = [f"{location}-{number}" for location in ("oslo", "paris", "rome") for number in (1, 2)]


def place(replica: str) -> str:
    return replica.partition("-")[0]


def said(replica: str, *, holds: bool, primary_for: bool, leaving: bool = False) -> WorkerReport:
    return dataclasses.replace(
        report(place(replica), replica, models=[resident("a")] if holds else []),
        primary_for=frozenset("a") if primary_for else frozenset(),
        leaving=leaving,
    )


@pytest.mark.slow
@settings(max_examples=1000, deadline=None)
@given(
    claims=st.dictionaries(st.sampled_from(REPLICAS), st.booleans(), min_size=2),
    stale=st.integers(0, 5),
    old=st.dictionaries(st.sampled_from(REPLICAS), st.booleans()),
    copies=st.integers(0, 3),
)
def test_never_do_all_holders_let_go_though_one_of_them_acts_on_any_old_view(
    claims: dict[str, bool], stale: int, old: dict[str, bool], copies: int
) -> None:
    """``claims``: the holders, and whether each has reported last to be primary for the model."""
    holders = sorted(claims)
    now = [said(replica, holds=True, primary_for=primary_for) for replica, primary_for in claims.items()]
    then = [said(replica, holds=True, primary_for=primary_for) for replica, primary_for in old.items()]
    stay = []
    for number, replica in enumerate(holders):
        tracker = PrimaryTracker(replica, place(replica), {"a": copies})
        tracker.primary_for = frozenset("a") if claims[replica] else frozenset()
        tracker.update(["a"], [])
        tracker.primary_for = frozenset("a") if claims[replica] else frozenset()
        tracker.report(["a"])
        if tracker.update(["a"], then if number == stale % len(holders) else now):
            stay.append(replica)
    assert stay


@given(st.sets(st.sampled_from(REPLICAS), min_size=1), st.integers(0, 4))
def test_in_the_end_there_are_as_many_trackers_as_needed_at_different_locations_first(
    holders: set[str], copies: int
) -> None:
    trackers = {replica: PrimaryTracker(replica, place(replica), {"a": copies}) for replica in sorted(holders)}
    for _ in range(5):
        reports = [
            dataclasses.replace(said(replica, holds=True, primary_for=False), primary_for=tracker.report(["a"]))
            for replica, tracker in trackers.items()
        ]
        for tracker in trackers.values():
            tracker.update(["a"], reports)
    kept = {replica for replica, tracker in trackers.items() if tracker.primary_for}
    needed = min(max(1, copies), len(holders))
    assert len(kept) == needed
    assert len({place(replica) for replica in kept}) == min(needed, len({place(replica) for replica in holders}))
    if copies <= 1:
        assert kept == {min(holders, key=lambda replica: rendezvous_rank("a", replica))}


def test_who_leaves_keeps_nothing_for_others() -> None:
    first, second = sorted(REPLICAS, key=lambda replica: rendezvous_rank("a", replica))[:2]
    assert primaries_at(second, place(second), ["a"], [said(first, holds=True, primary_for=True)], {}) == frozenset()
    leaving = said(first, holds=True, primary_for=True, leaving=True)
    assert primaries_at(second, place(second), ["a"], [leaving], {}) == {"a"}


def test_what_has_just_come_is_kept_until_the_first_look() -> None:
    tracker = PrimaryTracker("oslo-1", "oslo")
    assert tracker.report(["a"]) == {"a"}


def test_only_what_must_be_there_several_times_is_required() -> None:
    tracker = PrimaryTracker("oslo-1", "oslo", {"a": 1, "b": 2, "c": 0})
    assert tracker.required(["a", "b", "c", "d"]) == ["b", "a"]
