"""A model in memory goes over to another of its forms, and both count until it has. Capacity is 100 bytes."""

from __future__ import annotations

import pytest
from core_support import Ranked, assert_accounting_adds_up, finish, load_ended, profile

from serve_app.core.cache.decisions import HIT, Action, Evict, Load, StartExchange, Wait
from serve_app.core.cache.events import CapacityChanged, ExchangeEnded, ExchangeSuggested, UnloadRequested
from serve_app.core.cache.model_cache import ModelCache
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
