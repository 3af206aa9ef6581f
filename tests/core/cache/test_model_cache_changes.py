"""A cache that is changed while it serves: more or less memory, another policy, another catalog, pins, suggestions."""

from __future__ import annotations

import random
from collections.abc import Iterable

import pytest
from core_support import (
    Decided,
    Preload,
    Ranked,
    assert_accounting_adds_up,
    decided,
    finish,
    load_ended,
    load_failed,
    profile,
    suggest,
    tick,
    unload,
    withdraw,
)

from serve_app.core.cache.decisions import Action, Grant, Hit, Load, Reject, RejectReason, Wait
from serve_app.core.cache.events import (
    CapacityChanged,
    CatalogChanged,
    ForwardCostsChanged,
    IdleChecked,
    LoadEnded,
    ModelsKnown,
    PolicyChanged,
    ProtectedChanged,
)
from serve_app.core.cache.model_cache import ModelCache
from serve_app.core.cache.preload_queue import PreloadQueue
from serve_app.core.policies.registry import POLICIES, make_policy
from serve_app.core.vocabulary import ModelState
from serve_app.errors import Conflict


def holding(*names: str, capacity: int = 40, in_use: str = "", pinned: str = "", **worth: float) -> ModelCache:
    """A cache of ten-byte models; those ``in_use`` are."""
    cache = ModelCache(capacity_bytes=capacity, policy=Ranked(**worth), pinned=pinned)
    for number, name in enumerate(names):
        assert cache.request(profile(name), float(number)) == Load(())
        load_ended(cache, name, float(number))
        if name not in in_use:
            finish(cache, name, float(number))
    return cache


def names(cache: ModelCache) -> str:
    return "".join(sorted(model.model_id for model in cache.models()))


# Less memory, and more


def test_less_memory_evicts_the_least_useful_at_once() -> None:
    cache = holding(*"abcd", a=4, b=1, c=3, d=2)
    assert decided(cache.handle(CapacityChanged(20), 9.0)) == Decided(("b", "d"))
    assert names(cache) == "ac"
    assert_accounting_adds_up(cache)


def test_what_is_in_use_leaves_when_it_is_idle_and_takes_no_new_request() -> None:
    cache = holding(*"ab", capacity=20, in_use="ab", a=1, b=2)
    assert decided(cache.handle(CapacityChanged(10), 9.0)) == Decided()
    assert cache.used_bytes == 20
    assert cache.request(profile("b"), 9.0) == Hit()
    ticket = cache.request(profile("a"), 9.0)
    assert isinstance(ticket, Wait)
    assert cache.finish("b", 10.0) == ()
    # One of the two had to leave, and the request gets the model that it waits for.
    assert decided(cache.finish("b", 10.0)) == Decided(("b",), (Grant(ticket.ticket, "a", Hit()),))
    finish(cache, "a", 10.0)
    finish(cache, "a", 10.0)
    assert_accounting_adds_up(cache)


def test_what_is_drained_for_less_memory_is_used_again_once_there_is_more() -> None:
    cache = holding(*"ab", capacity=20, in_use="ab", a=1, b=2)
    cache.handle(CapacityChanged(10), 9.0)
    cache.handle(CapacityChanged(20), 10.0)
    assert cache.request(profile("a"), 11.0) == Hit()
    assert_accounting_adds_up(cache)


def test_a_request_that_waits_for_a_model_that_need_not_leave_after_all_gets_it() -> None:
    cache = holding(*"ab", capacity=20, in_use="ab", a=1, b=2)
    cache.handle(CapacityChanged(10), 9.0)
    waiting = cache.request(profile("a"), 9.0)
    assert isinstance(waiting, Wait)
    assert decided(cache.finish("b", 10.0)) == Decided(("b",), (Grant(waiting.ticket, "a", Hit()),))
    assert_accounting_adds_up(cache)


def test_a_model_drained_for_a_load_that_has_failed_is_used_again() -> None:
    cache = holding("a", capacity=20, in_use="a")
    assert cache.request(profile("b"), 8.0) == Load(())
    cache.handle(CapacityChanged(10), 9.0)
    load_failed(cache, "b", "corrupt", 10.0)
    finish(cache, "a", 11.0)
    assert cache.request(profile("a"), 12.0) == Hit()
    assert_accounting_adds_up(cache)


def test_a_waiting_request_that_can_never_be_served_any_more_is_rejected() -> None:
    cache = holding("a", in_use="a", capacity=40)
    waiting = cache.request(profile("large", 35), 1.0)
    assert isinstance(waiting, Wait)
    (grant,) = decided(cache.handle(CapacityChanged(20), 2.0)).grants
    assert isinstance(grant.answer, Reject)
    assert (grant.ticket, grant.answer.reason) == (waiting.ticket, RejectReason.TOO_LARGE)
    assert_accounting_adds_up(cache)


def test_more_memory_serves_waiting_requests() -> None:
    cache = holding("a", in_use="a", capacity=10)
    waiting = cache.request(profile("b"), 1.0)
    assert isinstance(waiting, Wait)
    assert decided(cache.handle(CapacityChanged(20), 2.0)) == Decided((), (Grant(waiting.ticket, "b", Load(())),))


def test_pinned_models_need_their_memory() -> None:
    cache = holding(*"ab", pinned="ab")
    with pytest.raises(ValueError, match="pinned"):
        cache.handle(CapacityChanged(15), 9.0)
    assert cache.capacity_bytes == 40


@pytest.mark.parametrize("seed", range(30))
def test_whatever_happens_while_memory_changes_no_request_is_forgotten(seed: int) -> None:
    rng = random.Random(seed)
    cache = ModelCache(capacity_bytes=60, policy=make_policy("lru", random.Random(0)), max_loads=2)
    models = {name: profile(name, rng.choice([5, 10, 20])) for name in "abcdef"}
    using: list[str] = []
    loading: dict[str, int] = {}
    waiting: set[int] = set()

    def take(ticket: int | None, name: str, answer: object) -> None:
        waiting.discard(ticket or 0)
        match answer:
            case Hit():
                using.append(name)
            case Wait(ticket=new):
                waiting.add(new)
            case Reject(reason=reason):
                assert reason is RejectReason.TOO_LARGE
            case _:
                loading[name] = loading.get(name, 0) + 1

    def follow(actions: Iterable[Action]) -> None:
        for grant in decided(actions).grants:
            take(grant.ticket, grant.model_id, grant.answer)

    def settle_one() -> None:
        if loading and (rng.random() < 0.5 or not using):
            name = rng.choice(sorted(loading))
            using.extend([name] * loading.pop(name))
            follow(cache.handle(LoadEnded(name), now))
        elif using:
            name = using.pop(rng.randrange(len(using)))
            follow(cache.finish(name, now))

    for step in range(300):
        now = float(step)
        if rng.random() < 0.1:
            follow(cache.handle(CapacityChanged(rng.choice([20, 40, 60])), now))
        if rng.random() < 0.5:
            name = rng.choice(sorted(models))
            take(None, name, cache.request(models[name], now))
        settle_one()
        if cache.used_bytes > cache.capacity_bytes:
            assert all(model.uses or model.state is ModelState.LOADING for model in cache.models())
    while using or loading:
        settle_one()
    assert not waiting
    assert_accounting_adds_up(cache)


# Another policy


@pytest.mark.parametrize("name", POLICIES)
def test_any_policy_can_take_over(name: str) -> None:
    cache = holding(*"abcd")
    cache.handle(ModelsKnown([profile(model) for model in "abcdef"]), 9.0)
    cache.handle(PolicyChanged(make_policy(name, random.Random(0))), 9.0)
    assert names(cache) == "abcd"
    answer = cache.request(profile("e"), 10.0)
    assert isinstance(answer, Load)
    assert len(answer.victims) == 1
    assert_accounting_adds_up(cache)


def test_a_new_policy_learns_everything_in_the_order_of_last_use() -> None:
    cache = holding(*"abc")
    cache.handle(ModelsKnown([profile(model) for model in "abcd"]), 9.0)
    cache.handle(ForwardCostsChanged({"a": 0.1}), 0.0)
    cache.request(profile("a"), 9.0)
    finish(cache, "a", 9.0)
    policy = Ranked()
    cache.handle(PolicyChanged(policy), 10.0)
    assert policy.told == [("know", name) for name in "abcd"] + [("load", name) for name in "bca"]
    assert policy.forward_s == {"a": 0.1}


# Another catalog


def test_what_the_catalog_no_longer_has_goes_when_it_is_idle() -> None:
    cache = holding(*"abc", in_use="b")
    assert decided(cache.handle(CatalogChanged([profile("c"), profile("d")], ()), 9.0)) == Decided(("a",))
    assert decided(cache.finish("b", 10.0)) == Decided(("b",))
    assert names(cache) == "c"
    assert suggest(cache, profile("a"), 11.0) is None
    cache.handle(CatalogChanged([profile("a"), profile("c")], ()), 12.0)
    assert suggest(cache, profile("a"), 13.0) == Preload(profile("a"), ())
    assert_accounting_adds_up(cache)


def test_superseded_version_is_preloaded_no_more_and_its_requests_count_for_its_successor() -> None:
    policy = make_policy("edgeserve", random.Random(0))
    cache = ModelCache(capacity_bytes=30, policy=policy)
    cache.handle(ModelsKnown([profile("a"), profile("b")]), 0.0)
    for second in range(1, 9):
        cache.request(profile("a"), float(second))
        if second == 1:
            load_ended(cache, "a", 1.0)
        finish(cache, "a", float(second))
    before = policy.utility(profile("a"), 9.0)
    versions = [profile("a"), profile("a@2"), profile("b")]
    assert before > 10 * policy.utility(profile("b"), 9.0)
    cache.handle(CatalogChanged(versions, (), {"a": "a@2"}), 9.0)
    assert policy.utility(profile("a@2"), 9.0) == pytest.approx(before)
    assert policy.utility(profile("a"), 9.0) <= policy.utility(profile("b"), 9.0)
    unload(cache, "a", 9.0)
    assert tick(cache, 10.0) == Preload(profile("a@2"), ())
    cache.handle(CatalogChanged(versions, (), {"a@2": "a"}), 11.0)
    assert policy.utility(profile("a"), 11.0) > 10 * policy.utility(profile("a@2"), 11.0), "rolled back"


def test_superseded_version_is_loaded_by_a_request_and_by_nothing_else() -> None:
    cache = ModelCache(capacity_bytes=40, policy=Ranked(a=9))
    cache.handle(CatalogChanged([profile("a"), profile("a@2")], (), {"a": "a@2"}), 0.0)
    assert suggest(cache, profile("a"), 1.0) is None
    assert suggest(cache, profile("a@2"), 2.0) == Preload(profile("a@2"), ())
    assert cache.request(profile("a"), 3.0) == Load(())
    assert_accounting_adds_up(cache)


def test_pins_change_with_the_catalog() -> None:
    cache = holding(*"ab", capacity=20, pinned="a", a=1, b=2)
    cache.handle(CatalogChanged([profile(name) for name in "abc"], "b"), 9.0)
    assert {model.model_id for model in cache.models() if model.unevictable} == {"b"}
    assert cache.request(profile("c"), 10.0) == Load(("a",))
    assert cache.request(profile("huge", 11), 11.0).reason is RejectReason.TOO_LARGE  # type: ignore[union-attr]


# Copies that the cluster cannot spare


def test_a_protected_model_is_no_victim_and_not_unloaded() -> None:
    cache = holding(*"abcd", a=1, b=2, c=3, d=4)
    cache.handle(ProtectedChanged(["a"]), 9.0)
    assert [model.model_id for model in cache.models() if model.unevictable] == ["a"]
    with pytest.raises(Conflict, match="min_copies"):
        unload(cache, "a", 9.0)
    assert withdraw(cache, "a", 9.0) is None
    assert decided(cache.handle(IdleChecked(9.0), 9.0)).evicted == ("b", "c", "d")
    cache.handle(ProtectedChanged([]), 10.0)
    assert withdraw(cache, "a", 11.0) == ()
    assert_accounting_adds_up(cache)


def test_no_more_than_half_is_protected() -> None:
    cache = holding(*"abcd")
    cache.handle(ProtectedChanged(list("dcba")), 9.0)
    assert {model.model_id for model in cache.models() if model.unevictable} == {"c", "d"}


def test_a_model_larger_than_half_is_protected_too_and_nothing_after_it() -> None:
    cache = ModelCache(capacity_bytes=40, policy=Ranked())
    for name, size in (("large", 25), ("small", 10)):
        cache.request(profile(name, size), 0.0)
        load_ended(cache, name, 1.0)
        finish(cache, name, 2.0)
    cache.handle(ProtectedChanged(["large", "small"]), 3.0)
    assert [model.model_id for model in cache.models() if model.protected] == ["large"]
    cache.handle(ProtectedChanged(["small", "large"]), 4.0)
    assert [model.model_id for model in cache.models() if model.protected] == ["large", "small"]
    assert cache.request(profile("other", 20), 5.0) == Load(("large",))
    assert_accounting_adds_up(cache)


def test_a_protected_model_yields_to_a_request_that_could_never_be_served_otherwise() -> None:
    cache = holding(*"abcd")
    cache.handle(ProtectedChanged(list("ab")), 9.0)
    answer = cache.request(profile("large", 30), 10.0)
    assert isinstance(answer, Load)
    assert sum(model.unevictable for model in cache.models()) == 1
    assert_accounting_adds_up(cache)


def test_a_drained_model_is_not_protected() -> None:
    cache = holding(*"abc", capacity=30, in_use="abc", a=1, b=2, c=3)
    waiting = cache.request(profile("large", 20), 9.0)
    assert isinstance(waiting, Wait)
    cache.handle(ProtectedChanged(list("ab")), 9.0)
    assert not any(model.unevictable for model in cache.models())
    finish(cache, "a", 10.0)
    (grant,) = finish(cache, "b", 10.0)
    assert isinstance(grant.answer, Load)
    assert_accounting_adds_up(cache)


# Withdrawn by placement, or because no request comes


def test_what_was_withdrawn_comes_back_only_when_requested_or_required() -> None:
    cache = holding(*"ab", a=5, b=5)
    assert withdraw(cache, "a", 9.0) == ()
    assert suggest(cache, profile("a"), 9.0) is None
    assert suggest(cache, profile("a"), 9.0, required=True) == Preload(profile("a"), ())
    load_ended(cache, "a", 9.0)
    withdraw(cache, "a", 9.5)
    assert cache.request(profile("a"), 10.0) == Load(())
    assert withdraw(cache, "a", 10.0) is None
    assert withdraw(cache, "z", 10.0) is None


def test_only_what_is_idle_for_long_is_withdrawn() -> None:
    cache = holding(*"abc", in_use="b", pinned="c")
    cache.request(profile("a"), 50.0)
    finish(cache, "a", 55.0)
    assert decided(cache.handle(IdleChecked(54.0), 60.0)) == Decided()
    assert decided(cache.handle(IdleChecked(55.0), 60.0)) == Decided(("a",))
    assert_accounting_adds_up(cache)


# Suggestions


def test_suggestions_wait_for_the_background_and_required_ones_go_first() -> None:
    cache = holding("a", a=1)
    assert suggest(cache, profile("x"), 1.0) is not None
    for name, required in (("b", False), ("c", True)):
        suggest(cache, profile(name), 1.0, required=required)
    assert tick(cache, 1.0) is None
    load_ended(cache, "x", 2.0)
    assert cache.next_tick_s <= 2.0
    assert tick(cache, 2.0) == Preload(profile("c"), ())
    load_ended(cache, "c", 3.0)
    assert tick(cache, 3.0 + PreloadQueue.SUGGESTION_S) is None
    assert tick(cache, 3.0) is None


def test_a_required_preload_displaces_what_is_worth_more_but_not_what_is_in_use() -> None:
    cache = holding(*"ab", capacity=20, in_use="b", a=9, b=1)
    assert suggest(cache, profile("c"), 9.0) is None
    assert tick(cache, 9.0) is None
    assert suggest(cache, profile("c"), 9.0, required=True) == Preload(profile("c"), ("a",))


def test_a_required_copy_of_what_is_no_longer_in_the_catalog_goes_too() -> None:
    cache = holding(*"ab")
    cache.handle(ProtectedChanged(["a"]), 9.0)
    assert decided(cache.handle(CatalogChanged([profile("b")], ()), 10.0)) == Decided(("a",))
    assert_accounting_adds_up(cache)
