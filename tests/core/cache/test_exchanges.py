"""A model in memory goes over to another of its forms, and both count until it has. Capacity is 100 bytes."""

from __future__ import annotations

from dataclasses import replace

import pytest
from core_support import Ranked, assert_accounting_adds_up, finish, load_ended, profile

from serve_app.core.cache.decisions import HIT, JOIN, Action, Evict, Load, StartExchange, StartLoad, StartShrink, Wait
from serve_app.core.cache.events import (
    CapacityChanged,
    CatalogChanged,
    ContentChanged,
    ExchangeEnded,
    ExchangeSuggested,
    LoadEnded,
    LoadFailed,
    ModelsKnown,
    PreloadSuggested,
    UnloadRequested,
)
from serve_app.core.cache.model_cache import ModelCache
from serve_app.core.catalog import ModelProfile
from serve_app.core.forms import Surplus
from serve_app.core.vocabulary import ModelState
from serve_app.errors import Conflict


@pytest.fixture
def cache() -> ModelCache:
    """Holds the idle models a and b of 30 bytes each; the policy keeps the later letters."""
    cache = ModelCache(capacity_bytes=100, policy=Ranked(a=1, b=2, c=3), max_loads=8)
    for model_id in ("a", "b"):
        assert cache.request(profile(model_id, 30), 0.0) == Load(())
        load_ended(cache, model_id, 0.0)
        finish(cache, model_id, 0.0)
    return cache


def suggest(cache: ModelCache, model_id: str, size: int) -> tuple[Action, ...]:
    return cache.handle(ExchangeSuggested(profile(model_id, size)), 1.0)


def sizes(cache: ModelCache) -> dict[str, int]:
    return {model.model_id: model.size_bytes for model in cache.models()}


def test_both_forms_count_until_the_exchange_has_ended(cache: ModelCache) -> None:
    assert suggest(cache, "b", 35) == (StartExchange(profile("b", 35)),)
    assert (cache.used_bytes, sizes(cache)) == (95, {"a": 30, "b": 65})
    assert cache.handle(ExchangeEnded("b", succeeded=True), 2.0) == ()
    assert (cache.used_bytes, sizes(cache)) == (65, {"a": 30, "b": 35})
    assert_accounting_adds_up(cache)
    assert cache.counters.form_changes == 1


def test_an_exchange_that_fails_leaves_the_model_as_it_was(cache: ModelCache) -> None:
    suggest(cache, "b", 35)
    cache.handle(ExchangeEnded("b", succeeded=False), 2.0)
    assert (cache.used_bytes, sizes(cache)) == (60, {"a": 30, "b": 30})
    assert_accounting_adds_up(cache)


def test_requests_hit_meanwhile_and_the_model_cannot_leave(cache: ModelCache) -> None:
    suggest(cache, "b", 35)
    assert cache.request(profile("b", 30), 1.0) == HIT
    finish(cache, "b", 1.0)
    assert isinstance(cache.request(profile("c", 90), 1.0), Wait)
    actions = cache.handle(ExchangeEnded("b", succeeded=True), 2.0)
    assert {action.model_id for action in actions if isinstance(action, Evict)} == {"a", "b"}
    assert sizes(cache) == {"c": 90}


def test_an_exchange_displaces_only_what_is_less_useful(cache: ModelCache) -> None:
    assert suggest(cache, "a", 60) == (), "b is worth more"
    assert suggest(cache, "b", 60) == (Evict("a", "preload"), StartExchange(profile("b", 60)))
    assert cache.used_bytes == 90
    assert_accounting_adds_up(cache)


def test_an_exchange_never_displaces_what_is_in_use(cache: ModelCache) -> None:
    assert cache.request(profile("a", 30), 1.0) == HIT
    assert suggest(cache, "b", 60) == ()


def test_a_model_goes_over_to_one_form_at_a_time_and_only_from_memory(cache: ModelCache) -> None:
    assert suggest(cache, "c", 10) == ()
    suggest(cache, "b", 10)
    assert suggest(cache, "b", 10) == ()


def test_exchanges_and_preloads_share_their_number(cache: ModelCache) -> None:
    suggest(cache, "b", 10)
    assert suggest(cache, "a", 10) == ()
    cache.handle(ExchangeEnded("b", succeeded=True), 2.0)
    assert suggest(cache, "a", 10) == (StartExchange(profile("a", 10)),)


def test_nothing_is_exchanged_while_a_request_waits(cache: ModelCache) -> None:
    for model_id in ("a", "b"):
        assert cache.request(profile(model_id, 30), 1.0) == HIT
    assert isinstance(cache.request(profile("c", 90), 1.0), Wait)
    assert suggest(cache, "b", 10) == ()


def test_a_model_on_its_way_cannot_be_unloaded_by_hand(cache: ModelCache) -> None:

    suggest(cache, "b", 10)
    with pytest.raises(Conflict):
        cache.handle(UnloadRequested("b"), 1.0)


def test_an_end_without_a_beginning_is_a_mistake(cache: ModelCache) -> None:
    with pytest.raises(ValueError, match="on its way to no other form"):
        cache.handle(ExchangeEnded("b", succeeded=True), 1.0)


def test_memory_that_shrinks_meanwhile_is_given_back_when_the_exchange_has_ended(cache: ModelCache) -> None:
    suggest(cache, "b", 35)
    assert cache.handle(CapacityChanged(50), 1.0) == (Evict("a", "reconfigure"),)
    assert cache.handle(ExchangeEnded("b", succeeded=True), 2.0) == ()
    assert (cache.used_bytes, sizes(cache)) == (35, {"b": 35})
    assert_accounting_adds_up(cache)


# Back to a smaller form


def larger(model_id: str, size: int = 40) -> ModelProfile:
    return replace(profile(model_id, size, exec_s=0.05), tier=1)


def go_over(cache: ModelCache, form: ModelProfile) -> None:
    assert cache.handle(ExchangeSuggested(form), 1.0) == (StartExchange(form),)
    assert cache.handle(ExchangeEnded(form.model_id, succeeded=True), 1.0) == ()


def test_a_model_goes_back_to_its_smaller_form_before_it_is_lost(cache: ModelCache) -> None:
    go_over(cache, larger("a"))
    answer = cache.request(profile("c", 35), 2.0)
    assert answer == Load((), shrunk=(profile("a", 30),))
    assert answer.actions(profile("c", 35)) == (
        StartShrink(profile("a", 30)),
        StartLoad(profile("c", 35), background=False),
    )
    assert (cache.used_bytes, sizes(cache)) == (95, {"a": 30, "b": 30, "c": 35})
    assert cache.counters.evictions == 0
    assert cache.counters.form_changes == 2
    assert_accounting_adds_up(cache)


def test_requests_join_the_load_of_the_smaller_form(cache: ModelCache) -> None:
    go_over(cache, larger("a"))
    cache.request(profile("c", 35), 2.0)
    assert cache.request(profile("a", 30), 2.0) == JOIN
    load_ended(cache, "a", 2.0)
    assert cache.request(profile("a", 30), 2.0) == HIT


def test_a_model_is_lost_if_its_smaller_form_would_not_leave_enough(cache: ModelCache) -> None:
    go_over(cache, larger("a"))
    assert cache.request(profile("c", 50), 2.0) == Load(("a",))
    assert sizes(cache) == {"b": 30, "c": 50}
    assert_accounting_adds_up(cache)


def test_a_form_that_takes_no_more_leaves_with_its_model(cache: ModelCache) -> None:
    go_over(cache, larger("a", 30))
    assert cache.request(profile("c", 45), 2.0) == Load(("a",))


def test_a_model_in_use_keeps_its_form(cache: ModelCache) -> None:
    go_over(cache, larger("a"))
    assert cache.request(profile("a", 30), 2.0) == HIT
    assert cache.request(profile("c", 35), 2.0) == Load(("b",))


def test_memory_that_shrinks_takes_larger_forms_first(cache: ModelCache) -> None:
    go_over(cache, larger("a"))
    assert cache.handle(CapacityChanged(65), 2.0) == (StartShrink(profile("a", 30)),)
    assert cache.used_bytes == 60
    assert_accounting_adds_up(cache)


def test_a_smaller_form_that_cannot_be_loaded_loses_the_model(cache: ModelCache) -> None:
    go_over(cache, larger("a"))
    cache.handle(CapacityChanged(65), 2.0)
    assert cache.handle(LoadFailed("a", "its file is gone"), 2.0) == ()
    assert sizes(cache) == {"b": 30}
    assert_accounting_adds_up(cache)


def test_a_faster_form_of_one_model_displaces_that_of_a_less_useful_one(cache: ModelCache) -> None:
    go_over(cache, larger("a"))
    cache.handle(CapacityChanged(105), 1.0)
    assert cache.handle(ExchangeSuggested(larger("b")), 2.0) == (
        StartShrink(profile("a", 30)),
        StartExchange(larger("b")),
    )


def test_a_new_catalog_says_to_which_form_a_model_goes_back(cache: ModelCache) -> None:
    go_over(cache, larger("a"))
    cache.handle(CatalogChanged([profile("a", 25), profile("b", 30)], pinned=()), 2.0)
    assert cache.request(profile("c", 45), 2.0) == Load((), shrunk=(profile("a", 25),))
    assert_accounting_adds_up(cache)


def test_a_pinned_model_leaves_room_for_the_largest_of_the_others() -> None:
    cache = ModelCache(capacity_bytes=100, policy=Ranked(), pinned=["a"])
    cache.handle(ModelsKnown([profile("a", 30), profile("b", 65)]), 0.0)
    cache.request(profile("a", 30), 0.0)
    load_ended(cache, "a", 0.0)
    assert cache.handle(ExchangeSuggested(larger("a")), 1.0) == (), "b would never fit beside it"
    assert cache.handle(ExchangeSuggested(larger("a", 35)), 1.0) == (StartExchange(larger("a", 35)),)


# Files that have changed


def test_a_model_whose_files_change_during_an_exchange_leaves_when_that_has_ended(cache: ModelCache) -> None:
    suggest(cache, "b", 35)
    assert cache.handle(ContentChanged("b"), 1.0) == ()
    assert isinstance(cache.request(profile("b", 30), 1.0), Wait), "what is in memory must not answer"
    actions = cache.handle(ExchangeEnded("b", succeeded=True), 2.0)
    assert actions[:2] == (Evict("b", "changed"), StartLoad(profile("b", 30), background=False))
    assert sizes(cache) == {"a": 30, "b": 30}
    assert_accounting_adds_up(cache)


def test_a_model_whose_files_change_while_it_is_in_use_leaves_after_its_last_use(cache: ModelCache) -> None:
    assert cache.request(profile("a", 30), 1.0) == HIT
    assert cache.handle(ContentChanged("a"), 1.0) == ()
    assert isinstance(cache.request(profile("a", 30), 1.0), Wait)
    assert cache.request(profile("b", 30), 1.0) == HIT, "others go on"
    assert Evict("a", "changed") in cache.finish("a", 2.0)
    assert cache.state("a") is ModelState.LOADING


# Back to the form that it had


def lose_form(cache: ModelCache) -> None:
    """Have a leave in its larger form."""
    go_over(cache, larger("a"))
    cache.request(profile("c", 50), 2.0)
    load_ended(cache, "c", 2.0)
    finish(cache, "c", 2.0)
    cache.handle(UnloadRequested("c"), 2.0)


def test_a_model_that_is_preloaded_goes_back_to_the_form_that_it_had(cache: ModelCache) -> None:
    lose_form(cache)
    cache.handle(PreloadSuggested(profile("a", 30), required=True), 3.0)
    assert cache.handle(LoadEnded("a"), 3.0) == (StartExchange(larger("a")),)


def test_a_model_that_is_loaded_for_a_request_does_not(cache: ModelCache) -> None:
    lose_form(cache)
    cache.request(profile("a", 30), 3.0)
    assert cache.handle(LoadEnded("a"), 3.0) == ()


def test_a_model_that_is_preloaded_stays_as_it_is_if_a_more_useful_one_would_have_to_leave(cache: ModelCache) -> None:
    lose_form(cache)
    cache.handle(CapacityChanged(90), 3.0)
    cache.handle(PreloadSuggested(profile("a", 30), required=True), 3.0)
    assert cache.handle(LoadEnded("a"), 3.0) == ()


class ByBytes(Ranked):
    """A surplus is worth more per byte than its model, so that both would leave together."""

    def utility(self, model: ModelProfile, now: float) -> float:
        return super().utility(model, now) * (1 + model.tier) * (2 if isinstance(model, Surplus) else 1)


def test_a_model_that_is_ranked_whole_keeps_its_smaller_form_if_that_is_enough() -> None:
    def full() -> ModelCache:
        cache = ModelCache(capacity_bytes=100, policy=ByBytes(a=1, b=9, c=9), max_loads=8)
        for model_id in ("a", "b"):
            cache.request(profile(model_id, 30), 0.0)
            load_ended(cache, model_id, 0.0)
            finish(cache, model_id, 0.0)
        go_over(cache, larger("a"))
        return cache

    for size, answer in ((40, Load((), shrunk=(profile("a", 30),))), (41, Load(("a",)))):
        cache = full()
        assert cache.request(profile("c", size), 2.0) == answer
        assert_accounting_adds_up(cache)
    cache = full()
    assert cache.handle(CapacityChanged(65), 2.0) == (StartShrink(profile("a", 30)),)
