"""The choice of where a request runs, in sums that can be done in the head.

The model ``m`` takes 10 bytes, 1 s to load and 0.1 s to run; users are in Paris; a forward costs 0.02 s.
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest
from core_support import profile, report, resident

from serve_app.core.cluster.reports import ViewDelta, WorkerReport
from serve_app.core.links import Link, LinkTable
from serve_app.core.routing.choose import Route, RoutingRequest, choose
from serve_app.core.routing.displacement_cost import forward_costs
from serve_app.core.routing.router_view import RouterView
from serve_app.core.routing.rules import RoutingRules
from serve_app.core.vocabulary import Forwarding, ModelState, Outcome

M = profile("m", 10, load_s=1.0, exec_s=0.1)
PROFILES = {model.model_id: model for model in (M, profile("v", 10, load_s=2.0), profile("w", 10, load_s=2.0))}
HOLDS = (resident("m"),)
LOADS = (resident("m", state=ModelState.LOADING),)
HIT, JOIN, LOAD, FORWARD = Outcome.HIT, Outcome.JOIN, Outcome.LOAD, Outcome.FORWARD


def rules(
    *, links: Mapping[tuple[str, str], Link] | None = None, horizon_s: float = 10.0, staleness_s: float = 0.0
) -> RoutingRules:
    return RoutingRules(
        profiles=PROFILES,
        links=links or {},
        default_link=Link(rtt_s=0.02, bytes_per_s=1000.0),
        horizon_s=horizon_s,
        staleness_s=staleness_s,
    )


def view_of(*workers: WorkerReport, rates: Mapping[str, Mapping[str, float]] | None = None) -> RouterView:
    view = RouterView()
    view.apply(ViewDelta(epoch="e", version=1, full=True, workers=workers, gone=(), rates=rates or {}), 0.0)
    return view


def request(**changed: Any) -> RoutingRequest:
    return RoutingRequest(**{"model": M, "here": "paris"} | changed)


# The table


@dataclass(frozen=True, kw_only=True)
class Case:
    """Workers and rates; what is chosen and the latency that is expected of it, in seconds."""

    workers: tuple[WorkerReport, ...]
    outcome: Outcome
    replica: str
    expected_s: float
    preload: str | None = None
    rates: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    request: Mapping[str, Any] = field(default_factory=dict)


PARIS, TOKYO = report("paris"), report("tokyo")
CASES = {
    "hit: the model is here": Case(
        workers=(report("paris", models=HOLDS), report("tokyo", models=HOLDS)),
        outcome=HIT, replica="paris-1", expected_s=0.1,
    ),
    "hit: larger sizes execute longer": Case(
        workers=(report("paris", models=HOLDS, exec_s={"m": 0.2}), report("tokyo", models=HOLDS)),
        outcome=HIT, replica="paris-1", expected_s=0.6, request={"times_longer": 3.0},
    ),
    "forward: for larger sizes the worker there is faster by more than the queue here": Case(
        workers=(report("paris", models=HOLDS, queue_s=0.05), report("tokyo", models=HOLDS, exec_s={"m": 0.04})),
        outcome=FORWARD, replica="tokyo-1", expected_s=0.42, request={"times_longer": 10.0},
    ),
    "hit: of two holders here the less busy one": Case(
        workers=(report("paris", models=HOLDS, queue_s=0.5), report("paris", "paris-2", models=HOLDS, queue_s=0.2)),
        outcome=HIT, replica="paris-2", expected_s=0.3,
    ),
    "hit: a short queue here is less than the link": Case(
        workers=(report("paris", models=HOLDS, queue_s=0.015), report("tokyo", models=HOLDS)),
        outcome=HIT, replica="paris-1", expected_s=0.115,
    ),
    "hit: a long queue here, but a longer one there": Case(
        workers=(report("paris", models=HOLDS, queue_s=0.5), report("tokyo", models=HOLDS, queue_s=0.49)),
        outcome=HIT, replica="paris-1", expected_s=0.6,
    ),
    "forward: a long queue here, none there": Case(
        workers=(report("paris", models=HOLDS, queue_s=0.5), report("tokyo", models=HOLDS)),
        outcome=FORWARD, replica="tokyo-1", expected_s=0.12,
    ),
    "forward: a long queue here, and there the model runs faster": Case(
        workers=(report("paris", models=HOLDS, queue_s=0.05), report("tokyo", models=HOLDS, exec_s={"m": 0.04})),
        outcome=FORWARD, replica="tokyo-1", expected_s=0.06,
    ),
    "hit: there the model runs faster, but not by more than times vary": Case(
        workers=(
            report("paris", models=HOLDS, queue_s=0.1),
            report("tokyo", models=HOLDS, queue_s=0.1, exec_s={"m": 0.06}),
        ),
        outcome=HIT, replica="paris-1", expected_s=0.2,
    ),
    "hit: here it was measured slow, elsewhere it was never measured": Case(
        workers=(
            report("paris", models=HOLDS, queue_s=0.1, exec_s={"m": 0.5}),
            report("tokyo", models=HOLDS, queue_s=0.1),
        ),
        outcome=HIT, replica="paris-1", expected_s=0.6,
    ),
    "hit: rather than load a second copy into a worker here that was never measured": Case(
        workers=(report("paris", models=HOLDS, exec_s={"m": 5.0}), report("paris", "paris-2")),
        outcome=HIT, replica="paris-1", expected_s=5.0,
    ),
    "join: a load under way here is half done": Case(
        workers=(report("paris", models=LOADS), TOKYO),
        outcome=JOIN, replica="paris-1", expected_s=0.6,
    ),
    "join: rather than load a second copy": Case(
        workers=(report("paris", models=LOADS), report("paris", "paris-2")),
        outcome=JOIN, replica="paris-1", expected_s=0.6,
    ),
    "forward: rather than join, to a worker that holds it already": Case(
        workers=(report("paris", models=LOADS), report("tokyo", models=HOLDS)),
        outcome=FORWARD, replica="tokyo-1", expected_s=0.12,
    ),
    "load: no worker holds it": Case(
        workers=(PARIS, TOKYO),
        outcome=LOAD, replica="paris-1", expected_s=1.1,
    ),
    "load: measured times count for more than the profile": Case(
        workers=(report("paris", load_s={"m": 0.01}, exec_s={"m": 0.3}), report("tokyo", models=HOLDS, queue_s=0.3)),
        outcome=LOAD, replica="paris-1", expected_s=0.31,
    ),
    "load: faster than a load under way there": Case(
        workers=(report("paris", load_s={"m": 0.4}), report("tokyo", models=LOADS)),
        outcome=LOAD, replica="paris-1", expected_s=0.5,
    ),
    "forward: to a load under way there, which ends sooner": Case(
        workers=(PARIS, report("tokyo", models=LOADS)),
        outcome=FORWARD, replica="tokyo-1", expected_s=0.62,
    ),
    "forward: another location holds it": Case(
        workers=(PARIS, report("tokyo", models=HOLDS)),
        outcome=FORWARD, replica="tokyo-1", expected_s=0.12,
    ),
    "forward: of two holders the less busy one": Case(
        workers=(PARIS, report("tokyo", models=HOLDS, queue_s=0.2), report("oslo", models=HOLDS)),
        outcome=FORWARD, replica="oslo-1", expected_s=0.12,
    ),
    "load: the only holder is busier than a load takes": Case(
        workers=(PARIS, report("tokyo", models=HOLDS, queue_s=1.5)),
        outcome=LOAD, replica="paris-1", expected_s=1.1,
    ),
    "load: here, rather than a copy at another location that is no less busy": Case(
        workers=(report("paris", queue_s=1.0), report("tokyo", queue_s=1.0)),
        outcome=LOAD, replica="paris-1", expected_s=2.1,
    ),
    "forward: a copy at another location, as the queue here is long": Case(
        workers=(report("paris", queue_s=1.0), TOKYO),
        outcome=FORWARD, replica="tokyo-1", expected_s=1.12,
    ),
    "load: rather than where other models load already": Case(
        workers=(report("paris", loading=2), report("paris", "paris-2")),
        outcome=LOAD, replica="paris-2", expected_s=1.1,
    ),
    "load: what others load takes its turn before": Case(
        workers=(report("paris", loading=3, load_slots=2), report("tokyo", loading=2, load_slots=2)),
        outcome=LOAD, replica="paris-1", expected_s=2.1,
    ),
    "forward: to load there, as others load here already": Case(
        workers=(report("paris", loading=1), TOKYO),
        outcome=FORWARD, replica="tokyo-1", expected_s=1.12,
    ),
    "forward, and load here: what is popular here is worth a copy of its own, but a holder answers sooner": Case(
        # Forwarding costs 0.02 s for each of 10 s x 6/s later requests: 1.2 s, more than the load.
        workers=(PARIS, report("tokyo", models=HOLDS)), rates={"paris": {"m": 6.0}},
        outcome=FORWARD, replica="tokyo-1", expected_s=0.12, preload="paris-1",
    ),
    "load: what is popular here is worth a copy of its own, and the holder is busy": Case(
        workers=(PARIS, report("tokyo", models=HOLDS, queue_s=1.0)), rates={"paris": {"m": 6.0}},
        outcome=LOAD, replica="paris-1", expected_s=1.1,
    ),
    "forward: what is a little popular here is not": Case(
        workers=(PARIS, report("tokyo", models=HOLDS)), rates={"paris": {"m": 4.0}},
        outcome=FORWARD, replica="tokyo-1", expected_s=0.12,
    ),
    "forward: popularity elsewhere is no reason to load here": Case(
        workers=(PARIS, report("tokyo", models=HOLDS)), rates={"tokyo": {"m": 100.0}},
        outcome=FORWARD, replica="tokyo-1", expected_s=0.12,
    ),
    "load: into the worker whose victims are missed least": Case(
        workers=(
            report("paris", capacity=10, models=[resident("v")]),
            report("paris", "paris-2", capacity=10, models=[resident("w")]),
        ),
        rates={"paris": {"v": 1.0, "w": 0.5}},
        outcome=LOAD, replica="paris-2", expected_s=1.1,
    ),
    "forward: what is popular, if its place here is worth more": Case(
        # The victim v is missed once a second for 10 s, 2 s each: dearer than 1.2 s for forwarding.
        workers=(report("paris", capacity=10, models=[resident("v")]), report("tokyo", models=HOLDS)),
        rates={"paris": {"m": 6.0, "v": 1.0}},
        outcome=FORWARD, replica="tokyo-1", expected_s=0.12,
    ),
    "load: a victim that others hold is not missed much": Case(
        # v costs a forward of 0.02 s each time, 0.02 x 10 x 1 in all.
        workers=(
            report("paris", capacity=10, models=[resident("v")]),
            report("tokyo", models=[resident("m"), resident("v")]),
        ),
        rates={"paris": {"m": 6.5, "v": 1.0}},
        outcome=FORWARD, replica="tokyo-1", expected_s=0.12, preload="paris-1",
    ),
    "forward: the one model here without requests is pinned": Case(
        workers=(
            report("paris", capacity=20, models=[resident("v", pinned=True), resident("w")]),
            report("tokyo", models=HOLDS),
        ),
        rates={"paris": {"m": 6.0, "w": 1.0}},
        outcome=FORWARD, replica="tokyo-1", expected_s=0.12,
    ),
    "load: never where only pinned models could make room": Case(
        workers=(
            report("paris", capacity=10, models=[resident("v", pinned=True)]),
            report("paris", "paris-2", capacity=10, models=[resident("w")], queue_s=5.0),
        ),
        rates={"paris": {"w": 1.0}},
        outcome=LOAD, replica="paris-2", expected_s=6.1,
    ),
    "forward: the model is too large for the workers here": Case(
        workers=(report("paris", capacity=9), report("tokyo", queue_s=5.0)),
        outcome=FORWARD, replica="tokyo-1", expected_s=6.12,
    ),
    "forward: here pinned models leave too little room": Case(
        workers=(report("paris", capacity=19, models=[resident("v", pinned=True)]), TOKYO),
        outcome=FORWARD, replica="tokyo-1", expected_s=1.12,
    ),
    "hit: although the worker is full of pinned models, m among them": Case(
        workers=(report("paris", capacity=10, models=[resident("m", pinned=True)]), TOKYO),
        outcome=HIT, replica="paris-1", expected_s=0.1,
    ),
    "forward: the user wants what is popular here forwarded for ever": Case(
        workers=(PARIS, report("tokyo", models=HOLDS)), rates={"paris": {"m": 6.0}},
        request={"forwarding": Forwarding.PREFER}, outcome=FORWARD, replica="tokyo-1", expected_s=0.12,
    ),
    "load: the user wants it forwarded, but no worker holds it": Case(
        workers=(report("paris", queue_s=1.0), TOKYO),
        request={"forwarding": Forwarding.PREFER}, outcome=LOAD, replica="paris-1", expected_s=2.1,
    ),
    "load: the user forbids to forward": Case(
        workers=(PARIS, report("tokyo", models=HOLDS)), request={"forwarding": Forwarding.NEVER},
        outcome=LOAD, replica="paris-1", expected_s=1.1,
    ),
    "forward: a large payload is slow on the link, but faster than a load": Case(
        workers=(PARIS, report("tokyo", models=HOLDS)), request={"payload_bytes": 500},
        outcome=FORWARD, replica="tokyo-1", expected_s=0.62,
    ),
    "load: a payload too large for the link": Case(
        workers=(PARIS, report("tokyo", models=HOLDS)), request={"payload_bytes": 1000},
        outcome=LOAD, replica="paris-1", expected_s=1.1,
    ),
    "forward: the holder here has failed this request already": Case(
        workers=(report("paris", models=HOLDS), report("tokyo", models=HOLDS)), request={"avoid": {"paris-1"}},
        outcome=FORWARD, replica="tokyo-1", expected_s=0.12,
    ),
    "load: the only holder has failed this request already": Case(
        workers=(PARIS, report("tokyo", models=HOLDS)), request={"avoid": {"tokyo-1"}},
        outcome=LOAD, replica="paris-1", expected_s=1.1,
    ),
    "forward: no worker is left here": Case(
        workers=(TOKYO,),
        outcome=FORWARD, replica="tokyo-1", expected_s=1.12,
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_the_option_of_least_expected_cost_is_chosen(case: Case) -> None:
    route = choose(request(**case.request), view_of(*case.workers, rates=case.rates), rules())
    assert (route.outcome, route.replica) == (case.outcome, case.replica)
    assert route.expected_s == pytest.approx(case.expected_s)
    assert route.preload == case.preload
    assert route.location == case.replica.split("-")[0]
    assert 0 <= route.wait_s < route.expected_s <= route.cost_s


@pytest.mark.parametrize(("queue_s", "outcome"), [(0.5, HIT), (0.53, FORWARD)])
def test_a_shorter_queue_elsewhere_counts_only_if_it_is_shorter_by_more_than_the_view_is_old(
    queue_s: float, outcome: Outcome
) -> None:
    view = view_of(report("paris", models=HOLDS, queue_s=queue_s), report("tokyo", models=HOLDS))
    assert choose(request(), view, rules(staleness_s=0.5)).outcome is outcome


# Where no worker, or no suitable one, is known


@pytest.mark.parametrize(
    ("workers", "changed"),
    [
        ((), {}),
        ((TOKYO,), {"forwarding": Forwarding.NEVER}),
        ((report("tokyo", models=HOLDS),), {"forwarding": Forwarding.NEVER}),
        ((report("paris", models=HOLDS), TOKYO), {"forwarding": Forwarding.NEVER, "avoid": {"paris-1"}}),
        ((PARIS, TOKYO), {"avoid": {"paris-1", "tokyo-1"}}),
    ],
)
def test_without_any_choice_the_request_goes_to_its_own_location(
    workers: tuple[WorkerReport, ...], changed: Mapping[str, Any]
) -> None:
    route = choose(request(**changed), view_of(*workers), rules())
    assert route == Route(
        outcome=LOAD,
        location="paris",
        replica=None,
        wait_s=1.0,
        expected_s=1.1,
        cost_s=math.inf,
        only_if_resident=False,
    )


def test_a_model_that_fits_nowhere_goes_to_its_own_location_to_be_rejected_there() -> None:
    route = choose(request(), view_of(report("tokyo", capacity=9), report("paris", capacity=9)), rules())
    assert (route.outcome, route.replica) == (LOAD, "paris-1")


def test_a_suspect_is_no_option() -> None:
    view = view_of(report("paris", models=HOLDS), report("tokyo", models=HOLDS))
    view.suspect("paris-1")
    assert choose(request(), view, rules()).replica == "tokyo-1"


def test_a_worker_can_hold_what_fits_beside_its_pinned_models() -> None:
    worker = report("paris", capacity=30, models=[resident("p", pinned=True), resident("v")])
    assert worker.can_hold(profile("m", 20))
    assert not worker.can_hold(profile("m", 21))
    assert worker.can_hold(profile("p", 30))


def test_a_worker_can_hold_what_fits_in_the_place_of_protected_models_but_at_infinite_cost() -> None:
    protected = dataclasses.replace(resident("k", pinned=True), protected=True)
    worker = report("paris", capacity=30, models=[protected, resident("v")])
    assert worker.can_hold(profile("m", 30))
    assert not worker.can_hold(profile("m", 21), beside_protected=True)
    route = choose(request(model=profile("m", 21)), view_of(worker), rules())
    assert route.cost_s == math.inf


# Observations since the last report


def test_a_hint_that_turned_out_stale_is_not_followed_again() -> None:
    view = view_of(PARIS, report("tokyo", models=HOLDS))
    view.observe("tokyo-1", "m", None, 2)
    assert choose(request(), view, rules()).outcome is LOAD


def test_a_model_that_was_just_loaded_is_hit() -> None:
    view = view_of(PARIS)
    view.observe("paris-1", "m", ModelState.READY, 2)
    assert choose(request(), view, rules()).outcome is HIT


def test_a_load_that_this_router_has_caused_is_joined() -> None:
    view = view_of(PARIS, report("paris", "paris-2"))
    view.expect_load("paris-2", "m")
    route = choose(request(), view, rules())
    assert (route.outcome, route.replica) == (JOIN, "paris-2")


def test_requests_under_way_count_as_queue() -> None:
    view = view_of(report("paris", models=HOLDS), report("paris", "paris-2", models=HOLDS))
    view.sent("paris-1", 0.1)
    assert choose(request(), view, rules()).replica == "paris-2"


@pytest.mark.parametrize(("models", "only_if_resident"), [(HOLDS, True), (LOADS, True), ((), False)])
def test_a_forward_for_the_sake_of_a_copy_is_taken_only_if_the_copy_is_there(
    models: tuple, only_if_resident: bool
) -> None:
    route = choose(request(), view_of(report("tokyo", models=models)), rules())
    assert route.only_if_resident is only_if_resident


def test_nothing_is_demanded_of_the_own_location() -> None:
    for models in (HOLDS, LOADS, ()):
        assert choose(request(), view_of(report("paris", models=models)), rules()).only_if_resident is False


def test_a_request_that_waits_for_nothing_is_not_said_to() -> None:
    assert choose(request(), view_of(report("paris", models=HOLDS)), rules()).wait_s == 0.0


# Links


@pytest.mark.parametrize("ends", [("paris", "oslo"), ("oslo", "paris")])
def test_a_link_holds_in_both_directions(ends: tuple[str, str]) -> None:
    near = rules(links={ends: Link(rtt_s=0.001, bytes_per_s=1e9)})
    view = view_of(PARIS, report("tokyo", models=HOLDS), report("oslo", models=HOLDS))
    route = choose(request(), view, near)
    assert route.replica == "oslo-1"
    assert route.expected_s == pytest.approx(0.101)


def test_where_no_link_is_described_the_default_one_counts() -> None:
    assert rules(links={("oslo", "paris"): Link(rtt_s=9.0, bytes_per_s=1.0)}).link("paris", "tokyo").rtt_s == 0.02


def test_a_link_takes_its_round_trip_and_the_bytes() -> None:
    assert Link(rtt_s=0.5, bytes_per_s=100.0).seconds(50) == pytest.approx(1.0)


def test_a_link_within_a_location_is_free_until_it_is_measured() -> None:
    assert rules().link("paris", "paris").seconds(10**6) == pytest.approx(0.0, abs=1e-5)


def test_measured_links_count_for_more_than_configured_ones() -> None:
    measured = {("paris", "tokyo"): Link(rtt_s=2.0, bytes_per_s=1.0)}
    assert rules().with_links(measured).link("paris", "tokyo").rtt_s == 2.0
    table = LinkTable("paris", rules().link)
    for _ in range(9):
        table.add("tokyo", 0, 2.0)
    view = view_of(PARIS, report("tokyo", models=HOLDS))
    assert choose(request(), view, rules()).outcome is FORWARD
    assert choose(request(), view, rules(), table).outcome is LOAD


def test_of_idle_locations_each_model_has_its_own_order() -> None:
    """Otherwise all routers would send all that they cannot take to the same one."""
    names = ("tokyo", "oslo", "lima", "cairo")
    view = view_of(report("paris", queue_s=9.0), *(report(name) for name in names))
    models = [profile(f"m{number}", 10, load_s=1.0, exec_s=0.1) for number in range(100)]
    chosen = Counter(choose(request(model=model), view, rules(staleness_s=0.5)).location for model in models)
    assert set(chosen) == set(names)
    assert max(chosen.values()) < 45


@pytest.mark.parametrize("count", [3, 40])
def test_a_model_is_loaded_elsewhere_only_if_that_is_better_than_its_holder(count: int) -> None:
    """However many others are as good as the best of them: of those, some are worse than the holder."""
    others = [report(f"far{number}", load_s={"m": 0.3 + 0.01 * number}) for number in range(count)]
    for queue_s, replicas in ((0.25, {"tokyo-1"}), (0.325, {"far0-1", "far1-1", "far2-1"} | {"tokyo-1"})):
        view = view_of(report("paris", queue_s=9.0), report("tokyo", models=HOLDS, queue_s=queue_s), *others)
        route = choose(request(), view, rules(staleness_s=0.5))
        assert route.replica in replicas
        assert route.expected_s <= 0.02 + queue_s + 0.1


def test_of_many_workers_that_hold_a_model_the_nearest_free_one_is_taken() -> None:
    names = [f"far{number:02}" for number in range(40)]
    links = {("paris", name): Link(rtt_s=0.01 * (40 - number), bytes_per_s=1e9) for number, name in enumerate(names)}
    busy = {"far39": 1.0, "far38": 0.5}
    view = view_of(PARIS, *(report(name, models=HOLDS, queue_s=busy.get(name, 0.0)) for name in names))
    assert choose(request(), view, rules(links=links)).location == "far37"


def test_a_holder_further_away_that_is_twice_as_fast_is_not_overlooked() -> None:
    links = {("paris", "oslo"): Link(rtt_s=0.001, bytes_per_s=1e9)}
    view = view_of(PARIS, report("oslo", models=HOLDS), report("tokyo", models=HOLDS, exec_s={"m": 0.04}))
    assert choose(request(), view, rules(links=links)).location == "tokyo"


# What losing a model costs


def test_losing_a_model_costs_at_most_the_link_to_the_nearest_other_holder() -> None:
    links = {("paris", "oslo"): Link(rtt_s=0.001, bytes_per_s=1e9)}
    view = view_of(
        report("paris", models=[resident("own"), resident("m")]),
        report("tokyo", models=[resident("m"), resident("v")]),
        report("oslo", models=[resident("m")]),
    )
    assert forward_costs("paris", view.cluster, rules(links=links)) == {"m": 0.001, "v": 0.02}


def test_a_second_worker_of_the_same_location_is_no_other_holder() -> None:
    view = view_of(report("paris", models=HOLDS), report("paris", "paris-2", models=HOLDS))
    assert forward_costs("paris", view.cluster, rules()) == {}
