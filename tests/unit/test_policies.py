"""Every policy keeps the contract of ``EvictionPolicy``, and each ranks as its definition says."""

from __future__ import annotations

import math
import pickle
import random
from collections import Counter
from collections.abc import Iterable

import pytest
from core_support import profile

from serve_app.core.cache import Hit, Load, ModelCache
from serve_app.core.catalog import ModelProfile
from serve_app.core.eviction_policy import EvictionPolicy
from serve_app.core.policies import POLICIES, make_policy, policy_parameters

A = profile("a", 10, load_s=1.0)
B = profile("b", 20, load_s=4.0)
C = profile("c", 50, load_s=1.0)
MODELS = [A, B, C, *(profile(f"m{i}", 5 + 7 * i, load_s=0.1 * i) for i in range(7))]
EVERY_POLICY = pytest.mark.parametrize("name", POLICIES)


def fresh(name: str, seed: int = 0, **parameters: float) -> EvictionPolicy:
    return make_policy(name, random.Random(seed), **parameters)


def play(policy: EvictionPolicy, events: int, seed: int = 1) -> list[float]:
    """A random but repeatable life of a policy; the utilities that it named on the way."""
    rng = random.Random(seed)
    now, held, named = 0.0, set[str](), list[float]()
    for _ in range(events):
        now += rng.expovariate(1.0)
        model = MODELS[min(rng.randrange(10), rng.randrange(10))]
        policy.on_request(model, now)
        if model.model_id not in held:
            policy.on_load(model, now)
            held.add(model.model_id)
        if len(held) > 4:
            ranked = {m.model_id: policy.utility(m, now) for m in MODELS if m.model_id in held}
            named += ranked.values()
            victim = min(ranked, key=lambda model_id: ranked[model_id])
            leave = policy.on_unload if rng.random() < 0.2 else policy.on_evict
            leave(next(m for m in MODELS if m.model_id == victim), now)
            held.remove(victim)
        if rng.random() < 0.1:
            policy.on_forward_costs({m.model_id: rng.random() for m in MODELS if rng.random() < 0.5})
    return named


def first_to_go(policy: EvictionPolicy, models: Iterable[ModelProfile], now: float) -> str:
    return eviction_order(policy, models, now)[0]


def eviction_order(policy: EvictionPolicy, models: Iterable[ModelProfile], now: float) -> str:
    return "".join(model.model_id for model in sorted(models, key=lambda model: policy.utility(model, now)))


def request(policy: EvictionPolicy, models: str, now: float = 0.0) -> None:
    """One request per letter, all at ``now``."""
    for model_id in models:
        policy.on_request({"a": A, "b": B, "c": C}[model_id], now)


# The contract


@EVERY_POLICY
def test_a_fresh_policy_ranks_models_that_it_has_never_heard_of(name: str) -> None:
    assert all(math.isfinite(fresh(name).utility(model, 0.0)) for model in MODELS)


@EVERY_POLICY
def test_every_hook_may_come_first(name: str) -> None:
    for first in ("on_request", "on_load", "on_evict", "on_unload"):
        policy = fresh(name)
        getattr(policy, first)(A, 1.0)
        policy.on_forward_costs({"a": 0.5})
        assert math.isfinite(policy.utility(A, 2.0))


@EVERY_POLICY
def test_utilities_stay_finite_numbers(name: str) -> None:
    named = play(fresh(name), 2000)
    assert len(named) > 1000
    assert all(isinstance(utility, int | float) and math.isfinite(utility) for utility in named)


@EVERY_POLICY
def test_utilities_stay_finite_after_years_of_silence(name: str) -> None:
    policy = fresh(name)
    play(policy, 100)
    assert all(math.isfinite(policy.utility(model, 1e9)) for model in MODELS)


@EVERY_POLICY
def test_a_model_without_size_to_speak_of_or_load_time_can_be_ranked(name: str) -> None:
    policy, tiny = fresh(name), profile("tiny", 1, load_s=0.0)
    policy.on_request(tiny, 0.0)
    policy.on_load(tiny, 0.0)
    assert math.isfinite(policy.utility(tiny, 0.0))


@EVERY_POLICY
def test_the_same_seed_and_events_give_the_same_utilities(name: str) -> None:
    assert play(fresh(name, seed=3), 500) == play(fresh(name, seed=3), 500)


@EVERY_POLICY
def test_two_policies_share_nothing(name: str) -> None:
    alone = play(fresh(name), 200)
    other, policy = fresh(name, seed=9), fresh(name)
    play(other, 300, seed=2)
    assert play(policy, 200) == alone


@pytest.mark.parametrize("name", sorted(POLICIES.keys() - {"random"}))
def test_asking_for_utilities_changes_no_ranking(name: str) -> None:
    """But for chance itself, which is drawn anew each time."""
    asked, silent = fresh(name), fresh(name)
    for now, model in enumerate([A, B, A, C, B, A]):
        for policy in (asked, silent):
            policy.on_request(model, now)
            policy.on_load(model, now)
        for other in MODELS:
            asked.utility(other, now)
    assert [asked.utility(model, 9.0) for model in MODELS] == [silent.utility(model, 9.0) for model in MODELS]


@EVERY_POLICY
def test_a_model_that_was_evicted_can_come_back(name: str) -> None:
    cache = ModelCache(capacity_bytes=50, policy=fresh(name))
    for now, (model, answer) in enumerate([(A, Load(())), (C, Load(("a",))), (A, Load(("c",))), (A, Hit())]):
        assert cache.request(model, now) == answer
        if isinstance(answer, Load):
            cache.loaded(model.model_id, now)
        cache.finish(model.model_id, now)
    assert cache.used_bytes == 10


@pytest.mark.parametrize("name", ["gdsf", "random"])
@pytest.mark.parametrize("leave", ["on_evict", "on_unload"])
def test_policies_that_forget_do_not_grow_with_the_models_that_have_left(name: str, leave: str) -> None:
    def weight_after(models: int) -> int:
        policy = fresh(name)
        for i in range(models):
            model = profile(f"model-{i:06}")
            policy.on_request(model, i)
            policy.on_load(model, i)
            getattr(policy, leave)(model, i)
        return len(pickle.dumps(policy))

    assert weight_after(1000) <= weight_after(1) + 64


@EVERY_POLICY
def test_no_policy_grows_with_the_number_of_requests(name: str) -> None:
    few, many = fresh(name), fresh(name)
    play(few, 300)
    play(many, 3000)
    assert len(pickle.dumps(many)) <= len(pickle.dumps(few)) + 200


# Names and parameters


def test_an_unknown_policy_is_refused_with_the_names_that_exist() -> None:
    with pytest.raises(ValueError, match=r"unknown policy 'lifo'; there are .*edgeserve"):
        fresh("lifo")


def test_an_unknown_parameter_is_refused_with_those_that_exist() -> None:
    with pytest.raises(ValueError, match="'edgeserve' does not take colour_s; it takes half_life_s"):
        fresh("edgeserve", colour_s=1.0)
    with pytest.raises(ValueError, match="'lru' does not take half_life_s; it takes no parameters"):
        fresh("lru", half_life_s=1.0)


def test_a_policy_says_which_parameters_it_takes() -> None:
    assert policy_parameters("edgeserve") == ("half_life_s",)
    assert policy_parameters("lru") == ()


@pytest.mark.parametrize("half_life_s", [0.0, -1.0])
def test_a_half_life_that_is_none_is_refused_at_birth(half_life_s: float) -> None:
    with pytest.raises(ValueError, match="half_life_s must be positive"):
        fresh("edgeserve", half_life_s=half_life_s)


# What each is


def test_lru_evicts_the_model_whose_last_request_lies_furthest_back() -> None:
    policy = fresh("lru")
    request(policy, "abcab")
    assert eviction_order(policy, [A, B, C], 0.0) == "cab"


def test_lru_ranks_requests_of_the_same_instant_by_their_order() -> None:
    policy = fresh("lru")
    request(policy, "cba", now=7.0)
    assert eviction_order(policy, [A, B, C], 7.0) == "cba"


def test_lfu_evicts_the_model_with_the_fewest_requests_ever() -> None:
    policy = fresh("lfu")
    request(policy, "aaabbc")
    assert eviction_order(policy, [A, B, C], 0.0) == "cba"
    policy.on_evict(A, 0.0)
    assert eviction_order(policy, [A, B, C], 0.0) == "cba"


def test_gdsf_ranks_by_frequency_times_load_time_over_size() -> None:
    policy = fresh("gdsf")
    request(policy, "aabcc")
    # a: 2 x 1/10 = 0.2; b: 1 x 4/20 = 0.2; c: 2 x 1/50 = 0.04
    assert [policy.utility(model, 0.0) for model in (A, B, C)] == pytest.approx([0.2, 0.2, 0.04])
    request(policy, "b")
    assert eviction_order(policy, [A, B, C], 0.0) == "cab"


def test_gdsf_ages_by_the_utility_of_the_last_victim() -> None:
    policy = fresh("gdsf")
    request(policy, "aabc")
    policy.on_evict(B, 0.0)
    # From now on a request is worth 0.2, b's utility, more than before: c overtakes a, which is not asked for again.
    request(policy, "c")
    assert policy.utility(A, 0.0) == pytest.approx(0.2)
    assert policy.utility(C, 0.0) == pytest.approx(0.2 + 2 / 50)
    request(policy, "b")
    assert policy.utility(B, 0.0) == pytest.approx(0.2 + 4 / 20)


def test_gdsf_does_not_age_when_a_load_fails() -> None:
    policy = fresh("gdsf")
    request(policy, "abbb")
    policy.on_unload(B, 0.0)
    request(policy, "a")
    assert policy.utility(A, 0.0) == pytest.approx(2 / 10)
    request(policy, "b")
    assert policy.utility(B, 0.0) == pytest.approx(4 / 20)


def test_random_gives_each_model_the_same_chance() -> None:
    policy = fresh("random")
    lots = Counter(first_to_go(policy, [A, B, C], 0.0) for _ in range(3000))
    assert all(900 < lots[model_id] < 1100 for model_id in "abc")


def test_random_draws_from_the_generator_it_is_given() -> None:
    assert [fresh("random", seed).utility(A, 0.0) for seed in (1, 2)] == [
        random.Random(seed).random() for seed in (1, 2)
    ]


def test_belady_am_online_ranks_by_share_of_requests_times_load_time_over_size() -> None:
    policy = fresh("belady-am-online")
    request(policy, "aaabcccc")
    # a: 3 x 1/10 = 0.3; b: 1 x 4/20 = 0.2; c: 4 x 1/50 = 0.08
    assert eviction_order(policy, [A, B, C], 0.0) == "cba"
    request(policy, "b")
    assert eviction_order(policy, [A, B, C], 0.0) == "cab"


def test_belady_am_online_counts_requests_from_the_very_beginning() -> None:
    policy = fresh("belady-am-online")
    request(policy, "aaabb", now=0.0)
    policy.on_evict(A, 1.0)
    request(policy, "a", now=1e6)
    # a: 4 x 1/10 = 0.4; b: 2 x 4/20 = 0.4 and then 0.6
    assert policy.utility(A, 1e6) == policy.utility(B, 1e6)
    request(policy, "b", now=1e6)
    assert eviction_order(policy, [B, A], 1e6) == "ab"


def test_edgeserve_ranks_by_rate_times_load_time_over_size() -> None:
    policy = fresh("edgeserve")
    request(policy, "aabccc")
    # per request: a 1/10, b 4/20, c 1/50
    assert eviction_order(policy, [B, C], 0.0) == "cb"
    assert policy.utility(A, 0.0) == pytest.approx(policy.utility(B, 0.0))
    assert policy.utility(C, 0.0) / policy.utility(A, 0.0) == pytest.approx((3 / 50) / (2 / 10))


def test_edgeserve_forgets_by_half_in_every_half_life() -> None:
    policy = fresh("edgeserve", half_life_s=60.0)
    request(policy, "aaa", now=0.0)
    request(policy, "b", now=60.0)
    # Two half-lives later three old requests for a are worth 3/4, the one for b 1/2.
    assert policy.utility(A, 120.0) / policy.utility(B, 120.0) == pytest.approx((0.75 * 1 / 10) / (0.5 * 4 / 20))
    assert eviction_order(policy, [B, A], 120.0) == "ab"


def test_edgeserve_loses_at_most_the_forward_to_the_next_holder() -> None:
    policy = fresh("edgeserve")
    request(policy, "ab")
    alone = policy.utility(A, 0.0)
    policy.on_forward_costs({"a": 0.25, "b": 9.0})
    assert policy.utility(A, 0.0) == pytest.approx(alone / 4)
    assert policy.utility(B, 0.0) == pytest.approx(2 * alone)
    policy.on_forward_costs({})
    assert policy.utility(A, 0.0) == pytest.approx(alone)


def test_edgeserve_evicts_duplicates_before_last_copies() -> None:
    policy = fresh("edgeserve")
    request(policy, "aaaaac")
    assert first_to_go(policy, [A, C], 0.0) == "c"
    policy.on_forward_costs({"a": 0.002})
    assert first_to_go(policy, [A, C], 0.0) == "a"
