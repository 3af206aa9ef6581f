"""Which copies are advised, in sums that can be done in the head, and what holds whatever the cluster looks like.

A load takes 1 s, a forward 0.1 s, a model 10 bytes, unless a test says otherwise.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping

import pytest
from core_support import Ranked, finish, load_ended, profile, report, resident, suggest
from hypothesis import given, settings
from hypothesis import strategies as st

from serve_app.core.cache.decisions import Load
from serve_app.core.cache.events import LoadImpossible
from serve_app.core.cache.model_cache import ModelCache
from serve_app.core.catalog import ModelProfile
from serve_app.core.cluster.commands import Command, PreloadAt, WithdrawAt
from serve_app.core.cluster.reports import WorkerReport
from serve_app.core.links import Link
from serve_app.core.placement.controller import PlacementController
from serve_app.core.placement.rules import PlacementRules, PlacementSettings
from serve_app.core.routing.rules import RoutingRules
from serve_app.core.vocabulary import ModelState

EAGER = PlacementRules(share_per_round=1.0, hysteresis=1.5, payback_s=1e9, patience_s=10.0, repeat_s=60.0)
ABC = [profile(name) for name in "abc"]


def routing(profiles: Iterable[ModelProfile], links: Mapping[tuple[str, str], Link] | None = None) -> RoutingRules:
    return RoutingRules(
        profiles={model.model_id: model for model in profiles},
        links=links or {},
        default_link=Link(rtt_s=0.1, bytes_per_s=1000.0),
        horizon_s=10.0,
    )


def placement(
    profiles: Iterable[ModelProfile] = ABC,
    rules: PlacementRules = EAGER,
    links: Mapping[tuple[str, str], Link] | None = None,
) -> PlacementController:
    return PlacementController(
        PlacementSettings(routing=routing(profiles, links), every_s=1.0, payload_bytes=0, rules=rules)
    )


def site(location: str, *names: str, capacity: int = 20) -> WorkerReport:
    return report(location, capacity=capacity, models=[resident(name) for name in names])


def preload(location: str, model_id: str) -> PreloadAt:
    return PreloadAt(location=location, replica=f"{location}-1", model_id=model_id)


def withdraw(location: str, model_id: str) -> WithdrawAt:
    return WithdrawAt(location=location, replica=f"{location}-1", model_id=model_id)


# One round


def test_what_is_wanted_and_nowhere_is_loaded_where_it_is_wanted_most() -> None:
    sites = [site("oslo", capacity=10), site("paris", capacity=10)]
    rates = {"oslo": {"a": 1.0, "b": 0.1}, "paris": {"a": 0.1}}
    # The copy at Oslo saves 1 + 0.1 x 0.9; one of b at Paris 0.1 x 0.9, one of a there only 0.1 x 0.1.
    assert placement().round(sites, rates, 0.0) == (preload("oslo", "a"), preload("paris", "b"))


def test_without_demand_nothing_is_done() -> None:
    assert placement().round([site("oslo", "a")], {}, 0.0) == ()
    assert placement().round([], {"oslo": {"a": 1.0}}, 0.0) == ()


def test_a_duplicate_takes_free_memory_where_it_saves_latency() -> None:
    sites = [site("oslo", "a"), site("paris", "b")]
    assert placement().round(sites, {"paris": {"a": 1.0}}, 0.0) == (preload("paris", "a"),)


def test_a_location_near_two_others_may_hold_for_both() -> None:
    links = {("oslo", "rome"): Link(rtt_s=0.9, bytes_per_s=1e9)}
    sites = [site("oslo", capacity=1), site("paris", capacity=10), site("rome", capacity=1)]
    rates = {"oslo": {"a": 1.0}, "rome": {"a": 1.0}}
    assert placement(links=links).round(sites, rates, 0.0) == (preload("paris", "a"),)


def test_a_duplicate_goes_before_a_last_copy() -> None:
    # Both residents of Paris are asked for alike, but a is at Oslo as well, so only its way would be lost.
    sites = [site("oslo", "a", capacity=10), site("paris", "a", "b")]
    rates = {"paris": {"a": 1.0, "b": 1.0, "c": 1.0}}
    assert placement().round(sites, rates, 0.0) == (withdraw("paris", "a"), preload("paris", "c"))


def test_a_last_copy_that_is_wanted_does_not_go_for_a_duplicate() -> None:
    sites = [site("oslo", "a", capacity=10), site("paris", "b", capacity=10)]
    # A second copy of a would save 0.1 s a thousand times a second; b is worth a thousandth of that.
    rates = {"paris": {"a": 1000.0, "b": 0.1}}
    assert placement().round(sites, rates, 0.0) == ()
    assert placement().round(sites, {"paris": {"a": 1000.0}}, 0.0) == (withdraw("paris", "b"), preload("paris", "a"))


def test_both_copies_of_a_model_do_not_go_in_one_round() -> None:
    links = {("oslo", "paris"): Link(rtt_s=0.01, bytes_per_s=1e9)}
    sites = [site("oslo", "a", capacity=10), site("paris", "a", capacity=10)]
    rates = {"oslo": {"a": 1.0, "b": 1.0}, "paris": {"a": 1.0, "c": 1.0}}
    commands = placement(links=links).round(sites, rates, 0.0)
    assert [type(command) for command in commands] == [WithdrawAt, PreloadAt]


@pytest.mark.parametrize(("rate", "moved"), [(1.4, False), (1.6, True)])
def test_a_copy_displaces_another_only_if_it_is_clearly_worth_more(rate: float, moved: bool) -> None:
    commands = placement().round([site("oslo", "a", capacity=10)], {"oslo": {"a": 1.0, "b": rate}}, 0.0)
    assert bool(commands) is moved


@pytest.mark.parametrize(("rate", "loaded"), [(0.009, False), (0.011, True)])
def test_a_load_must_pay_for_itself_in_time(rate: float, loaded: bool) -> None:
    rules = dataclasses.replace(EAGER, payback_s=100.0)
    assert bool(placement(rules=rules).round([site("oslo")], {"oslo": {"a": rate}}, 0.0)) is loaded


@pytest.mark.parametrize("stays", [{"pinned": True}, {"state": ModelState.LOADING}])
def test_what_is_pinned_or_loading_stays(stays: Mapping[str, object]) -> None:
    held = resident("a", **stays)  # type: ignore[arg-type]
    sites = [report("oslo", capacity=10, models=[held])]
    assert placement().round(sites, {"oslo": {"b": 1.0}}, 0.0) == ()


def test_a_small_model_is_spared_when_its_bytes_are_not_needed() -> None:
    models = [profile("small", 1), profile("large", 9), profile("new", 9)]
    held = [resident("small", 1), resident("large", 9)]
    rates = {"oslo": {"large": 0.1, "new": 1.0}}
    commands = placement(models).round([report("oslo", capacity=10, models=held)], rates, 0.0)
    assert commands == (withdraw("oslo", "large"), preload("oslo", "new"))


# Several rounds


def test_a_model_under_way_counts_as_held() -> None:
    rounds = placement()
    sites, rates = [site("oslo"), site("paris")], {"oslo": {"a": 1.0}}
    assert rounds.round(sites, rates, 0.0) == (preload("oslo", "a"),)
    assert rounds.round(sites, rates, 5.0) == ()


def test_an_order_that_came_to_nothing_is_given_again_after_a_while() -> None:
    rounds = placement()
    sites, rates = [site("oslo")], {"oslo": {"a": 1.0}}
    given = [now for now in range(0, 130, 5) if rounds.round(sites, rates, float(now))]
    assert given == [0, 65]


def test_what_was_just_placed_is_not_displaced_by_what_is_asked_for_next() -> None:
    rounds = placement()
    assert rounds.round([site("oslo", capacity=10)], {"oslo": {"a": 1.0}}, 0.0) == (preload("oslo", "a"),)
    held = [site("oslo", "a", capacity=10)]
    assert rounds.round(held, {"oslo": {"a": 0.1, "b": 9.0}}, 30.0) == ()
    assert rounds.round(held, {"oslo": {"a": 0.1, "b": 9.0}}, 61.0) == (withdraw("oslo", "a"), preload("oslo", "b"))


@pytest.mark.parametrize(
    "wrong", [{"share_per_round": 0.0}, {"share_per_round": 1.1}, {"hysteresis": 0.9}, {"payback_s": 0.0}]
)
def test_rules_are_checked_at_birth(wrong: Mapping[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        PlacementRules(**wrong)


# How a worker's cache takes advice


def holding(*names: str, **worth: float) -> ModelCache:
    """A cache of two models' size that has loaded some; their utilities are as given."""
    cache = ModelCache(capacity_bytes=20, policy=Ranked(**worth))
    for name in names:
        cache.request(profile(name), 0.0)
        load_ended(cache, name, 0.0)
        finish(cache, name, 0.0)
    return cache


def test_advice_is_followed_into_free_memory() -> None:
    cache = holding("a")
    advised = suggest(cache, profile("b"), 1.0)
    assert advised is not None
    assert (advised.model.model_id, advised.victims) == ("b", ())
    assert cache.state("b") is ModelState.LOADING
    assert (cache.counters.preloads, cache.used_bytes) == (1, 20)


@pytest.mark.parametrize(("worth", "followed"), [(0.9, False), (1.0, False), (1.1, True)])
def test_advice_displaces_only_what_is_worth_less_here(worth: float, followed: bool) -> None:
    cache = holding("a", "b", a=1.0, b=2.0, c=worth)
    advised = suggest(cache, profile("c"), 1.0)
    assert (advised.victims if advised else None) == (("a",) if followed else None)
    assert cache.used_bytes == 20


def test_commands_do_not_wait_and_requests_do_not_wait_for_them() -> None:
    cache = holding("a", "b", c=9.0, d=9.0)
    cache.request(profile("a"), 1.0)
    cache.request(profile("b"), 1.0)
    assert suggest(cache, profile("c"), 1.0) is None
    finish(cache, "a", 2.0)
    assert suggest(cache, profile("c"), 2.0) is not None
    assert suggest(cache, profile("d"), 2.0) is None
    # A request takes the memory of a load that nobody has asked for.
    answer = cache.request(profile("d"), 2.0)
    assert isinstance(answer, Load)
    assert answer.victims == ("c",)
    assert cache.counters.wasted_preloads == 1


def test_advice_to_load_what_is_here_or_has_just_failed_is_ignored() -> None:
    cache = holding("a")
    assert suggest(cache, profile("a"), 1.0) is None
    cache.handle(LoadImpossible("b", "broken"), 1.0)
    assert suggest(cache, profile("b"), 2.0) is None
    assert suggest(cache, profile("c", 21), 2.0) is None
    assert cache.counters.preloads == 0


# Whatever the cluster looks like

_RATE = st.sampled_from([0.0, 0.001, 0.01, 0.1, 1.0, 10.0])


@st.composite
def clusters(draw: st.DrawFn) -> tuple[list[ModelProfile], list[WorkerReport], dict[str, dict[str, float]]]:
    sizes = draw(st.lists(st.integers(1, 30), min_size=1, max_size=8))
    models = [profile(f"m{n}", size, load_s=draw(st.sampled_from([0.05, 1.0, 5.0]))) for n, size in enumerate(sizes)]
    sites, rates = [], {}
    for number in range(draw(st.integers(1, 4))):
        capacity, held, used = draw(st.integers(10, 80)), [], 0
        for model in models:
            if used + model.size_bytes <= capacity and draw(st.booleans()):
                held.append(resident(model.model_id, model.size_bytes, pinned=draw(st.integers(0, 9)) == 0))
                used += model.size_bytes
        sites.append(report(f"loc{number}", capacity=capacity, models=held))
        rates[f"loc{number}"] = {model.model_id: draw(_RATE) for model in models}
    return models, sites, rates


def carried_out(
    sites: list[WorkerReport], commands: Iterable[Command], profiles: Mapping[str, ModelProfile]
) -> list[WorkerReport]:
    """The cluster after every order was followed to the letter."""
    models = {worker.replica: dict(worker.models) for worker in sites}
    for command in commands:
        held = models[command.replica]
        match command:
            case WithdrawAt(model_id=model_id):
                assert not held.pop(model_id).unevictable
            case PreloadAt(model_id=model_id):
                assert model_id not in held
                held[model_id] = resident(model_id, profiles[model_id].size_bytes)
    return [
        dataclasses.replace(
            worker,
            models=models[worker.replica],
            used_bytes=sum(model.size_bytes for model in models[worker.replica].values()),
        )
        for worker in sites
    ]


def cost_per_s(sites: list[WorkerReport], rates: Mapping[str, Mapping[str, float]], rules: RoutingRules) -> float:
    """Seconds that all locations lose per second."""
    total = 0.0
    for location, asked in rates.items():
        for model_id, per_s in asked.items():
            profile = rules.profiles[model_id]
            way_s = {
                worker.replica: 0.0 if worker.location == location else rules.link(location, worker.location).rtt_s
                for worker in sites
            }
            held = [way_s[worker.replica] for worker in sites if model_id in worker.models]
            # Its own worker may be too small to load it.
            large = [way_s[worker.replica] for worker in sites if worker.capacity_bytes >= profile.size_bytes]
            total += per_s * min([profile.load_s + min(large or way_s.values()), *held])
    return total


@settings(max_examples=150, deadline=None)
@given(clusters(), st.sampled_from([0.1, 0.5, 1.0]))
def test_every_round_stays_within_its_bounds_helps_and_there_is_a_last_one(
    cluster: tuple[list[ModelProfile], list[WorkerReport], dict[str, dict[str, float]]], share: float
) -> None:
    models, sites, rates = cluster
    rules = dataclasses.replace(EAGER, share_per_round=share, repeat_s=1.0, patience_s=1.0)
    rounds, route = placement(models, rules), routing(models)
    for number in range(100):
        commands = rounds.round(sites, rates, 10.0 * number)
        if not commands:
            break
        after = carried_out(sites, commands, route.profiles)
        assert cost_per_s(after, rates, route) < cost_per_s(sites, rates, route)
        for worker in after:
            assert worker.used_bytes <= worker.capacity_bytes
            sizes = {
                kind: sum(
                    route.profiles[command.model_id].size_bytes
                    for command in commands
                    if isinstance(command, kind) and command.replica == worker.replica
                )
                for kind in (PreloadAt, WithdrawAt)
            }
            loads = [command for command in commands if isinstance(command, PreloadAt)]
            alone = sum(command.replica == worker.replica for command in loads) == 1
            assert alone or max(sizes.values()) <= share * worker.capacity_bytes
        sites = after
    else:
        pytest.fail("placement does not settle")


def test_the_same_cluster_gets_the_same_commands_however_it_is_listed() -> None:
    sites = [site(location, capacity=10) for location in ("oslo", "paris", "rome")]
    rates = {location: dict.fromkeys("abc", 1.0) for location in ("oslo", "paris", "rome")}
    backwards = {location: dict(reversed(asked.items())) for location, asked in reversed(rates.items())}
    assert placement().round(sites, rates, 0.0) == placement().round(sites[::-1], backwards, 0.0)
