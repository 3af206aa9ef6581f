"""How a worker's memory is divided, and what models leave to bytes that no accounting covers."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
from core_support import Ranked, assert_accounting_adds_up, decided, finish, load_ended, profile, suggest, tick

from serve_app.core.cache.decisions import Hit, Load, Reject, Wait
from serve_app.core.cache.events import ProtectedChanged, UnaccountedChanged
from serve_app.core.cache.model_cache import ModelCache
from serve_app.core.catalog import PublishedModel
from serve_app.core.contract import Axis, Contract, SizeCost, TensorSpec
from serve_app.core.memory_budget import MemoryBudget, MemoryGuard, ProcessMemory, divide
from serve_app.core.task import TaskSpec

BASE = ProcessMemory(anonymous_bytes=300, file_bytes=100)
BUDGET = MemoryBudget(capacity_bytes=1000, workspace_bytes=100)


def model(name: str, weights: int, workspace: int) -> PublishedModel:
    return PublishedModel(
        model_id=name,
        builder="tests:factory",
        family=None,
        weights_requested="random:0",
        weights_actual="random:0",
        dtype="float32",
        pinned=False,
        runtime="torch",
        contract=Contract(
            inputs=(TensorSpec(name="input", datatype="FP32", shape=(1,)),),
            outputs=(TensorSpec(name="output", datatype="FP32", shape=(1,)),),
        ),
        task=TaskSpec(),
        row_by_row=False,
        weights_bytes=weights,
        workspace_bytes=workspace,
        profile=profile(name, weights),
    )


def grown(anonymous: int = 0, files: int = 0) -> ProcessMemory:
    return ProcessMemory(anonymous_bytes=300 + anonymous, file_bytes=100 + files)


# Dividing


def test_every_slot_has_room_for_the_largest_workspace() -> None:
    assert divide(1000, [model("a", 500, 100), model("b", 10, 40)], exec_slots=2) == MemoryBudget(
        capacity_bytes=1000, workspace_bytes=200
    )


def test_workspace_for_all_slots_takes_no_more_than_a_quarter() -> None:
    assert divide(1000, [model("a", 500, 100)], exec_slots=8).workspace_bytes == 250


def test_one_execution_always_has_room() -> None:
    assert divide(1000, [model("a", 500, 400)], exec_slots=8).workspace_bytes == 400


def test_a_model_that_can_never_run_takes_no_room_from_others() -> None:
    assert divide(1000, [model("a", 500, 50), model("huge", 900, 200)], exec_slots=1).workspace_bytes == 50


def with_free_side(name: str, weights: int, at_middle: int, at_most: int) -> PublishedModel:
    """A model that takes images of 4 to 64 pixels."""
    return dataclasses.replace(
        model(name, weights, at_most),
        contract=Contract(
            inputs=(TensorSpec(name="input", datatype="FP32", shape=(-1,), axes=("side",)),),
            outputs=(TensorSpec(name="output", datatype="FP32", shape=(1,)),),
            axes=(Axis(name="side", least=4, most=64),),
        ),
        costs=(
            SizeCost(sizes=(4,), workspace_bytes=1, exec_s=0.1),
            SizeCost(sizes=(16,), workspace_bytes=at_middle, exec_s=0.1),
            SizeCost(sizes=(64,), workspace_bytes=at_most, exec_s=0.1),
        ),
    )


def test_the_largest_sizes_of_a_model_do_not_take_the_memory_from_all_models() -> None:
    assert divide(1000, [model("a", 500, 40), with_free_side("det", 10, 30, 1600)], exec_slots=2).workspace_bytes == 250


def test_an_execution_of_the_usual_size_has_room_in_any_case() -> None:
    assert divide(1000, [with_free_side("det", 10, 300, 900)], exec_slots=2).workspace_bytes == 300


def test_whatever_fits_into_both_parts_fits_into_the_whole() -> None:
    models = [model("a", 900, 30), model("b", 960, 50), model("c", 100, 20)]
    budget = divide(1000, models, exec_slots=1)
    fitting = [m for m in models if m.weights_bytes <= budget.model_capacity_bytes and m.workspace_bytes <= 30]
    assert all(m.weights_bytes + m.workspace_bytes <= 1000 for m in fitting)


def test_memory_without_models_is_for_models() -> None:
    assert divide(1000, [], exec_slots=2) == MemoryBudget(capacity_bytes=1000, workspace_bytes=0)


def test_models_get_something_whatever_one_execution_wants() -> None:
    assert (
        divide(1000, [dataclasses.replace(model("a", 1, 1000), weights_bytes=0)], exec_slots=1).model_capacity_bytes
        == 1
    )


# Looking


@pytest.mark.parametrize(
    ("now", "used", "beyond"),
    [
        (grown(), 0, 0),
        (grown(anonymous=100), 0, 0),
        (grown(anonymous=140), 0, 40),
        (grown(anonymous=100, files=500), 500, 0),
        (grown(anonymous=100, files=530), 500, 30),
        # Models that were mapped and not touched do not hide what the process has grown by.
        (grown(anonymous=140, files=0), 500, 40),
        (grown(anonymous=0, files=0), 500, 0),
        (grown(anonymous=-50, files=-50), 0, 0),
    ],
)
def test_what_is_beyond_the_accounting(now: ProcessMemory, used: int, beyond: int) -> None:
    assert MemoryGuard(BASE, step_bytes=10).beyond_bytes(now, BUDGET, used) == beyond


def test_weights_in_memory_of_a_librarys_own_are_not_counted_twice() -> None:
    guard = MemoryGuard(BASE, step_bytes=10)
    assert guard.beyond_bytes(grown(anonymous=600), BUDGET, 500, own_bytes=500) == 0
    assert guard.beyond_bytes(grown(anonymous=640), BUDGET, 500, own_bytes=500) == 40
    # The rest is mapped, and not touched yet.
    assert guard.beyond_bytes(grown(anonymous=440), BUDGET, 500, own_bytes=300) == 40


def looked(guard: MemoryGuard, beyond: int, since: float, until: float) -> list[int]:
    return [guard.update(beyond, since + 0.25 * turn) for turn in range(int((until - since) * 4))]


def test_growth_that_stays_is_unaccounted_whole_and_smoothly() -> None:
    held = looked(MemoryGuard(BASE, step_bytes=10), 95, 0, 10)
    assert held[0] == 0
    assert held == sorted(held)
    assert held[-1] == 100
    assert max(after - before for before, after in itertools.pairwise(held)) <= 30


def test_what_is_gone_is_given_back_whole() -> None:
    guard = MemoryGuard(BASE, step_bytes=10)
    looked(guard, 95, 0, 10)
    held = looked(guard, 0, 10, 80)
    assert held == sorted(held, reverse=True)
    assert held[-1] == 0


def test_a_moments_peak_moves_nothing() -> None:
    guard = MemoryGuard(BASE, step_bytes=100)
    looked(guard, 0, 0, 5)
    assert guard.update(150, 5.0) == 0
    assert looked(guard, 0, 5.25, 10) == [0] * 19


def test_noise_around_a_level_changes_nothing() -> None:
    guard = MemoryGuard(BASE, step_bytes=10)
    looked(guard, 95, 0, 10)
    assert {guard.update(95 + (-1) ** turn * 5, 10 + 0.25 * turn) for turn in range(400)} == {100}


def test_growth_below_half_a_step_is_none() -> None:
    assert set(looked(MemoryGuard(BASE, step_bytes=10), 4, 0, 20)) == {0}


def test_steps_of_nothing_are_refused() -> None:
    with pytest.raises(ValueError, match="step_bytes"):
        MemoryGuard(BASE, step_bytes=0)


# Unaccounted bytes


def holding(*names: str, capacity: int = 100, size: int = 30) -> ModelCache:
    cache = ModelCache(capacity_bytes=capacity, policy=Ranked(**{name: rank for rank, name in enumerate(names)}))
    for name in names:
        assert isinstance(cache.request(profile(name, size), 0.0), Load)
        load_ended(cache, name, 0.0)
        finish(cache, name, 0.0)
    return cache


def test_models_leave_room_for_unaccounted_bytes() -> None:
    cache = holding("a", "b", "c")
    assert decided(cache.handle(UnaccountedChanged(10), 1.0)).evicted == ()
    assert decided(cache.handle(UnaccountedChanged(40), 1.0)).evicted == ("a",)
    assert cache.used_bytes + cache.unaccounted_bytes == 100
    assert_accounting_adds_up(cache)


def test_nothing_that_is_loaded_later_takes_unaccounted_bytes() -> None:
    cache = holding("a", "b")
    cache.handle(UnaccountedChanged(20), 1.0)
    answer = cache.request(profile("c", 30), 1.0)
    assert isinstance(answer, Load)
    assert answer.victims == ("a",)


def test_what_is_in_use_stays_until_it_is_idle() -> None:
    cache = holding("a", "b", "c")
    for name in "abc":
        assert isinstance(cache.request(profile(name, 30), 1.0), Hit)
    assert decided(cache.handle(UnaccountedChanged(40), 1.0)).evicted == ()
    assert decided(cache.finish("a", 2.0)).evicted == ("a",)
    for name in "bc":
        assert cache.finish(name, 2.0) == ()


def test_what_is_given_back_can_be_used_again() -> None:
    cache = holding("a", "b")
    cache.handle(UnaccountedChanged(40), 1.0)
    cache.handle(UnaccountedChanged(0), 2.0)
    answer = cache.request(profile("c", 30), 2.0)
    assert isinstance(answer, Load)
    assert answer.victims == ()


def test_no_request_is_rejected_for_unaccounted_bytes() -> None:
    cache = holding("a", "b")
    cache.handle(UnaccountedChanged(50), 1.0)
    answer = cache.request(profile("large", 90), 1.0)
    assert isinstance(answer, Load)
    assert answer.victims == ("b",)
    load_ended(cache, "large", 1.0)
    # It was served, but it does not stay.
    assert decided(cache.finish("large", 1.0)).evicted == ("large",)


def test_waiting_requests_get_their_turn_though_everything_is_unaccounted() -> None:
    cache = ModelCache(capacity_bytes=100, policy=Ranked())
    cache.handle(UnaccountedChanged(100), 0.0)
    assert isinstance(cache.request(profile("a", 30), 0.0), Load)
    load_ended(cache, "a", 0.0)
    assert isinstance(cache.request(profile("b", 30), 0.0), Wait)
    (grant,) = finish(cache, "a", 1.0)
    assert grant.model_id == "b"
    assert isinstance(grant.answer, Load)


def test_a_preload_takes_no_unaccounted_bytes() -> None:
    policy = Ranked(large=9)
    policy.wanted = [profile("large", 90)]
    cache = ModelCache(capacity_bytes=100, policy=policy)
    cache.handle(UnaccountedChanged(50), 0.0)
    assert tick(cache, 0.0) is None


def test_what_is_pinned_stays_whatever_is_unaccounted() -> None:
    cache = ModelCache(capacity_bytes=100, policy=Ranked(), pinned=["a"])
    suggest(cache, profile("a", 80), 0.0, required=True)
    load_ended(cache, "a", 0.0)
    assert decided(cache.handle(UnaccountedChanged(50), 1.0)).evicted == ()
    assert isinstance(cache.request(profile("b", 20), 1.0), Load)


def test_what_is_protected_does_not_stand_in_the_way_of_requests() -> None:
    cache = holding("a")
    cache.handle(ProtectedChanged(["a"]), 1.0)
    cache.handle(UnaccountedChanged(60), 1.0)
    assert isinstance(cache.request(profile("b", 30), 1.0), Load)


def test_what_can_never_fit_is_refused_as_ever() -> None:
    cache = holding("a")
    cache.handle(UnaccountedChanged(50), 1.0)
    assert isinstance(cache.request(profile("huge", 101), 1.0), Reject)


def test_unaccounted_bytes_are_not_negative() -> None:
    with pytest.raises(ValueError, match="unaccounted_bytes"):
        holding("a").handle(UnaccountedChanged(-1), 1.0)
