"""The workers around a location: its own, and the others in the order of their round trips."""

from __future__ import annotations

import math

import pytest
from core_support import report

from serve_app.core.cluster.reports import ViewDelta
from serve_app.core.links import Link, LinkTable
from serve_app.core.routing.neighbors import NeighborIndex
from serve_app.core.routing.router_view import RouterView
from serve_app.core.routing.rules import RoutingRules

RTT_S = {"oslo": 0.03, "rome": 0.01, "tokyo": 0.2, "lima": 0.03}
RULES = RoutingRules(
    profiles={},
    links={("paris", there): Link(rtt_s=rtt_s, bytes_per_s=1e6) for there, rtt_s in RTT_S.items()},
    default_link=Link(rtt_s=1.0, bytes_per_s=1e6),
    horizon_s=10.0,
)
WORKERS = [report(place) for place in ("tokyo", "paris", "oslo", "lima", "rome")]


def near(*replicas: str, count: int = 9) -> list[str]:
    index = NeighborIndex("paris", RULES, WORKERS)
    return [worker.replica for worker, _ in index.nearest(set(replicas), count)]


def test_the_nearest_come_first_and_equals_in_the_order_in_which_they_were_given() -> None:
    assert near("tokyo-1", "lima-1", "rome-1", "oslo-1") == ["rome-1", "oslo-1", "lima-1", "tokyo-1"]


def test_unknown_and_own_workers_are_not_among_the_others() -> None:
    assert near("paris-1", "unknown", "oslo-1") == ["oslo-1"]
    index = NeighborIndex("paris", RULES, WORKERS)
    assert [worker.replica for worker in index.own] == ["paris-1"]
    assert [worker.replica for worker, _ in index.others] == ["tokyo-1", "oslo-1", "lima-1", "rome-1"]


@pytest.mark.parametrize("unknown", [0, 50])
def test_no_more_than_the_nearest_are_returned(unknown: int) -> None:
    several = ["tokyo-1", "lima-1", "rome-1", "oslo-1", *(f"unknown-{number}" for number in range(unknown))]
    assert near(*several, count=2) == ["rome-1", "oslo-1"]
    assert near(*several) == ["rome-1", "oslo-1", "lima-1", "tokyo-1"]


def test_the_round_trip_to_the_nearest_of_several_is_infinite_where_there_is_none() -> None:
    index = NeighborIndex("paris", RULES, WORKERS)
    assert index.rtt_s({"tokyo-1", "oslo-1", "paris-1"}) == 0.03
    assert index.rtt_s({"paris-1", "unknown"}) == math.inf


def test_links_that_have_changed_count_after_the_next_precomputation() -> None:
    known, links = RouterView(), LinkTable("paris", RULES.link)
    known.apply(ViewDelta(epoch="e", version=1, full=True, workers=tuple(WORKERS), gone=(), rates={}), 0.0)
    known.precompute("paris", RULES, links)
    for _ in range(9):
        links.add("tokyo", 0, 0.001)
    known.precompute("paris", RULES, links)
    assert known.neighbors("paris", links).rtt_s({"tokyo-1", "rome-1"}) == 0.001
