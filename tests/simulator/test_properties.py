"""What holds of every replay in the load-delay model, whatever the policy and the stream."""

from __future__ import annotations

import math
import random
from array import array
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from simulator_support import workload

from serve_app.core.cache.decisions import Action, Answer, Hit, Join, Load, Reject, StartLoad, Wait
from serve_app.core.cache.events import Event
from serve_app.core.cache.model_cache import ModelCache
from serve_app.core.catalog import ModelProfile
from serve_app.simulator import scenario
from serve_app.simulator.load_delay import LoadDelayResults, replay
from serve_app.simulator.oracles import Belady, next_uses
from serve_app.simulator.result_row import ResultRow
from serve_app.simulator.runner import MAX_PRELOADS, ExperimentPlan, ReplaySpec, run
from serve_app.simulator.scenario import ALL_POLICIES, Capacity, Workload, cache_maker, parse_policies

EVERY_POLICY = pytest.mark.parametrize("policy", ALL_POLICIES)
#: Letters by popularity, and a stream short enough to be looked at when something goes wrong.
STREAMS = st.text(alphabet="aaaabbbccdefgh", min_size=1, max_size=120)


def random_workload(seed: int, *, equal_sizes: bool = False, requests: int = 600) -> Workload:
    """Popular and rare models, timers and pauses; sizes, load times and gaps differ."""
    rng = random.Random(seed)
    letters = "".join(rng.choice("aaaaaabbbbbcccddddeefghijklmnop") for _ in range(requests))
    letters = "".join("t" if position % 9 == 0 else letter for position, letter in enumerate(letters))
    stream = workload(letters)
    gaps = [rng.choice((0.0, 0.5, 3.0, 30.0, 600.0)) * rng.random() for _ in range(requests)]
    arrivals = array("d", [sum(gaps[: position + 1]) for position in range(requests)])
    profiles = tuple(
        replace(
            profile,
            size_bytes=10 if equal_sizes else rng.randint(1, 30),
            load_s=rng.choice((0.25, 1.0, 4.0)),
        )
        for profile in stream.profiles
    )
    return Workload(trace=replace(stream.trace, arrival_s=arrivals), profiles=profiles, seed=seed)


@pytest.mark.parametrize("seed", range(2))
def test_a_background_that_cannot_keep_up_does_not_make_edgeserve_worse_than_none(seed: int) -> None:
    """Loads take so long that what the policy lets go, because it is not due yet, cannot be fetched in time."""
    stream = scenario.make_workload(trace="azure-like:functions=300&minutes=120&rate_cap=30", seed=seed)
    slow = tuple(replace(profile, load_s=5 + number % 60) for number, profile in enumerate(stream.profiles))
    stream = Workload(trace=stream.trace, profiles=slow, seed=seed)
    all_bytes = sum(profile.size_bytes for profile in slow)

    def load_s(max_preloads: int) -> float:
        choice = parse_policies(["edgeserve"])[0]
        make = cache_maker(stream, choice, capacity_bytes=all_bytes // 3, max_preloads=max_preloads)
        return replay(stream.trace, stream.profiles, make).load_s

    assert load_s(max_preloads=1) < load_s(max_preloads=0)


class Watched(ModelCache):
    """Records its answers, the greatest memory in use, and every time that it received."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.answers: list[tuple[Answer | Wait, ModelProfile]] = []
        self.most_bytes = 0
        #: Of the last preload of each model.
        self.began_s: dict[str, float] = {}
        self.times_s: list[float] = []

    def request(self, model: ModelProfile, now: float) -> Answer | Wait:
        answer = super().request(model, now)
        self.answers.append((answer, model))
        self._note(now)
        return answer

    def handle(self, event: Event, now: float) -> tuple[Action, ...]:
        actions = super().handle(event, now)
        for action in actions:
            if isinstance(action, StartLoad):
                self.began_s[action.model.model_id] = now
        self._note(now)
        return actions

    def _note(self, now: float) -> None:
        self.most_bytes = max(self.most_bytes, self.used_bytes)
        self.times_s.append(now)


def watched(
    stream: Workload, policy: str, capacity_bytes: int, *, max_preloads: int
) -> tuple[LoadDelayResults, Watched]:
    """A replay, and the cache that it went through."""
    made: list[Watched] = []

    def make(**arguments: Any) -> Watched:
        made.append(Watched(**arguments))
        return made[-1]

    results = play(stream, policy, capacity_bytes, max_preloads=max_preloads, cache_class=make)
    (cache,) = made
    return results, cache


def play(
    stream: Workload,
    policy: str,
    capacity_bytes: int,
    *,
    max_preloads: int = MAX_PRELOADS,
    cache_class: Callable[..., ModelCache] = ModelCache,
) -> LoadDelayResults:
    (choice,) = parse_policies([policy])
    make = cache_maker(
        stream, choice, capacity_bytes=capacity_bytes, max_preloads=max_preloads, cache_class=cache_class
    )
    return replay(stream.trace, stream.profiles, make)


def misses_of_belady(stream: Workload, capacity_bytes: int) -> int:
    return play(stream, "belady", capacity_bytes).misses


# Belady


@EVERY_POLICY
@given(letters=STREAMS, places=st.integers(1, 6))
@settings(max_examples=30, deadline=None, derandomize=True)
def test_with_models_of_one_size_no_policy_that_only_evicts_misses_less_than_belady(
    policy: str, letters: str, places: int
) -> None:
    """Without preloads: a policy that loads before a request may do better."""
    stream = workload(letters)
    assert play(stream, policy, 10 * places, max_preloads=0).misses >= misses_of_belady(stream, 10 * places)


@EVERY_POLICY
@pytest.mark.parametrize("seed", range(3))
def test_belady_is_not_beaten_on_long_streams_either(policy: str, seed: int) -> None:
    stream = random_workload(seed, equal_sizes=True)
    for capacity in (10, 40, 90):
        assert play(stream, policy, capacity, max_preloads=0).misses >= misses_of_belady(stream, capacity)


@given(letters=st.text(alphabet="abcde", min_size=1, max_size=9), places=st.integers(1, 3))
@settings(max_examples=50, deadline=None, derandomize=True)
def test_belady_is_as_good_as_the_best_of_all_eviction_orders(letters: str, places: int) -> None:
    def least_misses(held: frozenset[str], position: int) -> int:
        if position == len(letters):
            return 0
        letter = letters[position]
        if letter in held:
            return least_misses(held, position + 1)
        if len(held) < places:
            return 1 + least_misses(held | {letter}, position + 1)
        return 1 + min(least_misses(held - {victim} | {letter}, position + 1) for victim in held)

    assert misses_of_belady(workload(letters), 10 * places) == least_misses(frozenset(), 0)


# More memory


@given(letters=STREAMS)
@settings(max_examples=50, deadline=None, derandomize=True)
def test_more_memory_never_hurts_lru_where_all_models_have_one_size(letters: str) -> None:
    """The smaller cache holds a part of what the larger one holds, at every moment."""
    misses = [play(workload(letters), "lru", capacity).misses for capacity in range(10, 100, 10)]
    assert misses == sorted(misses, reverse=True)


@given(letters=STREAMS, sizes=st.lists(st.integers(1, 30), min_size=8, max_size=8))
@settings(max_examples=50, deadline=None, derandomize=True)
def test_more_memory_never_hurts_lru_while_every_model_fits_into_the_smaller_one(
    letters: str, sizes: list[int]
) -> None:
    """Sizes in bytes change nothing: LRU holds the most recently requested models, as many of them as fit."""
    stream = workload(letters, sizes=dict(zip("abcdefgh", sizes, strict=True)))
    misses = [play(stream, "lru", capacity).misses for capacity in range(30, 200, 17)]
    assert misses == sorted(misses, reverse=True)


def test_more_memory_hurts_lru_when_it_lets_in_a_model_that_displaces_all_others() -> None:
    stream = workload("ab" * 10, sizes={"a": 10, "b": 20})
    assert play(stream, "lru", 10).misses == 11
    assert play(stream, "lru", 20).misses == 20


@EVERY_POLICY
def test_with_room_for_all_every_model_misses_at_most_once(policy: str) -> None:
    stream = random_workload(0)
    results = play(stream, policy, stream.total_bytes)
    assert results.evictions == 0
    assert results.misses + results.preloads <= len(stream.profiles)


# Sums


def rows(stream: Workload, *, capacity_share: float = 0.3, time: str = "load-delay") -> tuple[ResultRow, ...]:
    replays = tuple(
        ReplaySpec(policy=choice, capacity=Capacity(given_share=capacity_share)) for choice in parse_policies(["all"])
    )
    return run(ExperimentPlan(workloads=(stream,), replays=replays, time=time), jobs=1)  # type: ignore[arg-type]


@pytest.mark.parametrize("seed", range(2))
def test_the_same_seed_gives_the_same_rows_but_for_the_clock(seed: int) -> None:
    first, second = (
        [replace(row, wall_s=0.0, requests_per_s=0.0) for row in rows(random_workload(seed))] for _ in range(2)
    )
    assert first == second


@pytest.mark.parametrize("time", ["load-delay", "full"])
def test_every_request_is_a_hit_a_miss_a_join_or_a_forward(time: str) -> None:
    # In the full model of time what is larger than all memory cannot be answered at all.
    stream = random_workload(3, requests=300)
    for row in rows(stream, capacity_share=0.4, time=time):
        assert row.hits + row.misses + row.joins + row.forwards == row.requests == 300
        assert row.wasted_preloads <= row.preloads
        # In the full model of time others advise what to preload, whatever the policy.
        assert row.preloads == 0 or row.policy == "edgeserve" or time == "full"


@pytest.mark.parametrize(
    ("policy", "capacity", "max_preloads"),
    [
        *((policy, capacity, 1) for policy in ALL_POLICIES if policy != "edgeserve" for capacity in (15, 60, 150)),
        *(("edgeserve", capacity, most) for capacity in (15, 60, 150) for most in (0, 1, MAX_PRELOADS)),
    ],
)
@pytest.mark.parametrize("seed", range(2))
def test_seconds_waited_are_those_of_the_loads_and_of_what_joins_waited(
    policy: str, capacity: int, max_preloads: int, seed: int
) -> None:
    """Recounted from the answers of the cache alone."""
    results, cache = watched(random_workload(seed), policy, capacity, max_preloads=max_preloads)
    answers = cache.answers
    count = Counter(type(answer) for answer, _ in answers)
    # Who would have to wait for memory is turned away.
    turned_away = count[Reject] + count[Wait]
    assert (results.hits, results.misses) == (count[Hit], count[Load] + turned_away)
    assert (results.joins, results.rejected) == (count[Join], turned_away)
    missed_s = math.fsum(model.load_s for answer, model in answers if isinstance(answer, Load | Reject | Wait))
    if results.preloads:
        # A join waits for the rest, and so does a request whose preload had given way and is taken back.
        joined_s = math.fsum(model.load_s for answer, model in answers if isinstance(answer, Join))
        assert 0 <= results.load_s <= missed_s + joined_s + 1e-6
    else:
        assert results.load_s == pytest.approx(missed_s)
    assert results.exec_s == pytest.approx(math.fsum(model.exec_s for _, model in answers))
    assert len(results.waited_latency_s) == results.misses + results.joins
    waited_exec_s = math.fsum(model.exec_s for answer, model in answers if not isinstance(answer, Hit))
    assert math.fsum(results.waited_latency_s) == pytest.approx(results.load_s + waited_exec_s)
    if policy != "edgeserve":
        assert results.joins == results.preloads == results.preload_s == 0
    assert 0 < cache.most_bytes <= capacity
    assert cache.used_bytes == sum(model.size_bytes for model in cache.models())
    assert cache.times_s == sorted(cache.times_s)


def test_a_preload_is_joined_for_the_rest_of_its_time() -> None:
    """With room for all, so that nothing goes again, and loads that take longer than the pauses."""
    stream = random_workload(1)
    stream = replace(stream, profiles=tuple(replace(profile, load_s=500.0) for profile in stream.profiles))
    results, cache = watched(stream, "edgeserve", stream.total_bytes, max_preloads=MAX_PRELOADS)
    rests_s = [
        cache.began_s[model.model_id] + model.load_s - now
        for (answer, model), now in zip(cache.answers, stream.trace.arrival_s, strict=True)
        if isinstance(answer, Join)
    ]
    assert len(rests_s) == results.joins > 0
    assert all(0 <= rest_s <= 500.0 for rest_s in rests_s)
    assert results.load_s == pytest.approx(math.fsum(rests_s) + 500.0 * results.misses)
    assert results.preload_s == 500.0 * results.preloads


# The future


def test_next_uses_are_those_of_a_search() -> None:
    rng = random.Random(0)
    models = [rng.randrange(5) for _ in range(200)]
    for position, following in enumerate(next_uses(models)):
        later = [later for later in range(position + 1, 200) if models[later] == models[position]]
        assert following == (later[0] if later else math.inf)


def test_an_oracle_knows_as_many_requests_as_it_was_given() -> None:
    oracle, (profile,) = Belady(next_uses([0])), workload("a").profiles
    oracle.on_request(profile, 0.0)
    with pytest.raises(StopIteration):
        oracle.on_request(profile, 1.0)
