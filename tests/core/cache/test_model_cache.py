"""The rules of ``ModelCache``, one by one. Capacity is 100 bytes unless a test says otherwise."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import pytest
from core_support import (
    Preload,
    Ranked,
    Trimming,
    assert_accounting_adds_up,
    cancel_wait,
    decided,
    finish,
    load_ended,
    load_failed,
    profile,
    suggest,
    tick,
    unload,
)

from serve_app.core.cache.decisions import Answer, Grant, Hit, Join, Load, Reject, RejectReason, Wait
from serve_app.core.cache.events import TICK, ForwardCostsChanged, ModelsKnown, RetryAllowed, UnloadRequested
from serve_app.core.cache.model_cache import ModelCache
from serve_app.core.catalog import ModelProfile
from serve_app.core.vocabulary import ModelState, ResidentModel
from serve_app.errors import Conflict, NotFound

MakeCache = Callable[..., ModelCache]
#: Policies that let victims go strictly in order, and those that spare small ones.
BOTH = pytest.mark.parametrize("policy", [Ranked, Trimming])


@pytest.fixture
def make_cache() -> Iterator[MakeCache]:
    """Makes caches whose accounting must add up when the test ends."""
    made: list[ModelCache] = []

    def make(**changed: Any) -> ModelCache:
        cache = ModelCache(**{"capacity_bytes": 100, "policy": Ranked(), "max_loads": 8} | changed)
        made.append(cache)
        return cache

    yield make
    for cache in made:
        assert_accounting_adds_up(cache)


class Silent(Ranked):
    """Tells of a fall once, and only of those that the test names."""

    def __init__(self, **worth: float) -> None:
        super().__init__(**worth)
        self.untold: list[str] = []

    def lowered(self, now: float) -> Iterable[str]:
        told, self.untold = self.untold, []
        return told


def hold(cache: ModelCache, model_id: str, size: int, *, in_use: bool = False) -> None:
    """Bring a model in without displacing any."""
    assert cache.request(profile(model_id, size), 0.0) == Load(())
    assert load_ended(cache, model_id, 0.0) == ()
    if not in_use:
        assert finish(cache, model_id, 0.0) == ()


def resident(cache: ModelCache) -> set[str]:
    return {model.model_id for model in cache.models()}


def uses(cache: ModelCache, model_id: str) -> int:
    return next(model.uses for model in cache.models() if model.model_id == model_id)


def ticket_of(answer: Answer | Wait) -> int:
    assert isinstance(answer, Wait)
    return answer.ticket


# Hit, join, load


def test_an_absent_model_is_loaded_and_its_bytes_are_reserved_at_once(make_cache: MakeCache) -> None:
    cache = make_cache()
    assert cache.request(profile("a", 60), 5.0) == Load(())
    assert cache.used_bytes == 60
    assert cache.state("a") is ModelState.LOADING


def test_the_second_request_joins_the_first_load(make_cache: MakeCache) -> None:
    cache = make_cache()
    cache.request(profile("a"), 0.0)
    assert cache.request(profile("a"), 0.5) == Join()
    assert cache.used_bytes == 10
    assert cache.counters.loads == 1


def test_a_resident_model_is_hit(make_cache: MakeCache) -> None:
    cache = make_cache()
    hold(cache, "a", 10)
    assert cache.request(profile("a"), 1.0) == Hit()
    assert cache.counters.requests == 2
    assert cache.counters.loads == 1


def test_every_request_pins_its_model_until_it_has_finished(make_cache: MakeCache) -> None:
    cache = make_cache()
    cache.request(profile("a"), 0.0)
    cache.request(profile("a"), 0.0)
    load_ended(cache, "a", 1.0)
    cache.request(profile("a"), 1.0)
    assert uses(cache, "a") == 3
    for left in (2, 1, 0):
        finish(cache, "a", 2.0)
        assert uses(cache, "a") == left


@pytest.mark.parametrize("model_id", ["a", "absent"])
def test_a_request_cannot_finish_twice(make_cache: MakeCache, model_id: str) -> None:
    cache = make_cache()
    hold(cache, "a", 10)
    with pytest.raises(ValueError, match="more often than it was requested"):
        finish(cache, model_id, 1.0)


def test_only_a_load_under_way_can_end(make_cache: MakeCache) -> None:
    cache = make_cache()
    hold(cache, "a", 10)
    for model_id in ("a", "absent"):
        with pytest.raises(ValueError, match="is not loading"):
            load_ended(cache, model_id, 1.0)
        with pytest.raises(ValueError, match="is not loading"):
            load_failed(cache, model_id, "oops", 1.0)


def test_a_required_preload_is_no_demand_and_no_use(make_cache: MakeCache) -> None:
    policy = Ranked()
    cache = make_cache(policy=policy)
    assert suggest(cache, profile("a"), 0.0, required=True) == Preload(profile("a"), ())
    assert suggest(cache, profile("a"), 0.0, required=True) is None
    assert uses(cache, "a") == 0
    assert (cache.counters.requests, cache.counters.loads, cache.counters.preloads) == (0, 0, 1)
    assert policy.told == [("load", "a")]


def test_every_model_that_takes_memory_is_listed(make_cache: MakeCache) -> None:
    cache = make_cache(pinned=["p"])
    hold(cache, "p", 10)
    cache.request(profile("a", 20), 0.0)
    assert cache.models() == (
        ResidentModel(model_id="p", state=ModelState.READY, size_bytes=10, uses=0, unevictable=True),
        ResidentModel(model_id="a", state=ModelState.LOADING, size_bytes=20, uses=1, unevictable=False),
    )
    assert cache.state("b") is None


@pytest.mark.parametrize(
    "wrong", [{"capacity_bytes": 0}, {"capacity_bytes": -1}, {"max_loads": 0}, {"max_preloads": -1}]
)
def test_a_senseless_cache_is_refused(make_cache: MakeCache, wrong: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(wrong))} must .*not {next(iter(wrong.values()))}"):
        make_cache(**wrong)


# Victims


def test_the_lowest_utilities_go_first(make_cache: MakeCache) -> None:
    cache = make_cache(policy=Ranked(a=3, b=1, c=2))
    for model_id in "abc":
        hold(cache, model_id, 30)
    assert cache.request(profile("d", 50), 1.0) == Load(("b", "c"))
    assert resident(cache) == {"a", "d"}
    assert cache.counters.evictions == 2


def test_nothing_goes_while_there_is_room(make_cache: MakeCache) -> None:
    cache = make_cache()
    hold(cache, "a", 60)
    assert cache.request(profile("b", 40), 1.0) == Load(())
    assert cache.used_bytes == 100


@pytest.mark.parametrize(("policy", "victims"), [(Ranked, ("small", "large")), (Trimming, ("large",))])
def test_victims_go_in_the_order_of_their_worth_unless_the_policy_trim_victims_ones(
    make_cache: MakeCache, policy: type[Ranked], victims: tuple[str, ...]
) -> None:
    cache = make_cache(policy=policy(small=1, large=2, dear=3))
    hold(cache, "small", 10)
    hold(cache, "large", 50)
    hold(cache, "dear", 40)
    # Large alone would be enough.
    assert cache.request(profile("new", 45), 1.0) == Load(victims)
    assert resident(cache) == {"small", "large", "dear", "new"} - set(victims)


def test_of_those_spared_none_has_lost_its_rank(make_cache: MakeCache) -> None:
    cache = make_cache(policy=Trimming(small=1, large=2, dear=3))
    for model_id, size in (("small", 10), ("large", 50), ("dear", 40)):
        hold(cache, model_id, size)
    cache.request(profile("new", 45), 1.0)
    assert cache.request(profile("next", 15), 2.0) == Load(("small",))


@BOTH
def test_a_larger_model_of_more_worth_is_not_taken_in_their_place(make_cache: MakeCache, policy: type[Ranked]) -> None:
    cache = make_cache(policy=policy(a=1, b=2, dear=3))
    hold(cache, "a", 20)
    hold(cache, "b", 20)
    hold(cache, "dear", 60)
    assert cache.request(profile("new", 40), 1.0) == Load(("a", "b"))


def test_models_of_equal_worth_go_in_the_order_in_which_they_came(make_cache: MakeCache) -> None:
    cache = make_cache()
    for model_id in "abc":
        hold(cache, model_id, 30)
    assert cache.request(profile("d", 30), 1.0) == Load(("a",))


def test_a_model_in_use_is_never_a_victim(make_cache: MakeCache) -> None:
    cache = make_cache(policy=Ranked(used=1, idle=2))
    hold(cache, "used", 50, in_use=True)
    hold(cache, "idle", 50)
    assert cache.request(profile("new", 50), 1.0) == Load(("idle",))


def test_a_loading_model_is_never_a_victim(make_cache: MakeCache) -> None:
    cache = make_cache(policy=Ranked(loading=1, idle=2))
    hold(cache, "idle", 50)
    cache.request(profile("loading", 50), 0.0)
    assert finish(cache, "loading", 0.0) == ()
    assert cache.request(profile("new", 50), 1.0) == Load(("idle",))


def test_a_pinned_model_is_never_a_victim(make_cache: MakeCache) -> None:
    cache = make_cache(policy=Ranked(p=1, a=2), pinned=["p"])
    hold(cache, "p", 50)
    hold(cache, "a", 50)
    assert cache.request(profile("new", 50), 1.0) == Load(("a",))


def test_nothing_is_evicted_unless_everything_needed_can_be(make_cache: MakeCache) -> None:
    cache = make_cache(policy=Ranked(idle=1, used=2))
    hold(cache, "idle", 40)
    hold(cache, "used", 60, in_use=True)
    assert isinstance(cache.request(profile("new", 80), 1.0), Wait)
    assert resident(cache) == {"idle", "used"}
    assert cache.counters.evictions == 0


def test_a_model_that_can_never_fit_is_refused(make_cache: MakeCache) -> None:
    policy = Ranked()
    cache = make_cache(policy=policy)
    hold(cache, "a", 50)
    answer = cache.request(profile("new", 101), 1.0)
    assert isinstance(answer, Reject)
    assert answer.reason is RejectReason.TOO_LARGE
    assert "101 bytes" in answer.detail
    assert resident(cache) == {"a"}
    assert cache.request(profile("whole", 100), 1.0) == Load(("a",))


def test_pinned_models_count_as_taken_for_ever(make_cache: MakeCache) -> None:
    cache = make_cache(pinned=["p"])
    hold(cache, "p", 40)
    answer = cache.request(profile("new", 61), 1.0)
    assert isinstance(answer, Reject)
    assert answer.reason is RejectReason.TOO_LARGE
    assert cache.request(profile("p", 40), 1.0) == Hit()
    assert cache.request(profile("fits", 60), 1.0) == Load(())


def test_the_policy_learns_of_every_request_and_every_change(make_cache: MakeCache) -> None:
    policy = Ranked()
    cache = make_cache(policy=policy)
    hold(cache, "a", 60)
    cache.request(profile("b", 60), 1.0)
    cache.request(profile("b", 60), 1.0)
    assert policy.told == [
        ("request", "a"), ("load", "a"), ("request", "b"), ("evict", "a"), ("load", "b"), ("request", "b"),
    ]  # fmt: skip


def test_forward_costs_reach_the_policy(make_cache: MakeCache) -> None:
    policy = Ranked()
    make_cache(policy=policy).handle(ForwardCostsChanged({"a": 0.25}), 0.0)
    assert policy.forward_s == {"a": 0.25}


def test_a_utility_that_has_grown_is_seen_without_an_announcement(make_cache: MakeCache) -> None:
    policy = Silent(a=1, b=2)
    cache = make_cache(policy=policy)
    for model_id in "ab":
        hold(cache, model_id, 50)
    policy.worth["a"] = 3
    assert cache.request(profile("new", 50), 1.0) == Load(("b",))


def test_a_utility_that_has_fallen_is_seen_when_it_is_announced(make_cache: MakeCache) -> None:
    policy = Ranked(a=1, b=2)
    cache = make_cache(policy=policy)
    for model_id in "ab":
        hold(cache, model_id, 50)
    policy.worth["b"] = 0
    assert cache.request(profile("new", 50), 1.0) == Load(("b",))


def test_a_utility_that_falls_while_its_model_is_drained_is_not_forgotten(make_cache: MakeCache) -> None:
    policy = Silent(a=10, b=5)
    cache = make_cache(policy=policy)
    for model_id in "ab":
        hold(cache, model_id, 50, in_use=True)
    ticket = ticket_of(cache.request(profile("large", 100), 0.0))
    policy.worth["a"] = 1
    policy.untold = ["a"]
    # A is free, but the large one needs both.
    assert finish(cache, "a", 1.0) == ()
    cancel_wait(cache, ticket, 1.0)
    finish(cache, "b", 1.0)
    assert cache.request(profile("new", 50), 2.0) == Load(("a",))


# Failed loads


def test_a_failed_load_gives_its_bytes_and_all_pins_back(make_cache: MakeCache) -> None:
    cache = make_cache()
    hold(cache, "good", 40)
    cache.request(profile("bad", 60), 0.0)
    cache.request(profile("bad", 60), 0.0)
    assert load_failed(cache, "bad", "checksum", 1.0) == ()
    assert cache.used_bytes == 40
    assert resident(cache) == {"good"}
    assert cache.counters.load_failures == 1
    with pytest.raises(ValueError, match="more often"):
        finish(cache, "bad", 1.0)


def test_a_failed_load_is_remembered_and_then_forgotten(make_cache: MakeCache) -> None:
    cache = make_cache(failure_memory_s=5.0)
    cache.request(profile("bad"), 0.0)
    load_failed(cache, "bad", "checksum", 1.0)
    assert cache.request(profile("bad"), 2.0) == Reject(RejectReason.LOAD_FAILED, "checksum", 4.0)
    assert cache.request(profile("bad"), 6.0) == Load(())


def test_a_remembered_failure_takes_no_good_model_down(make_cache: MakeCache) -> None:
    cache = make_cache()
    cache.request(profile("bad", 100), 0.0)
    load_failed(cache, "bad", "checksum", 0.0)
    hold(cache, "good", 100)
    assert isinstance(cache.request(profile("bad", 100), 1.0), Reject)
    assert resident(cache) == {"good"}


def test_a_failure_can_be_forgotten_by_hand(make_cache: MakeCache) -> None:
    cache = make_cache()
    cache.request(profile("bad"), 0.0)
    load_failed(cache, "bad", "checksum", 0.0)
    cache.handle(RetryAllowed("bad"), 0.0)
    cache.handle(RetryAllowed("never failed"), 0.0)
    assert cache.request(profile("bad"), 0.0) == Load(())


def test_a_failed_load_is_no_eviction_to_the_policy(make_cache: MakeCache) -> None:
    policy = Ranked()
    cache = make_cache(policy=policy)
    cache.request(profile("bad"), 0.0)
    load_failed(cache, "bad", "checksum", 0.0)
    assert policy.told[-1] == ("unload", "bad")
    assert cache.counters.evictions == 0


def test_requests_that_wait_for_a_model_learn_once_that_it_fails(make_cache: MakeCache) -> None:
    """Two requests for one model wait for a load slot; when its load fails, both hear of it exactly once."""
    cache = make_cache(max_loads=1)
    cache.request(profile("first"), 0.0)
    load = ticket_of(cache.request(profile("bad"), 0.0))
    join = ticket_of(cache.request(profile("bad"), 0.0))
    assert load_ended(cache, "first", 1.0) == (Grant(load, "bad", Load(())), Grant(join, "bad", Join()))
    late = ticket_of(cache.request(profile("other"), 1.0))
    assert load_failed(cache, "bad", "checksum", 2.0) == (Grant(late, "other", Load(())),)
    assert isinstance(cache.request(profile("bad"), 2.0), Reject)


def test_a_waiting_request_whose_model_failed_meanwhile_is_rejected(make_cache: MakeCache) -> None:
    cache = make_cache()
    hold(cache, "a", 100, in_use=True)
    large = ticket_of(cache.request(profile("large", 100), 0.0))
    bad = ticket_of(cache.request(profile("bad", 50), 0.0))
    again = ticket_of(cache.request(profile("bad", 50), 0.0))
    assert finish(cache, "a", 1.0) == (Grant(large, "large", Load(("a",))),)
    load_ended(cache, "large", 2.0)
    assert finish(cache, "large", 3.0) == (Grant(bad, "bad", Load(("large",))), Grant(again, "bad", Join()))
    load_failed(cache, "bad", "checksum", 4.0)
    assert cache.waiting == 0


# Limits


def test_no_more_loads_than_allowed_are_under_way(make_cache: MakeCache) -> None:
    cache = make_cache(max_loads=2)
    cache.request(profile("a"), 0.0)
    cache.request(profile("b"), 0.0)
    third, fourth = (ticket_of(cache.request(profile(model_id), 0.0)) for model_id in "cd")
    assert load_ended(cache, "a", 1.0) == (Grant(third, "c", Load(())),)
    assert load_failed(cache, "b", "checksum", 1.0) == (Grant(fourth, "d", Load(())),)


def test_a_request_that_waits_for_a_load_slot_turns_no_hit_away(make_cache: MakeCache) -> None:
    cache = make_cache(max_loads=1)
    hold(cache, "popular", 60)
    cache.request(profile("slow", 40), 0.0)
    ticket = ticket_of(cache.request(profile("new", 50), 0.0))
    assert cache.request(profile("popular", 60), 0.0) == Hit()
    # The slot is free, but not the memory: from now on the head of the queue comes first.
    assert load_ended(cache, "slow", 1.0) == ()
    assert isinstance(cache.request(profile("popular", 60), 1.0), Wait)
    assert finish(cache, "popular", 2.0)[0] == Grant(ticket, "new", Load(("popular",)))


def test_the_wait_queue_is_bounded(make_cache: MakeCache) -> None:
    cache = make_cache(max_waiting=1)
    hold(cache, "a", 100, in_use=True)
    cache.request(profile("b", 50), 0.0)
    answer = cache.request(profile("c", 50), 0.0)
    assert isinstance(answer, Reject)
    assert answer.reason is RejectReason.QUEUE_FULL
    assert answer.retry_s > 0
    assert cache.waiting == 1


def test_the_wait_queue_may_be_closed(make_cache: MakeCache) -> None:
    cache = make_cache(max_waiting=0)
    hold(cache, "a", 100, in_use=True)
    assert isinstance(cache.request(profile("b", 50), 0.0), Reject)


# The wait queue


def test_waiting_requests_are_answered_in_order_of_arrival(make_cache: MakeCache) -> None:
    cache = make_cache()
    hold(cache, "a", 100, in_use=True)
    tickets = [ticket_of(cache.request(profile(model_id, 30), 0.0)) for model_id in "bcd"]
    assert [grant.ticket for grant in finish(cache, "a", 1.0)] == tickets
    assert resident(cache) == {"b", "c", "d"}


def test_no_request_overtakes_the_head_of_the_queue(make_cache: MakeCache) -> None:
    cache = make_cache()
    hold(cache, "a", 90, in_use=True)
    large = ticket_of(cache.request(profile("large", 50), 0.0))
    # There is room for the small one, but taking it would make the large one wait longer.
    small = ticket_of(cache.request(profile("small", 10), 0.0))
    assert [grant.ticket for grant in finish(cache, "a", 1.0)] == [large, small]


def test_a_hit_need_not_wait(make_cache: MakeCache) -> None:
    cache = make_cache(policy=Ranked(a=1, b=2))
    hold(cache, "a", 50, in_use=True)
    hold(cache, "b", 50, in_use=True)
    cache.request(profile("new", 50), 0.0)
    assert cache.request(profile("b", 50), 0.0) == Hit()


def test_a_join_need_not_wait(make_cache: MakeCache) -> None:
    cache = make_cache()
    hold(cache, "a", 50, in_use=True)
    cache.request(profile("b", 50), 0.0)
    cache.request(profile("new", 50), 0.0)
    assert cache.request(profile("b", 50), 0.0) == Join()


def test_requests_that_wait_for_the_same_model_load_it_once(make_cache: MakeCache) -> None:
    cache = make_cache()
    hold(cache, "a", 100, in_use=True)
    tickets = [ticket_of(cache.request(profile("b", 50), 0.0)) for _ in range(3)]
    grants = finish(cache, "a", 1.0)
    assert [grant.ticket for grant in grants] == tickets
    assert [grant.answer for grant in grants] == [Load(("a",)), Join(), Join()]
    assert uses(cache, "b") == 3


def test_a_request_further_back_does_not_wait_for_the_head_if_its_model_stays(make_cache: MakeCache) -> None:
    cache = make_cache(policy=Ranked(a=1, b=2))
    hold(cache, "a", 50, in_use=True)
    hold(cache, "b", 50, in_use=True)
    first = ticket_of(cache.request(profile("large", 100), 0.0))
    second = ticket_of(cache.request(profile("c", 50), 0.0))
    third = ticket_of(cache.request(profile("b", 50), 0.0))
    # Only a is drained for c.
    assert cancel_wait(cache, first, 1.0) == (Grant(third, "b", Hit()),)
    assert finish(cache, "a", 2.0) == (Grant(second, "c", Load(("a",))),)


def test_a_large_model_does_not_starve(make_cache: MakeCache) -> None:
    """Two small models are asked for without a pause and never idle together; the large one gets in all the same."""
    cache = make_cache()
    hold(cache, "a", 50, in_use=True)
    hold(cache, "b", 50, in_use=True)
    large = ticket_of(cache.request(profile("large", 100), 0.0))
    late = [ticket_of(cache.request(profile(model_id, 50), 1.0)) for model_id in "ab"]
    assert finish(cache, "a", 2.0) == ()
    assert isinstance(cache.request(profile("a", 50), 2.0), Wait)
    assert finish(cache, "b", 3.0) == (Grant(large, "large", Load(("a", "b"))),)
    load_ended(cache, "large", 4.0)
    grants = finish(cache, "large", 5.0)
    assert [grant.ticket for grant in grants][:2] == late
    assert resident(cache) == {"a", "b"}


def test_only_what_must_leave_is_drained(make_cache: MakeCache) -> None:
    cache = make_cache(policy=Ranked(a=1, b=2, c=3))
    for model_id, size in (("a", 30), ("b", 30), ("c", 40)):
        hold(cache, model_id, size, in_use=True)
    cache.request(profile("new", 30), 0.0)
    assert isinstance(cache.request(profile("a", 30), 0.0), Wait)
    assert cache.request(profile("b", 30), 0.0) == Hit()
    assert cache.request(profile("c", 40), 0.0) == Hit()


@pytest.mark.parametrize(
    "policy",
    [
        Trimming,
        Ranked,
    ],
)
def test_models_that_are_no_longer_drained_take_requests_again(make_cache: MakeCache, policy: type[Ranked]) -> None:
    cache = make_cache(policy=policy(a=1, b=2))
    hold(cache, "a", 40, in_use=True)
    hold(cache, "b", 30, in_use=True)
    cache.request(profile("failing", 30), 0.0)
    cache.request(profile("new", 70), 0.0)
    blocked = ticket_of(cache.request(profile("b", 30), 0.0))
    # With the bytes of the failed load the larger one, a, is enough.
    assert load_failed(cache, "failing", "checksum", 1.0) == (Grant(blocked, "b", Hit()),)
    assert cache.request(profile("b", 30), 1.0) == Hit()
    assert isinstance(cache.request(profile("a", 40), 1.0), Wait)


def test_of_the_drained_models_only_those_leave_that_still_must(make_cache: MakeCache) -> None:
    cache = make_cache(policy=Ranked(a=1, b=2))
    hold(cache, "a", 40, in_use=True)
    hold(cache, "b", 30, in_use=True)
    cache.request(profile("failing", 30), 0.0)
    ticket = ticket_of(cache.request(profile("new", 70), 0.0))
    load_failed(cache, "failing", "checksum", 1.0)
    finish(cache, "b", 1.0)
    assert finish(cache, "a", 1.0) == (Grant(ticket, "new", Load(("a",))),)


@BOTH
def test_a_drained_model_leaves_whatever_it_is_worth_by_then(make_cache: MakeCache, policy: type[Ranked]) -> None:
    ranked = policy(x=1, d=2, b=3)
    cache = make_cache(capacity_bytes=140, policy=ranked)
    for model_id, size in (("x", 60), ("d", 40), ("b", 40)):
        hold(cache, model_id, size, in_use=True)
    ticket = ticket_of(cache.request(profile("new", 100), 0.0))
    finish(cache, "d", 1.0)
    finish(cache, "b", 1.0)
    ranked.worth["b"] = 0
    assert finish(cache, "x", 2.0) == (Grant(ticket, "new", Load(("x", "d"))),)


def test_when_the_head_gives_up_the_models_drained_for_it_are_used_again(make_cache: MakeCache) -> None:
    cache = make_cache()
    hold(cache, "a", 100, in_use=True)
    first = ticket_of(cache.request(profile("new", 50), 0.0))
    blocked = ticket_of(cache.request(profile("a", 100), 0.0))
    assert cancel_wait(cache, first, 1.0) == (Grant(blocked, "a", Hit()),)
    assert uses(cache, "a") == 2


def test_when_the_head_gives_up_the_next_request_may_load(make_cache: MakeCache) -> None:
    cache = make_cache()
    hold(cache, "a", 90, in_use=True)
    large = ticket_of(cache.request(profile("large", 50), 0.0))
    small = ticket_of(cache.request(profile("small", 10), 0.0))
    assert cancel_wait(cache, large, 1.0) == (Grant(small, "small", Load(())),)


def test_cancelling_a_wait_twice_or_too_late_does_nothing(make_cache: MakeCache) -> None:
    cache = make_cache()
    hold(cache, "a", 100, in_use=True)
    ticket = ticket_of(cache.request(profile("b", 50), 0.0))
    granted = finish(cache, "a", 1.0)
    assert granted == (Grant(ticket, "b", Load(("a",))),)
    assert cancel_wait(cache, ticket, 1.0) == ()
    assert cancel_wait(cache, 12345, 1.0) == ()
    assert uses(cache, "b") == 1


def test_a_waiting_request_that_has_become_too_large_is_rejected(make_cache: MakeCache) -> None:
    cache = make_cache(pinned=["p"], max_loads=1)
    cache.request(profile("p", 40), 0.0)
    load_failed(cache, "p", "checksum", 0.0)
    hold(cache, "a", 100, in_use=True)
    cache.handle(RetryAllowed("p"), 0.0)
    pinned = ticket_of(cache.request(profile("p", 40), 0.0))
    large = ticket_of(cache.request(profile("large", 80), 0.0))
    granted, refused = finish(cache, "a", 1.0)
    assert granted == Grant(pinned, "p", Load(("a",)))
    assert refused.ticket == large
    assert isinstance(refused.answer, Reject)
    assert refused.answer.reason is RejectReason.TOO_LARGE


# Unloading by hand


def test_unloading_by_hand_frees_the_bytes(make_cache: MakeCache) -> None:
    policy = Ranked()
    cache = make_cache(policy=policy)
    hold(cache, "a", 60)
    assert unload(cache, "a", 1.0) == ()
    assert cache.used_bytes == 0
    assert (cache.counters.unloads, cache.counters.evictions) == (1, 0)
    assert policy.told[-1] == ("unload", "a")


def test_unloading_by_hand_does_not_disturb_the_wait_queue(make_cache: MakeCache) -> None:
    cache = make_cache()
    hold(cache, "idle", 40)
    hold(cache, "busy", 60, in_use=True)
    ticket = ticket_of(cache.request(profile("large", 100), 0.0))
    assert unload(cache, "idle", 1.0) == ()
    assert finish(cache, "busy", 2.0) == (Grant(ticket, "large", Load(("busy",))),)


def test_what_is_not_here_cannot_be_unloaded(make_cache: MakeCache) -> None:
    with pytest.raises(NotFound, match="a is not loaded here"):
        unload(make_cache(), "a", 0.0)


def test_models_in_use_loading_or_pinned_cannot_be_unloaded(make_cache: MakeCache) -> None:
    cache = make_cache(pinned=["pinned"])
    hold(cache, "pinned", 10)
    hold(cache, "used", 10, in_use=True)
    cache.request(profile("loading"), 0.0)
    finish(cache, "loading", 0.0)
    for model_id, why in (("pinned", "is pinned"), ("used", "in use"), ("loading", "in use")):
        with pytest.raises(Conflict, match=why):
            unload(cache, model_id, 1.0)
    assert resident(cache) == {"pinned", "used", "loading"}


# Preloads that the policy chooses


def wanting(*wanted: ModelProfile, **worth: float) -> Ranked:
    policy = Ranked(**worth)
    policy.wanted = list(wanted)
    return policy


def preloading(cache: ModelCache, model: ModelProfile) -> None:
    """Begin a preload that no request has joined."""
    assert suggest(cache, model, 0.0, required=True) is not None


NEW = profile("new", 50)


def test_the_policy_learns_what_can_be_requested(make_cache: MakeCache) -> None:
    policy = Ranked()
    make_cache(policy=policy).handle(ModelsKnown([profile("a"), profile("b")]), 0.0)
    assert policy.told == [("know", "a"), ("know", "b")]


def test_an_accepted_candidate_is_loaded_and_is_no_request(make_cache: MakeCache) -> None:
    policy = wanting(NEW, old=1, new=2)
    cache = make_cache(policy=policy)
    hold(cache, "old", 100)
    policy.told.clear()
    assert tick(cache, 1.0) == Preload(NEW, ("old",))
    assert cache.state("new") is ModelState.LOADING
    assert uses(cache, "new") == 0
    assert policy.told == [("evict", "old"), ("load", "new")]
    assert (cache.counters.requests, cache.counters.loads, cache.counters.preloads) == (1, 1, 1)
    assert load_ended(cache, "new", 2.0) == ()
    assert cache.request(NEW, 3.0) == Hit()


def test_a_candidate_that_is_not_worth_its_victims_changes_nothing(make_cache: MakeCache) -> None:
    policy = wanting(NEW, old=2, new=1)
    cache = make_cache(policy=policy)
    hold(cache, "old", 100)
    assert tick(cache, 1.0) is None
    assert resident(cache) == {"old"}
    policy.worth["old"] = 0.5
    assert tick(cache, 1.0) == Preload(NEW, ("old",))


def test_candidates_that_cannot_be_loaded_now_are_passed_over(make_cache: MakeCache) -> None:
    """One is here, one has just failed, one can never fit, one would have to displace what is in use."""
    here, failed, huge, large = profile("here", 40), profile("failed"), profile("huge", 101), profile("large", 80)
    policy = wanting(here, failed, huge, large, profile("small"), small=1, large=1, huge=1, failed=1)
    cache = make_cache(policy=policy)
    hold(cache, "here", 40, in_use=True)
    cache.request(failed, 0.0)
    load_failed(cache, "failed", "checksum", 0.0)
    assert tick(cache, 1.0) == Preload(profile("small"), ())
    load_ended(cache, "small", 1.0)
    assert tick(cache, 5.0) == Preload(failed, ())


def test_no_more_preloads_than_allowed_are_under_way_and_they_take_no_slot_of_others(make_cache: MakeCache) -> None:
    wanted = [profile(model_id) for model_id in "abc"]
    cache = make_cache(policy=wanting(*wanted, a=3, b=2, c=1), max_loads=1, max_preloads=2)
    both = decided(cache.handle(TICK, 0.0))
    assert both.preloads == (Preload(wanted[0], ()), Preload(wanted[1], ()))
    assert tick(cache, 0.0) is None
    assert suggest(cache, wanted[2], 0.0) is None
    assert cache.request(profile("asked"), 0.0) == Load(())
    load_failed(cache, "a", "checksum", 1.0)
    assert tick(cache, 1.0) == Preload(wanted[2], ())


def test_without_preloads_none_is_made(make_cache: MakeCache) -> None:
    cache = make_cache(policy=wanting(NEW, new=1), max_preloads=0)
    assert tick(cache, 0.0) is None
    assert suggest(cache, NEW, 0.0) is None
    assert cache.next_tick_s == math.inf


def test_a_request_joins_a_preload_under_way_and_holds_it(make_cache: MakeCache) -> None:
    cache = make_cache(policy=Ranked(new=1))
    preloading(cache, NEW)
    assert cache.request(NEW, 1.0) == Join()
    # It is no guess any more.
    assert isinstance(cache.request(profile("large", 60), 1.0), Wait)
    load_ended(cache, "new", 2.0)
    assert finish(cache, "new", 2.0)[0].answer == Load(("new",))
    assert cache.counters.wasted_preloads == 0


def test_the_join_of_a_preload_frees_its_slot_only_when_it_has_ended(make_cache: MakeCache) -> None:
    cache = make_cache(policy=wanting(profile("other"), new=1, other=1))
    preloading(cache, NEW)
    cache.request(NEW, 0.5)
    assert tick(cache, 0.5) is None
    load_ended(cache, "new", 1.0)
    assert tick(cache, 1.0) == Preload(profile("other"), ())


def test_a_preload_that_no_request_has_joined_may_leave_while_it_loads(make_cache: MakeCache) -> None:
    policy = wanting(profile("next"), new=1, next=1)
    cache = make_cache(policy=policy)
    preloading(cache, NEW)
    assert cache.request(profile("large", 90), 1.0) == Load(("new",))
    assert cache.state("new") is None
    assert ("evict", "new") in policy.told
    assert (cache.counters.preloads, cache.counters.wasted_preloads, cache.counters.evictions) == (1, 1, 1)
    with pytest.raises(ValueError, match="is not loading"):
        load_ended(cache, "new", 1.0)
    # Its slot is free.
    assert tick(cache, 1.0) == Preload(profile("next"), ())


def test_a_preload_that_leaves_before_any_request_was_wasted(make_cache: MakeCache) -> None:
    cache = make_cache(policy=Ranked(new=1, bad=1))
    preloading(cache, NEW)
    load_ended(cache, "new", 1.0)
    unload(cache, "new", 2.0)
    preloading(cache, profile("bad"))
    load_failed(cache, "bad", "checksum", 3.0)
    assert (cache.counters.preloads, cache.counters.wasted_preloads) == (2, 2)


def test_what_an_operator_unloaded_stays_away_until_a_request_comes_for_it(make_cache: MakeCache) -> None:
    cache = make_cache(policy=wanting(NEW, new=1))
    hold(cache, "new", 50)
    unload(cache, "new", 1.0)
    assert tick(cache, 2.0) is None
    assert suggest(cache, NEW, 2.0) is None
    assert cache.request(NEW, 3.0) == Load(())
    load_failed(cache, "new", "checksum", 3.0)
    assert tick(cache, 60.0) == Preload(NEW, ())


def test_a_preload_that_was_requested_was_not_wasted(make_cache: MakeCache) -> None:
    cache = make_cache(policy=Ranked(new=1))
    preloading(cache, NEW)
    load_ended(cache, "new", 1.0)
    assert cache.request(NEW, 1.0) == Hit()
    finish(cache, "new", 2.0)
    unload(cache, "new", 3.0)
    assert cache.counters.wasted_preloads == 0


def test_nothing_is_preloaded_while_requests_wait(make_cache: MakeCache) -> None:
    cache = make_cache(policy=wanting(profile("tiny", 1), tiny=1))
    hold(cache, "a", 90, in_use=True)
    ticket = ticket_of(cache.request(profile("large", 60), 0.0))
    assert tick(cache, 0.0) is None
    assert suggest(cache, profile("tiny", 1), 0.0) is None
    assert cache.next_tick_s == math.inf
    cancel_wait(cache, ticket, 1.0)
    assert tick(cache, 1.0) == Preload(profile("tiny", 1), ())


def test_a_drained_preload_takes_no_requests(make_cache: MakeCache) -> None:
    cache = make_cache(policy=Ranked(new=1, busy=2))
    preloading(cache, NEW)
    hold(cache, "busy", 50, in_use=True)
    ticket = ticket_of(cache.request(profile("large", 100), 1.0))
    assert isinstance(cache.request(NEW, 1.0), Wait)
    assert finish(cache, "busy", 2.0)[0] == Grant(ticket, "large", Load(("new", "busy")))


def test_a_pinned_model_that_was_preloaded_stays(make_cache: MakeCache) -> None:
    cache = make_cache(policy=wanting(NEW, new=1), pinned=["new"])
    assert tick(cache, 0.0) == Preload(NEW, ())
    assert isinstance(cache.request(profile("large", 60), 0.0), Reject)
    load_ended(cache, "new", 1.0)
    with pytest.raises(Conflict, match="is pinned"):
        unload(cache, "new", 1.0)


def test_when_to_ask_again_is_what_the_policy_says_while_a_preload_may_begin(make_cache: MakeCache) -> None:
    policy = Ranked(new=1)
    policy.next_review_s = 42.0
    cache = make_cache(policy=policy)
    assert cache.next_tick_s == 42.0
    preloading(cache, NEW)
    assert cache.next_tick_s == math.inf
    load_ended(cache, "new", 1.0)
    assert cache.next_tick_s == 42.0


# Suggested preloads


def test_a_suggestion_is_followed_where_it_displaces_only_what_is_worth_less(make_cache: MakeCache) -> None:
    policy = Ranked(old=1, new=2)
    cache = make_cache(policy=policy)
    hold(cache, "old", 100)
    assert suggest(cache, NEW, 1.0) == Preload(NEW, ("old",))
    assert (cache.counters.preloads, cache.counters.loads) == (1, 1)
    assert policy.told[-2:] == [("evict", "old"), ("load", "new")]


@pytest.mark.parametrize("worth", [1, 2])
def test_a_suggestion_displaces_nothing_that_is_worth_as_much(make_cache: MakeCache, worth: int) -> None:
    cache = make_cache(policy=Ranked(old=worth, new=1))
    hold(cache, "old", 100)
    assert suggest(cache, NEW, 1.0) is None
    assert resident(cache) == {"old"}
    # The resident model has kept its rank.
    assert cache.request(NEW, 1.0) == Load(("old",))


def test_a_suggestion_that_cannot_be_followed_changes_nothing(make_cache: MakeCache) -> None:
    cache = make_cache(policy=Ranked(new=9, failed=9, huge=9), failure_memory_s=5.0)
    hold(cache, "busy", 60, in_use=True)
    cache.request(profile("failed"), 0.0)
    load_failed(cache, "failed", "checksum", 0.0)
    for model in (profile("busy", 60), profile("failed"), profile("huge", 101), NEW):
        assert suggest(cache, model, 1.0) is None
    assert resident(cache) == {"busy"}
    assert cache.counters.preloads == 0
    assert suggest(cache, profile("failed"), 5.0) == Preload(profile("failed"), ())


def test_a_model_that_cannot_be_loaded_is_preloaded_ever_more_rarely(make_cache: MakeCache) -> None:
    cache = make_cache(policy=Ranked(failed=9), failure_memory_s=5.0)
    now = 0.0
    for wait_s in (5.0, 10.0, 20.0, 40.0):
        assert suggest(cache, profile("failed"), now) == Preload(profile("failed"), ())
        load_failed(cache, "failed", "checksum", now)
        assert suggest(cache, profile("failed"), now + wait_s - 0.1) is None
        now += wait_s
    # A request is not held up by that, and a load that ends well is the end of it.
    assert cache.request(profile("failed"), now - 30.0) == Load(())
    load_ended(cache, "failed", now)
    finish(cache, "failed", now)
    cache.handle(UnloadRequested("failed"), now)
    cache.request(profile("failed"), now)
    load_failed(cache, "failed", "checksum", now)
    assert suggest(cache, profile("failed"), now + 5.0) == Preload(profile("failed"), ())


def test_pinned_models_are_preloaded_one_at_a_time_even_where_nothing_else_is(make_cache: MakeCache) -> None:
    cache = make_cache(policy=wanting(profile("other"), other=1), pinned=["new", "next"], max_preloads=0)
    assert suggest(cache, profile("other"), 0.0, required=True) is None
    assert suggest(cache, NEW, 0.0, required=True) == Preload(NEW, ())
    assert suggest(cache, profile("next"), 0.0, required=True) is None
    assert cache.next_tick_s == math.inf
    load_ended(cache, "new", 1.0)
    assert cache.next_tick_s <= 1.0
    assert tick(cache, 1.0) == Preload(profile("next"), ())
    load_ended(cache, "next", 2.0)
    assert tick(cache, 2.0) is None
    assert cache.next_tick_s == math.inf
