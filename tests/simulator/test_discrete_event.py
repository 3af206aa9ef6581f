"""The full model of time, in traces so small that every second can be counted.

Unless a test says otherwise a model takes 10 bytes, 1 s to load and 0.1 s to run; a round trip between two locations
takes 0.02 s, and what happens at one is known at the other two report periods of 0.25 s later at the latest.
"""

from __future__ import annotations

import math
import random
from array import array
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import pytest

from serve_app.core.cache.model_cache import ModelCache
from serve_app.core.catalog import ModelProfile
from serve_app.core.cluster.popularity import Popularity
from serve_app.core.cluster.primaries import rendezvous_rank
from serve_app.core.links import Link
from serve_app.core.placement.rules import PlacementRules
from serve_app.core.policies.registry import make_policy
from serve_app.core.routing.rules import RoutingRules
from serve_app.core.vocabulary import ModelState
from serve_app.simulator.discrete_event.coordinator import LaggedPopularity
from serve_app.simulator.discrete_event.event_queue import EventQueue
from serve_app.simulator.discrete_event.results import DiscreteEventResults
from serve_app.simulator.discrete_event.settings import DiscreteEventOptions, geographic_links
from serve_app.simulator.discrete_event.simulation import simulate_discrete_event
from serve_app.simulator.discrete_event.worker import Job, SimulatedWorker, report_rows
from serve_app.simulator.load_delay import replay
from serve_app.workload.locations import split
from serve_app.workload.spec import parse_trace
from serve_app.workload.trace import Trace

pytestmark = pytest.mark.slow

NEAR = Link(rtt_s=0.02, bytes_per_s=math.inf)
A, B, C = "abc"


def profile(model_id: str, size: int = 10, *, load_s: float = 1.0, exec_s: float = 0.1) -> ModelProfile:
    return ModelProfile(model_id=model_id, size_bytes=size, load_s=load_s, exec_s=exec_s)


def trace(*requests: tuple[float, str] | tuple[float, str, int], locations: int = 1) -> Trace:
    """Requests ``(arrival_s, model[, location])``."""
    models = tuple(sorted({request[1] for request in requests}))
    return Trace(
        name="test",
        models=models,
        locations=tuple(f"loc{number}" for number in range(locations)),
        arrival_s=array("d", [request[0] for request in requests]),
        model=array("I", [models.index(request[1]) for request in requests]),
        source=array("I", [0] * len(requests)),
        location=array("I", [request[2] if len(request) > 2 else 0 for request in requests]),
    )


class Caches:
    """Makes caches, and keeps them to be looked at."""

    def __init__(self, capacity: int | Mapping[int, int] = 100, policy: str = "lru", **arguments: Any) -> None:
        self.made: list[ModelCache] = []
        self._capacity, self._policy, self._arguments = capacity, policy, arguments

    def __call__(self, number: int) -> ModelCache:
        capacity = self._capacity if isinstance(self._capacity, int) else self._capacity[number]
        policy = make_policy(self._policy, random.Random(number))
        self.made.append(ModelCache(capacity_bytes=capacity, policy=policy, **self._arguments))
        return self.made[-1]


def simulate(
    requests: Trace,
    caches: Callable[[int], ModelCache] | None = None,
    profiles: Iterable[ModelProfile] | None = None,
    **options: Any,
) -> DiscreteEventResults:
    models = {model.model_id: model for model in profiles or ()}
    of_trace = [models.get(model_id) or profile(model_id) for model_id in requests.models]
    chosen = {"coordination": "none", "exec_slots": 1, "default_link": NEAR, "coordinator_delay_s": 0.0} | options
    tally = simulate_discrete_event(requests, of_trace, DiscreteEventOptions(make_cache=caches or Caches(), **chosen))
    assert tally.requests == len(requests) == tally.hits + tally.misses + tally.joins + tally.forwards
    assert not any(math.isnan(latency) for latency in tally.latencies)
    return tally


def counts(tally: DiscreteEventResults) -> tuple[int, int, int, int]:
    return tally.hits, tally.misses, tally.joins, tally.forwards


# One location


def test_a_miss_takes_a_load_and_a_hit_does_not() -> None:
    tally = simulate(trace((0.0, A), (10.0, A)))
    assert list(tally.latencies) == pytest.approx([1.1, 0.1])
    assert (counts(tally), tally.load_s, tally.exec_s) == ((1, 1, 0, 0), 1.0, pytest.approx(0.2))


def test_requests_for_a_model_that_loads_join_the_one_load() -> None:
    caches = Caches()
    tally = simulate(trace(*[(5.0, A)] * 20), caches, exec_slots=20)
    assert counts(tally) == (0, 1, 19, 0)
    assert caches.made[0].counters.loads == 1
    assert list(tally.latencies) == pytest.approx([1.1] * 20)
    assert tally.load_s == pytest.approx(20.0)


def test_executions_queue_for_their_slots_in_order() -> None:
    # Loaded until 1.0; then two slots of 0.1 s: 1.0-1.1 and 1.02-1.12 are taken, so the next two begin at 1.1 and 1.12.
    tally = simulate(trace((0.0, A), (1.02, A), (1.04, A), (1.05, A), (1.5, A)), exec_slots=2)
    assert list(tally.latencies) == pytest.approx([1.1, 0.1, 0.16, 0.17, 0.1])
    assert tally.queue_s == pytest.approx(0.06 + 0.07)


def test_one_slot_serves_a_steady_overload_ever_later() -> None:
    warm, steady = (0.0, A), [(2.0 + 0.05 * number, A) for number in range(40)]
    tally = simulate(trace(warm, *steady))
    assert list(tally.latencies)[1:] == pytest.approx([0.1 + 0.05 * number for number in range(40)])


def test_no_more_loads_at_a_time_than_allowed() -> None:
    tally = simulate(trace((0.0, A), (0.0, B), (0.0, C)), Caches(max_loads=2), exec_slots=9)
    assert list(tally.latencies) == pytest.approx([1.1, 1.1, 2.1])
    assert (tally.load_s, tally.queue_s) == pytest.approx((3.0, 1.0))


def test_a_request_waits_for_memory_that_is_in_use() -> None:
    tally = simulate(trace((0.0, A), (0.5, B)), Caches(10))
    # B's load can begin when A has been loaded and run, at 1.1.
    assert list(tally.latencies) == pytest.approx([1.1, 1.7])
    assert tally.evictions == 1


def test_what_fits_nowhere_is_rejected_and_charged_a_load_and_an_execution() -> None:
    tally = simulate(trace((0.0, A)), Caches(9))
    assert (counts(tally), tally.rejected, list(tally.latencies)) == ((0, 1, 0, 0), 1, pytest.approx([1.1]))


def test_too_long_a_line_is_rejected() -> None:
    tally = simulate(trace((0.0, A), (0.0, B), (0.0, C)), Caches(10, max_waiting=1))
    assert (tally.rejected, tally.misses) == (1, 3)


@pytest.mark.parametrize("policy", ["lru", "gdsf", "lfu", "fifo"])
@pytest.mark.parametrize("coordination", ["none", "full"])
def test_far_apart_requests_meet_what_the_load_delay_model_says(policy: str, coordination: str) -> None:
    drawn = parse_trace("zipf:models=30&requests=1500&rate=0.01", seed=3)
    profiles = [profile(name, 5 + number % 7, load_s=1.0 + number % 3) for number, name in enumerate(drawn.models)]
    # Less than a load and an execution apart, requests would join where the other model of time lets them hit.
    times = array("d", [5.0 * number for number in range(len(drawn))])
    spaced = Trace(name="spaced", models=drawn.models, arrival_s=times, model=drawn.model, source=drawn.source)
    expected = replay(spaced, profiles, Caches(60, policy))
    # No copy is ever worth its load: placement keeps still.
    still = PlacementRules(payback_s=1e-9)
    tally = simulate(spaced, Caches(60, policy), profiles, exec_slots=99, coordination=coordination, placement=still)
    assert counts(tally) == (expected.hits, expected.misses, 0, 0)
    assert (tally.evictions, tally.load_s) == (expected.evictions, pytest.approx(expected.load_s))
    assert sum(tally.latencies) == pytest.approx(tally.load_s + tally.exec_s)


# Several locations


def test_without_coordination_locations_know_nothing_of_each_other() -> None:
    tally = simulate(trace((0.0, A, 0), (10.0, A, 1), locations=2))
    assert (counts(tally), tally.load_s) == ((0, 2, 0, 0), 2.0)


@pytest.mark.parametrize(
    ("rtt_s", "expected", "latency_s"), [(0.02, (0, 1, 0, 1), 0.12), (0.9, (0, 1, 0, 1), 1.0), (1.2, (0, 2, 0, 0), 1.1)]
)
def test_a_request_is_forwarded_if_the_way_is_shorter_than_the_load(
    rtt_s: float, expected: tuple[int, ...], latency_s: float
) -> None:
    link = Link(rtt_s=rtt_s, bytes_per_s=math.inf)
    tally = simulate(trace((1.0, A, 0), (10.0, A, 1), locations=2), coordination="forwarding", default_link=link)
    assert (counts(tally), tally.latencies[1]) == (expected, pytest.approx(latency_s))


def test_the_payload_travels_too() -> None:
    link = Link(rtt_s=0.02, bytes_per_s=1000.0)
    requests = trace((1.0, A, 0), (10.0, A, 1), locations=2)
    tally = simulate(requests, coordination="forwarding", default_link=link, payload_bytes=300)
    assert (tally.latencies[1], tally.link_s) == pytest.approx((0.42, 0.32))


@pytest.mark.parametrize(("arrival_s", "forwarded"), [(2.02, 0), (2.36, 0), (2.40, 1)])
def test_a_location_learns_of_a_load_elsewhere_only_when_its_view_has_come(arrival_s: float, forwarded: int) -> None:
    # The request of 2.01 is in the report of 2.25, which is in the views asked for at 2.375.
    requests = trace((2.01, A, 0), (arrival_s, A, 1), locations=2)
    slow = [profile(A, load_s=10.0)]
    assert simulate(requests, None, slow, coordination="forwarding").forwards == forwarded


@pytest.mark.parametrize(("arrival_s", "forwarded"), [(2.56, 0), (2.58, 1)])
def test_the_way_to_the_coordinator_and_back_makes_news_older(arrival_s: float, forwarded: int) -> None:
    requests = trace((2.01, A, 0), (arrival_s, A, 1), locations=2)
    slow = [profile(A, load_s=10.0)]
    tally = simulate(requests, None, slow, coordination="forwarding", coordinator_delay_s=0.1)
    assert tally.forwards == forwarded


def test_a_stale_hint_costs_one_retry_and_never_the_request() -> None:
    # A leaves location 0 for B at 10.01; location 1 has not heard of that at 10.02.
    requests = trace((1.0, A, 0), (10.01, B, 0), (10.02, A, 1), locations=2)
    tally = simulate(requests, Caches(10), coordination="forwarding")
    assert (counts(tally), tally.stale_retries) == ((0, 3, 0, 0), 1)
    assert tally.latencies[2] == pytest.approx(0.02 + 1.1)


def test_a_model_too_large_for_its_location_runs_at_another() -> None:
    requests = trace((1.0, A, 0), (10.0, A, 0), locations=2)
    tally = simulate(requests, Caches({0: 9, 1: 10}), coordination="forwarding")
    assert (counts(tally), tally.rejected) == ((0, 0, 0, 2), 0)
    assert list(tally.latencies) == pytest.approx([1.12, 0.12])


def test_locations_evict_a_duplicate_before_a_last_copy() -> None:
    # A is at both locations, loaded before either knew of the other; B is at one alone. A was asked for more. Of A's
    # holders, one keeps it; the other one is looked at.
    here, there = sorted(range(2), key=lambda number: -rendezvous_rank(A, f"loc{number}#0"))
    requests = trace(
        (1.0, A, here), (1.0, A, there), (5.0, B, here), (10.0, A, here), (20.0, C, here), (30.0, B, here), locations=2
    )
    options = {"coordination": "forwarding", "horizon_s": 1e4}
    coordinated = simulate(requests, Caches(20, "edgeserve", max_preloads=0), **options)
    assert coordinated.latencies[5] == pytest.approx(0.1)
    assert coordinated.evictions == 1


def test_placement_brings_a_popular_model_closer() -> None:
    steady = [(10.0 + 0.5 * number, A, 1) for number in range(200)]
    requests = trace((1.0, A, 0), *steady, locations=2)
    rules = PlacementRules(share_per_round=1.0, payback_s=1e6)
    tallies = {
        mode: simulate(requests, coordination=mode, placement=rules, horizon_s=0.0) for mode in ("forwarding", "full")
    }
    assert counts(tallies["forwarding"]) == (0, 1, 0, 200)
    assert (tallies["full"].preloads, tallies["full"].preload_s, tallies["full"].preload_bytes) == (1, 1.0, 10)
    assert tallies["full"].forwards < 30
    assert tallies["full"].mean_latency_s < tallies["forwarding"].mean_latency_s


# Loads that a router orders


class Sink:
    """A router that takes results and does nothing with them."""

    name = "here"

    def replied(self, job: Job, now: float) -> None:
        """Take it."""


def lone_worker(*models: ModelProfile, capacity: int) -> tuple[SimulatedWorker, EventQueue, DiscreteEventResults]:
    events, results = EventQueue(), DiscreteEventResults()
    worker = SimulatedWorker(
        location="here",
        cache=Caches(capacity)(0),
        report_rows=report_rows(models),
        rules=RoutingRules(profiles={}, links={}, default_link=NEAR, horizon_s=0.0),
        exec_slots=1,
        event_queue=events,
        results=results,
        changed=lambda worker, now: None,
    )
    return worker, events, results


def held(worker: SimulatedWorker) -> list[tuple[str, ModelState, int]]:
    return [(model.model_id, model.state, model.uses) for model in worker.cache.models()]


def test_a_load_that_a_router_orders_waits_for_memory_as_a_request_does() -> None:
    a, b = profile(A), profile(B)
    worker, events, results = lone_worker(a, b, capacity=10)
    worker.take(Job(0, b, Sink(), 0.0), 0.0)
    worker.preload(a, 0.5)
    assert (worker.cache.waiting, results.preload_s) == (1, 0.0)
    # B has been loaded at 1.0 and run at 1.1; A's load begins then.
    events.run_until(1.5)
    assert (held(worker), worker.cache.waiting, results.preload_s) == ([(A, ModelState.LOADING, 1)], 0, 1.0)
    events.run_until(2.2)
    assert held(worker) == [(A, ModelState.READY, 0)]


def test_orders_for_a_load_that_is_under_way_add_nothing() -> None:
    a = profile(A)
    worker, events, results = lone_worker(a, capacity=10)
    for now in (0.0, 0.5, 1.5):
        events.run_until(now)
        worker.preload(a, now)
    events.run_until(2.0)
    assert (held(worker), results.preload_s) == ([(A, ModelState.READY, 0)], 1.0)


# Everything at once


def busy(locations: int, seed: int = 0) -> tuple[Trace, list[ModelProfile]]:
    drawn = split(parse_trace("zipf:models=40&requests=3000&rate=15", seed=seed), locations, seed=seed, skew=0.5)
    rng = random.Random(seed)
    return drawn, [
        profile(name, rng.randint(1, 20), load_s=rng.uniform(0.1, 2.0), exec_s=rng.uniform(0.01, 0.1))
        for name in drawn.models
    ]


@pytest.mark.parametrize("policy", ["lru", "gdsf", "edgeserve"])
@pytest.mark.parametrize("coordination", ["none", "forwarding", "full"])
def test_every_request_is_answered_once_and_the_books_balance(policy: str, coordination: str) -> None:
    requests, profiles = busy(4)
    caches = Caches(60, policy, max_waiting=5)
    options = {"coordination": coordination, "exec_slots": 2, "links": geographic_links(requests.locations, seed=1)}
    rules = PlacementRules(payback_s=1e6, share_per_round=0.5)
    tally = simulate(requests, caches, profiles, placement=rules, **options)
    counted = [cache.counters for cache in caches.made]
    for cache in caches.made:
        held = cache.models()
        assert cache.used_bytes == sum(model.size_bytes for model in held) <= cache.capacity_bytes
        assert not cache.waiting
        gone = cache.counters.evictions + cache.counters.unloads
        assert cache.counters.loads + cache.counters.preloads - gone == len(held)
        assert sum(model.uses for model in held) == 0
    assert tally.preloads == sum(counters.preloads for counters in counted)
    assert tally.hits + tally.joins + tally.misses + tally.forwards == len(requests)
    assert min(tally.latencies) >= min(model.exec_s for model in profiles) - 1e-9
    # A latency is made of nothing but these.
    parts = tally.load_s + tally.queue_s + tally.link_s + tally.exec_s
    assert sum(tally.latencies) == pytest.approx(parts)


def test_the_same_seed_gives_the_same_tally_and_another_does_not() -> None:
    def once(seed: int) -> DiscreteEventResults:
        requests, profiles = busy(4, seed)
        links = geographic_links(requests.locations, seed=seed)
        return simulate(requests, Caches(60, "random"), profiles, coordination="full", links=links)

    assert once(0) == once(0)
    assert once(0) != once(1)


def test_coordination_saves_loads() -> None:
    requests, profiles = busy(4)
    tallies = [simulate(requests, Caches(60, "gdsf"), profiles, coordination=mode) for mode in ("none", "forwarding")]
    assert tallies[1].load_over_exec < 0.5 * tallies[0].load_over_exec


def test_progress_adds_up() -> None:
    requests, profiles = busy(2)
    told: list[int] = []
    simulate_discrete_event(requests, profiles, DiscreteEventOptions(make_cache=Caches()), told.append)
    assert sum(told) == len(requests)


def test_an_empty_trace_is_no_trouble() -> None:
    tally = simulate(trace(), coordination="full")
    assert (tally.load_over_exec, tally.mean_latency_s, tally.latency_s(0.99)) == (0.0, 0.0, 0.0)


# Parts


def test_links_grow_with_distance_between_their_bounds() -> None:
    names = [f"loc{number}" for number in range(16)]
    links = geographic_links(names, seed=0)
    assert len(links) == 16 * 15 // 2
    rtts = [link.rtt_s for link in links.values()]
    assert min(rtts) >= 0.005
    assert max(rtts) == pytest.approx(0.080)
    assert links == geographic_links(names, seed=0) != geographic_links(names, seed=1)
    assert geographic_links(["alone"], seed=0) == {}


def test_lazy_rates_are_those_of_the_coordinator_as_of_the_moment_they_were_given() -> None:
    lazy, eager, rng = LaggedPopularity(60.0), Popularity(60.0), random.Random(0)
    given = []
    for now in range(100):
        location, model_id = rng.choice(["oslo", "paris"]), rng.choice("abcd")
        lazy.add(location, model_id, 2, float(now))
        eager.add(location, model_id, 2, float(now))
        given.append((lazy.rates(float(now)), eager.rates(float(now))))
    for rates, expected in given:
        assert {location: dict(known) for location, known in rates.items()} == expected
        assert rates["oslo"].get("z", 0.0) == 0.0 if "oslo" in rates else True


@pytest.mark.parametrize("wrong", [{"report_every_s": 0.0}, {"payload_bytes": -1}, {"exec_slots": 0}])
def test_options_are_checked_at_birth(wrong: Mapping[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        DiscreteEventOptions(make_cache=Caches(), **wrong)


# No herd


@pytest.mark.parametrize("load_s", [0.05, 1.0])
@pytest.mark.parametrize("asked_at", ["one", "all in turn", "any"])
@pytest.mark.parametrize("locations", [2, 3, 4, 8])
def test_cold_requests_that_come_together_are_spread(locations: int, asked_at: str, load_s: float) -> None:
    rng = random.Random(1)
    at = {
        "one": lambda _: 0,
        "all in turn": lambda number: number % locations,
        "any": lambda _: rng.randrange(locations),
    }
    caches = Caches(capacity=1000, max_loads=2)
    known = [(0.0, f"warm{number}", number) for number in range(locations)]
    cold = [(5.0, f"cold{number:02}", at[asked_at](number)) for number in range(50)]
    requests = trace(*known, *cold, locations=locations)
    models = [profile(model_id, load_s=load_s) for model_id in requests.models]
    simulate(requests, caches, models, coordination="forwarding", exec_slots=2)
    loads = [cache.counters.loads - 1 for cache in caches.made]
    assert sum(loads) == 50
    assert max(loads) <= 1.5 * 50 / locations, loads
