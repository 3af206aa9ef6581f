"""What is around a location: its own workers, and the others in the order of their ways."""

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
    nearby = NeighborIndex("paris", RULES, WORKERS)
    return [worker.replica for worker, _ in nearby.nearest(set(replicas), count)]


def test_the_nearest_come_first_and_equals_in_the_order_in_which_they_were_given() -> None:
    assert near("tokyo-1", "lima-1", "rome-1", "oslo-1") == ["rome-1", "oslo-1", "lima-1", "tokyo-1"]


def test_strangers_and_the_own_workers_are_not_among_the_others() -> None:
    assert near("paris-1", "nobody", "oslo-1") == ["oslo-1"]
    nearby = NeighborIndex("paris", RULES, WORKERS)
    assert [worker.replica for worker in nearby.own] == ["paris-1"]
    assert [worker.replica for worker, _ in nearby.others] == ["tokyo-1", "oslo-1", "lima-1", "rome-1"]


@pytest.mark.parametrize("strangers", [0, 50])
def test_the_nearest_are_told_and_no_more(strangers: int) -> None:
    several = ["tokyo-1", "lima-1", "rome-1", "oslo-1", *(f"nobody-{number}" for number in range(strangers))]
    assert near(*several, count=2) == ["rome-1", "oslo-1"]
    assert near(*several) == ["rome-1", "oslo-1", "lima-1", "tokyo-1"]


def test_the_way_to_the_nearest_of_several_is_without_end_where_there_is_none() -> None:
    nearby = NeighborIndex("paris", RULES, WORKERS)
    assert nearby.rtt_s({"tokyo-1", "oslo-1", "paris-1"}) == 0.03
    assert nearby.rtt_s({"paris-1", "nobody"}) == math.inf


def test_ways_that_have_changed_count_after_the_next_look_around() -> None:
    known, ways = RouterView(), LinkTable("paris", RULES.link)
    known.apply(ViewDelta(epoch="e", version=1, full=True, workers=tuple(WORKERS), gone=(), rates={}), 0.0)
    known.precompute("paris", RULES, ways)
    for _ in range(9):
        ways.add("tokyo", 0, 0.001)
    known.precompute("paris", RULES, ways)
    assert known.neighbors("paris", ways).rtt_s({"tokyo-1", "rome-1"}) == 0.001
