"""Every policy keeps the contract of ``EvictionPolicy``, and each ranks as its definition says."""

from __future__ import annotations

import math
import pickle
import random
from collections import Counter
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import replace

import pytest
from core_support import finish, load_ended, load_failed, profile, tick, unload

from serve_app.core.cache.decisions import Hit, Load
from serve_app.core.cache.events import ModelsKnown, RetryAllowed
from serve_app.core.cache.model_cache import ModelCache
from serve_app.core.catalog import ModelProfile
from serve_app.core.forms import surplus
from serve_app.core.policies.base import EvictionPolicy, PreloadVerdict
from serve_app.core.policies.registry import ORACLES, POLICIES, make_policy, policy_parameters

A = profile("a", 10, load_s=1.0)
B = profile("b", 20, load_s=4.0)
C = profile("c", 50, load_s=1.0)
#: As the first, but there is much to save.
SLOW = profile("a", 10, load_s=1.0, exec_s=10.0)
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
        if now >= policy.next_review_s:
            ask_for_preloads(policy, held, now)
        if len(held) > 4:
            # A lowered utility is named when the cache asks.
            assert set(policy.lowered(now)) <= {m.model_id for m in MODELS}
            ranked = {m.model_id: policy.utility(m, now) for m in MODELS if m.model_id in held}
            named += ranked.values()
            victim = min(ranked, key=lambda model_id: ranked[model_id])
            leave = policy.on_unload if rng.random() < 0.2 else policy.on_evict
            leave(next(m for m in MODELS if m.model_id == victim), now)
            held.remove(victim)
        if rng.random() < 0.1:
            policy.on_forward_costs({m.model_id: rng.random() for m in MODELS if rng.random() < 0.5})
    return named


def ask_for_preloads(policy: EvictionPolicy, held: set[str], now: float) -> None:
    """Ask for candidates, and decide on them, as a cache does that has no room."""
    candidates, verdict = policy.preload_candidates(now, 0), None
    with suppress(StopIteration):
        while True:
            model = candidates.send(verdict)
            assert model.model_id not in held, "a resident model is no candidate"
            victims = tuple(model for model in MODELS if model.model_id in held)[:2]
            verdict = PreloadVerdict(policy.accept_preload(model, victims, now), victims)


def first_to_go(policy: EvictionPolicy, models: Iterable[ModelProfile], now: float) -> str:
    return eviction_order(policy, models, now)[0]


def eviction_order(policy: EvictionPolicy, models: Iterable[ModelProfile], now: float) -> str:
    return "".join(model.model_id for model in sorted(models, key=lambda model: policy.utility(model, now)))


def request(policy: EvictionPolicy, models: str, now: float = 0.0) -> None:
    """One request per letter, all at ``now``."""
    for model_id in models:
        policy.on_request({"a": A, "b": B, "c": C}[model_id], now)


def larger(model: ModelProfile, saved_s: float = 0.05) -> ModelProfile:
    return replace(model, size_bytes=2 * model.size_bytes, exec_s=model.exec_s - saved_s, tier=1)


# The contract


@EVERY_POLICY
def test_a_fresh_policy_ranks_models_that_it_has_never_heard_of(name: str) -> None:
    assert all(math.isfinite(fresh(name).utility(model, 0.0)) for model in MODELS)


@EVERY_POLICY
def test_every_hook_may_come_first(name: str) -> None:
    for first in ("on_request", "on_load", "on_evict", "on_unload", "utility"):
        policy = fresh(name)
        getattr(policy, first)(A, 1.0)
        policy.on_forward_costs({"a": 0.5})
        assert math.isfinite(policy.utility(A, 2.0))
        policy.on_exchange(A, larger(A), 2.0)
        assert math.isfinite(policy.utility(larger(A), 2.0))


@pytest.mark.parametrize("name", sorted(POLICIES.keys() - {"edgeserve"}))
def test_a_model_displaces_for_a_faster_form_what_is_ranked_below_it(name: str) -> None:
    policy = fresh(name)
    for model in (A, B):
        request(policy, model.model_id)
        policy.on_load(model, 0.0)
    above = policy.utility(B, 0.0) < policy.utility(A, 0.0)
    assert policy.accept_exchange(A, larger(A), [B], 0.0) is above
    assert policy.accept_exchange(A, larger(A), [], 0.0)


@EVERY_POLICY
def test_the_questions_may_come_first(name: str) -> None:
    assert list(fresh(name).lowered(1.0)) == []
    assert list(fresh(name).preload_candidates(1.0, 0)) == []
    assert fresh(name).next_review_s == math.inf
    assert not fresh(name).accept_preload(A, [B], 1.0)
    assert not fresh(name).accept_exchange(A, larger(A), [A], 1.0)
    policy = fresh(name)
    policy.on_catalog(MODELS, 0.0)
    policy.on_catalog([], 0.0)
    assert {model.model_id for model in policy.preload_candidates(0.0, 100)} <= {model.model_id for model in MODELS}


@pytest.mark.parametrize(
    "name",
    [
        *sorted(POLICIES.keys() - {"edgeserve"}),
        "edgeserve",
    ],
)
def test_an_unknown_model_is_not_accepted_where_there_is_room(name: str) -> None:
    """Nothing has to go for it, and nothing is gained."""
    assert not fresh(name).accept_preload(A, [], 1.0)


@EVERY_POLICY
def test_only_a_policy_with_candidates_asks_for_reviews(name: str) -> None:
    policy = fresh(name)
    policy.on_catalog(MODELS, 0.0)
    play(policy, 200)
    absent = profile("absent")
    policy.on_request(absent, 1000.0)
    has_candidates = bool(list(policy.preload_candidates(1001.0, 1000)))
    assert has_candidates == (policy.next_review_s < math.inf) == (name == "edgeserve")


@EVERY_POLICY
def test_a_utility_that_falls_is_announced(name: str) -> None:
    """To compute only the announced utilities again gives the same order as to compute all."""
    policy, rng = fresh(name), random.Random(5)
    held: dict[str, float] = {}
    by_name = {model.model_id: model for model in MODELS}
    now = 0.0
    for _ in range(500):
        now += rng.expovariate(0.05)
        model = MODELS[min(rng.randrange(10), rng.randrange(10))]
        policy.on_request(model, now)
        if model.model_id not in held:
            policy.on_load(model, now)
        for fallen in set(policy.lowered(now)) & held.keys():
            held[fallen] = policy.utility(by_name[fallen], now)
        worth = {model_id: policy.utility(by_name[model_id], now) for model_id in (*held, model.model_id)}
        if name != "edgeserve":
            assert all(worth[model_id] >= known for model_id, known in held.items())
        held = worth
        if len(held) > 4:
            least = min(held, key=held.__getitem__)
            policy.on_evict(by_name[least], now)
            del held[least]


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


@EVERY_POLICY
def test_asking_for_utilities_changes_no_ranking(name: str) -> None:
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
            load_ended(cache, model.model_id, now)
        finish(cache, model.model_id, now)
    assert cache.used_bytes == 10


@pytest.mark.parametrize("name", ["gdsf", "random", "fifo", "modelmesh"])
@pytest.mark.parametrize("leave", ["on_evict", "on_unload"])
def test_policies_that_forget_do_not_grow_with_the_models_that_have_left(name: str, leave: str) -> None:
    def weight_after(models: int) -> int:
        policy = fresh(name)
        for i in range(models):
            model = profile(f"model-{i:06}")
            if name != "modelmesh":
                # Like lru it keeps of every model when it was last asked for.
                policy.on_request(model, i)
            policy.on_load(model, i)
            getattr(policy, leave)(model, i)
        return len(pickle.dumps(policy))

    assert weight_after(1000) <= weight_after(1) + 64


@EVERY_POLICY
def test_no_policy_grows_with_the_number_of_requests(name: str) -> None:
    few, many = fresh(name), fresh(name)
    play(few, 300)
    play(many, 6000)
    assert values_in(many) <= 2 * values_in(few) + 200


def values_in(holder: object, seen: set[int] | None = None) -> int:
    """How many values something consists of; it need not be picklable."""
    seen = set() if seen is None else seen
    if isinstance(holder, str | int | float | ModelProfile | None) or callable(holder):
        return 1
    if id(holder) in seen:
        return 0
    seen.add(id(holder))
    if isinstance(holder, dict):
        return sum(values_in(item, seen) for pair in holder.items() for item in pair)
    if isinstance(holder, list | tuple | set):
        return sum(values_in(item, seen) for item in holder)
    names = getattr(type(holder), "__slots__", None) or vars(holder)
    return sum(values_in(getattr(holder, name), seen) for name in names)


# Names and parameters


def test_an_unknown_policy_is_refused_with_the_names_that_exist() -> None:
    with pytest.raises(ValueError, match=r"unknown policy 'lifo'; there are random, .*edgeserve"):
        fresh("lifo")


def test_a_policy_that_knows_the_future_cannot_serve() -> None:
    for name in ORACLES:
        with pytest.raises(ValueError, match="knows the future: it exists in edgeserve simulate only"):
            fresh(name)


def test_an_unknown_parameter_is_refused_with_those_that_exist() -> None:
    with pytest.raises(ValueError, match="'edgeserve' does not take color_s; it takes short_s, long_s, margin"):
        fresh("edgeserve", color_s=1.0)
    with pytest.raises(ValueError, match="'lru' does not take short_s; it takes no parameters"):
        fresh("lru", short_s=1.0)


def test_a_policy_says_which_parameters_it_takes() -> None:
    assert policy_parameters("edgeserve") == ("short_s", "long_s", "margin", "review_every_s")
    assert policy_parameters("modelmesh") == ("churn_age_s",)
    assert policy_parameters("lru") == ()


@pytest.mark.parametrize(
    ("name", "parameter"),
    [("edgeserve", "short_s"), ("edgeserve", "long_s"), ("edgeserve", "review_every_s"), ("modelmesh", "churn_age_s")],
)
@pytest.mark.parametrize("value", [0.0, -1.0])
def test_a_duration_that_is_none_is_refused_at_birth(name: str, parameter: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"{parameter} must be positive, not {value}"):
        fresh(name, **{parameter: value})


def test_a_margin_that_is_a_loss_is_refused_at_birth() -> None:
    with pytest.raises(ValueError, match=r"margin must be at least 1, not 0\.5"):
        fresh("edgeserve", margin=0.5)


# What each is


def test_fifo_evicts_the_model_that_was_loaded_first() -> None:
    policy = fresh("fifo")
    for model in (C, A, B):
        policy.on_load(model, 0.0)
    request(policy, "ccc")
    assert eviction_order(policy, [A, B, C], 0.0) == "cab"
    policy.on_evict(C, 1.0)
    policy.on_load(C, 1.0)
    assert eviction_order(policy, [A, B, C], 1.0) == "abc"


def test_load_time_evicts_the_model_that_is_loaded_again_soonest() -> None:
    policy = fresh("load-time")
    request(policy, "aaa")
    assert eviction_order(policy, [B, A, profile("d", 1, load_s=0.5)], 0.0) == "dab"


def test_modelmesh_is_lru_among_models_that_were_loaded_long_ago() -> None:
    policy = fresh("modelmesh", churn_age_s=10.0)
    for model in (A, B, C):
        policy.on_load(model, 0.0)
    request(policy, "bca")
    assert sorted(policy.lowered(10.0)) == ["a", "b", "c"]
    assert eviction_order(policy, [A, B, C], 10.0) == "bca"


def test_modelmesh_lets_the_newly_loaded_go_last_and_then_by_their_requests() -> None:
    policy = fresh("modelmesh", churn_age_s=10.0)
    policy.on_load(A, 0.0)
    request(policy, "a", 0.0)
    for model in (B, C):
        policy.on_load(model, 5.0)
    request(policy, "cba", 6.0)
    assert list(policy.lowered(9.9)) == []
    assert eviction_order(policy, [A, B, C], 9.9) == "cba"
    assert list(policy.lowered(10.0)) == ["a"]
    assert eviction_order(policy, [A, B, C], 10.0) == "acb"


def test_modelmesh_guards_a_model_anew_when_it_is_loaded_anew() -> None:
    policy = fresh("modelmesh", churn_age_s=10.0)
    policy.on_load(A, 0.0)
    policy.on_unload(A, 5.0)
    policy.on_load(B, 6.0)
    policy.on_load(A, 7.0)
    assert list(policy.lowered(16.5)) == ["b"]
    assert list(policy.lowered(17.0)) == ["a"]


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


def test_gdsf_counts_the_age_that_the_victims_of_a_load_have_made() -> None:
    """As in GreedyDual-Size (Cao and Irani, 1997): first the victims go, then the new model gets its utility."""
    policy = fresh("gdsf")
    request(policy, "a")
    policy.on_load(A, 0.0)
    request(policy, "b")
    policy.on_evict(A, 0.0)
    policy.on_load(B, 0.0)
    assert policy.utility(B, 0.0) == pytest.approx(1 / 10 + 4 / 20)


def test_gdsf_does_not_age_when_a_load_fails() -> None:
    policy = fresh("gdsf")
    request(policy, "abbb")
    policy.on_unload(B, 0.0)
    request(policy, "a")
    assert policy.utility(A, 0.0) == pytest.approx(2 / 10)
    request(policy, "b")
    assert policy.utility(B, 0.0) == pytest.approx(4 / 20)


def victims_of_random(seed: int, sizes: dict[str, int], new: int, *, in_use: str = "", pinned: str = "") -> str:
    """Whom a cache lets go that these models fill."""
    policy = fresh("random", seed)
    cache = ModelCache(capacity_bytes=sum(sizes.values()), policy=policy, pinned=pinned)
    for model_id, size in sizes.items():
        cache.request(profile(model_id, size), 0.0)
        load_ended(cache, model_id, 0.0)
        if model_id not in in_use:
            finish(cache, model_id, 0.0)
    answer = cache.request(profile("new", new), 1.0)
    assert isinstance(answer, Load)
    return "".join(sorted(answer.victims))


@pytest.mark.parametrize(
    ("new", "in_use", "pinned", "outcomes"),
    [
        (10, "", "", ["a", "b", "c", "d"]),
        (20, "", "", ["ab", "ac", "ad", "bc", "bd", "cd"]),
        (10, "a", "", ["b", "c", "d"]),
        (10, "", "a", ["b", "c", "d"]),
    ],
)
def test_random_gives_all_evictable_models_the_same_chance(
    new: int, in_use: str, pinned: str, outcomes: list[str]
) -> None:
    seeds = 8000
    sizes = dict.fromkeys("abcd", 10)
    lots = Counter(victims_of_random(seed, sizes, new, in_use=in_use, pinned=pinned) for seed in range(seeds))
    fair = seeds / len(outcomes)
    # Five standard deviations: with these seeds it is so or it is not.
    assert sorted(lots) == outcomes
    assert all(abs(lots[outcome] - fair) < 5 * math.sqrt(fair) for outcome in outcomes)


def test_random_gives_a_model_that_has_just_come_the_chance_of_the_old_ones() -> None:
    def victim(seed: int) -> str:
        cache = ModelCache(capacity_bytes=30, policy=fresh("random", seed))
        gone: list[str] = []
        for number, model_id in enumerate("abcdefgh"):
            answer = cache.request(profile(model_id), number)
            assert isinstance(answer, Load)
            gone += answer.victims
            load_ended(cache, model_id, number)
            finish(cache, model_id, number)
        return gone[-1]

    seeds = 6000
    lots = Counter(victim(seed) for seed in range(seeds))
    # Of the three that are left when h comes, g came last; it leaves once in three times.
    assert abs(lots["g"] - seeds / 3) < 5 * math.sqrt(seeds / 3)


def test_random_spares_no_model_for_ever_that_was_in_use_when_its_time_came() -> None:
    cache = ModelCache(capacity_bytes=40, policy=fresh("random", 1))
    for model_id in "abcd":
        cache.request(profile(model_id), 0.0)
        load_ended(cache, model_id, 0.0)
    for model_id in "bcd":
        finish(cache, model_id, 0.0)
    for number in range(50):
        cache.request(profile(f"n{number}"), 1.0)
        load_ended(cache, f"n{number}", 1.0)
        finish(cache, f"n{number}", 1.0)
    finish(cache, "a", 1.0)
    cache.request(profile("last"), 2.0)
    assert cache.state("a") is None


def test_random_draws_from_the_generator_it_is_given() -> None:
    def gone(seed: int) -> list[str]:
        return [victims_of_random(seed + number, dict.fromkeys("abcd", 10), 10) for number in range(20)]

    assert gone(1) == gone(1) != gone(100)


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
    def worth(model: ModelProfile, every_s: float) -> float:
        policy = fresh("edgeserve")
        for number in range(20):
            policy.on_request(model, every_s * number)
        return policy.utility(model, every_s * 19)

    base = worth(profile("base"), 1.0)
    assert worth(profile("slow", load_s=2.0), 1.0) == pytest.approx(2 * base)
    assert worth(profile("large", 20), 1.0) == pytest.approx(base / 2)
    assert worth(profile("rare"), 100.0) < base / 20


def test_edgeserve_expects_a_timer_when_it_is_due() -> None:
    policy = fresh("edgeserve")
    for period in range(30):
        policy.on_request(A, 600.0 * period)
    mid, due, long_after = (policy.utility(A, 600.0 * 29 + later_s) for later_s in (300.0, 598.0, 3000.0))
    assert due > 5 * max(mid, long_after)


def test_edgeserve_fetches_a_timer_before_it_is_due_and_not_just_after_it_was() -> None:
    """A timer and a model that is asked for now and then share memory for one; the timer is no candidate midway."""
    rng = random.Random(2)
    timer, other = profile("timer", load_s=2.0), profile("other", load_s=2.0)
    cache = ModelCache(capacity_bytes=10, policy=fresh("edgeserve"))
    cache.handle(ModelsKnown([timer, other]), 0.0)
    asked_for = [(600.0 * period, timer) for period in range(40)] + [(rng.uniform(0, 24_000), other) for _ in range(30)]
    began_s = []
    for now, model in sorted(asked_for, key=lambda request: request[0]):
        while (review_s := cache.next_tick_s) <= now:
            if (preload := tick(cache, review_s)) is not None:
                if preload.model is timer:
                    began_s.append(review_s)
                load_ended(cache, preload.model.model_id, review_s)
        if isinstance(cache.request(model, now), Load):
            load_ended(cache, model.model_id, now)
        finish(cache, model.model_id, now)
    learned = [at_s % 600.0 for at_s in began_s if at_s > 12_000]
    assert len(learned) >= 10
    assert sum(300.0 < into_s < 600.0 for into_s in learned) > 0.9 * len(learned)


def test_edgeserve_tells_that_the_time_of_a_timer_has_passed() -> None:
    policy = fresh("edgeserve")
    for period in range(30):
        policy.on_request(A, 600.0 * period)
    last_s = 600.0 * 29
    policy.on_load(A, last_s)
    list(policy.lowered(last_s))
    worth = policy.utility(A, last_s + 598.0)
    announced = [later_s for later_s in range(700, 3000, 50) if "a" in policy.lowered(last_s + later_s)]
    assert announced
    assert policy.utility(A, last_s + announced[-1]) < worth / 2


def test_edgeserve_knows_that_a_burst_has_ended() -> None:
    policy = fresh("edgeserve")
    for hour in range(20):
        for second in range(10):
            policy.on_request(A, 3600.0 * hour + second)
    end_s = 3600.0 * 19 + 9
    during, after = policy.utility(A, end_s + 1.0), policy.utility(A, end_s + 120.0)
    # The short-term rate alone would have fallen by half.
    assert after < during / 20


def test_edgeserve_ranks_by_what_is_true_now_though_no_request_has_come_for_long() -> None:
    policy = fresh("edgeserve")
    for second in range(10):
        policy.on_request(A, float(second))
    for hour in range(20):
        policy.on_request(C, 3600.0 * hour)
    asked, silent = policy.utility(A, 9.0), policy.utility(A, 3600.0 * 20)
    assert silent < asked / 20


def preloads(cache: ModelCache, now: float) -> str:
    """What it preloads, one after the other."""
    loaded = []
    while (preload := tick(cache, now)) is not None:
        loaded.append(preload.model.model_id)
        load_ended(cache, preload.model.model_id, now)
    return "".join(loaded)


def test_edgeserve_fills_free_memory_with_models_without_a_request_the_most_useful_first() -> None:
    cache = ModelCache(capacity_bytes=80, policy=fresh("edgeserve"))
    cache.handle(ModelsKnown([A, B, C]), 0.0)
    # 0.1, 0.2 and 0.02 seconds per request and byte.
    assert preloads(cache, 0.0) == "bac"


def test_edgeserve_preloads_first_what_was_asked_for() -> None:
    cache = ModelCache(capacity_bytes=80, policy=fresh("edgeserve"))
    cache.handle(ModelsKnown([A, B, C]), 0.0)
    for now in (1.0, 2.0, 3.0):
        cache.request(C, now)
    load_failed(cache, "c", "checksum", 3.0)
    cache.handle(RetryAllowed("c"), 0.0)
    assert preloads(cache, 10.0) == "cba"


@pytest.mark.parametrize(("margin", "accepted"), [(1.0, True), (2.5, True), (4.0, False)])
def test_edgeserve_preloads_what_is_worth_margin_times_its_victims(margin: float, accepted: bool) -> None:
    dear, cheap = profile("dear", load_s=3.0), profile("cheap", load_s=1.0)
    cache = ModelCache(capacity_bytes=10, policy=fresh("edgeserve", margin=margin))
    # Nobody has asked for either: a load of one saves three times as much as a load of the other.
    cache.handle(ModelsKnown([cheap]), 0.0)
    assert preloads(cache, 0.0) == "cheap"
    cache.handle(ModelsKnown([dear]), 0.0)
    assert preloads(cache, 0.0) == ("dear" if accepted else "")


def test_edgeserve_changes_its_mind_when_demand_does() -> None:
    one, other = profile("one"), profile("other")
    policy = fresh("edgeserve")
    cache = ModelCache(capacity_bytes=10, policy=policy, max_loads=1)
    cache.request(one, 0.0)
    load_ended(cache, "one", 0.0)
    finish(cache, "one", 0.0)
    cache.handle(ModelsKnown([one, other]), 0.0)
    assert preloads(cache, 1.0) == ""
    for now in range(10, 40):
        policy.on_request(other, float(now))
    assert preloads(cache, 40.0) == "other"


def test_edgeserve_looks_again_when_there_is_more_room() -> None:
    cache = ModelCache(capacity_bytes=70, policy=fresh("edgeserve"))
    for model in (B, C):
        for now in (0.0, 1.0, 2.0):
            cache.request(model, now)
    for model in (B, C):
        load_ended(cache, model.model_id, 2.0)
        for _ in range(3):
            finish(cache, model.model_id, 2.0)
    cache.handle(ModelsKnown([A, B, C]), 2.0)
    assert preloads(cache, 3.0) == ""
    unload(cache, "c", 4.0)
    # What was unloaded by hand does not come back by itself, but something else may take its place.
    loaded = ""
    while not loaded:
        assert cache.next_tick_s < 60.0
        loaded = preloads(cache, cache.next_tick_s)
    assert loaded == "a"


def test_edgeserve_reviews_no_more_often_than_configured() -> None:
    policy = fresh("edgeserve", review_every_s=7.0)
    policy.on_catalog(MODELS, 0.0)
    rng, now = random.Random(0), 0.0
    for _ in range(300):
        now += rng.expovariate(1.0)
        policy.on_request(rng.choice(MODELS), now)
        list(policy.preload_candidates(now, 0))
        assert policy.next_review_s >= now + 7.0


def test_edgeserve_does_not_grow_in_a_cache_that_has_room_for_all() -> None:
    def weight_after(requests: int) -> int:
        policy = fresh("edgeserve")
        cache = ModelCache(capacity_bytes=10**6, policy=policy)
        cache.handle(ModelsKnown(MODELS), 0.0)
        rng, now = random.Random(0), 0.0
        for _ in range(requests):
            now += rng.expovariate(1.0)
            while now >= cache.next_tick_s and (preload := tick(cache, now)) is not None:
                load_ended(cache, preload.model.model_id, now)
            model = rng.choice(MODELS)
            if isinstance(cache.request(model, now), Load):
                load_ended(cache, model.model_id, now)
            finish(cache, model.model_id, now)
        return values_in(policy)

    assert weight_after(10_000) < 2 * weight_after(500)


def test_edgeserve_preloads_what_fits_though_something_better_does_not() -> None:
    huge, small = profile("huge", 101, load_s=1e4), profile("small", 10)
    cache = ModelCache(capacity_bytes=100, policy=fresh("edgeserve"))
    cache.handle(ModelsKnown([huge, small]), 0.0)
    preload = tick(cache, 0.0)
    assert preload is not None
    assert preload.model is small


def test_edgeserve_loses_at_most_the_forward_to_the_next_holder() -> None:
    policy = fresh("edgeserve")
    request(policy, "ab")
    policy.on_forward_costs({"c": 1.0})
    policy.on_forward_costs({})
    alone, other = policy.utility(A, 1.0), policy.utility(B, 1.0)
    policy.on_forward_costs({"a": 0.25, "b": 9.0})
    assert policy.utility(A, 1.0) == pytest.approx(alone / 4, rel=0.1)
    assert policy.utility(B, 1.0) == pytest.approx(other, rel=0.1)
    policy.on_forward_costs({})
    assert policy.utility(A, 1.0) == pytest.approx(alone, rel=0.1)


def test_edgeserve_heeds_forward_costs_that_came_before_it_met_the_model() -> None:
    early, late = fresh("edgeserve"), fresh("edgeserve")
    early.on_forward_costs({"a": 0.25})
    for policy in (early, late):
        request(policy, "a")
        policy.on_forward_costs({"a": 0.25})
    assert early.utility(A, 0.0) == pytest.approx(late.utility(A, 0.0))


def test_edgeserve_tells_that_a_resident_model_has_become_a_duplicate() -> None:
    policy = fresh("edgeserve")
    policy.on_load(A, 0.0)
    request(policy, "a")
    list(policy.lowered(0.0))
    policy.on_forward_costs({"a": 0.25})
    assert list(policy.lowered(0.0)) == ["a"]


def test_edgeserve_evicts_duplicates_before_last_copies() -> None:
    policy = fresh("edgeserve")
    request(policy, "aaaaac")
    assert first_to_go(policy, [A, C], 0.0) == "c"
    policy.on_forward_costs({"a": 0.002})
    assert first_to_go(policy, [A, C], 0.0) == "a"


def test_edgeserve_takes_a_faster_form_that_saves_more_than_what_must_leave() -> None:
    policy = fresh("edgeserve")
    for model in (*[SLOW] * 20, B):
        policy.on_request(model, 0.0)
    for model in (SLOW, B):
        policy.on_load(model, 0.0)
    lost = policy.utility(B, 0.0) * B.size_bytes
    rate = policy.utility(SLOW, 0.0) * A.size_bytes / A.load_s
    assert policy.accept_exchange(SLOW, larger(SLOW, 1.01 * lost / rate), [B], 0.0)
    assert not policy.accept_exchange(SLOW, larger(SLOW, 0.99 * lost / rate), [B], 0.0)


def test_edgeserve_ranks_a_form_by_what_it_saves_over_being_absent() -> None:
    policy = fresh("edgeserve")
    policy.on_request(SLOW, 0.0)
    form, part = larger(SLOW), surplus(larger(SLOW), SLOW)
    assert part is not None
    rate = policy.utility(SLOW, 0.0) * A.size_bytes / A.load_s
    assert policy.utility(form, 0.0) * form.size_bytes == pytest.approx(rate * (A.load_s + 0.05))
    assert policy.utility(part, 0.0) * part.size_bytes == pytest.approx(rate * 0.05)


def test_edgeserve_gives_up_a_form_that_saves_little_before_its_model() -> None:
    policy = fresh("edgeserve")
    policy.on_request(SLOW, 0.0)
    little, much = surplus(larger(SLOW, A.load_s / 2), SLOW), surplus(larger(SLOW, 2 * A.load_s), SLOW)
    assert little is not None
    assert much is not None
    assert policy.utility(little, 0.0) < policy.utility(SLOW, 0.0) < policy.utility(much, 0.0)
