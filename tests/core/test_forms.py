"""Which form of a model serves it."""

from __future__ import annotations

from dataclasses import replace

import pytest
from fakes import published

from serve_app.core.catalog import ModelProfile, PublishedModel
from serve_app.core.contract import SizeCost
from serve_app.core.forms import FormChanges, climb, faster, soonest, surplus


def form(load_s: float, exec_s: float) -> PublishedModel:
    model = published("m")
    return replace(model, profile=replace(model.profile, load_s=load_s, exec_s=exec_s))


def test_the_form_with_the_soonest_first_answer_serves() -> None:
    mapped, compiled = form(0.001, 0.020), form(0.010, 0.008)
    assert soonest([mapped, compiled]) is compiled
    slow_to_load = form(0.300, 0.008)
    assert soonest([mapped, slow_to_load]) is mapped


def test_of_equals_the_first_serves() -> None:
    forms = [form(0.25, 0.5), form(0.5, 0.25)]
    assert soonest(forms) is forms[0]


def test_a_model_goes_over_to_another_form_only_if_it_is_clearly_faster() -> None:
    served, hardly, much = form(0.0, 0.100), form(0.3, 0.095), form(0.3, 0.050)
    assert faster([served, hardly], served) == ()
    assert [each.profile.exec_s for each in faster([served, hardly, much], served)] == [0.050]


def profile_of(size_bytes: int, exec_s: float, tier: int = 0) -> ModelProfile:
    return ModelProfile(model_id="m", size_bytes=size_bytes, load_s=0.1, exec_s=exec_s, tier=tier)


def test_a_model_climbs_by_what_saves_most_per_byte() -> None:
    forms = [profile_of(200, 0.030), profile_of(102, 0.060), profile_of(210, 0.055)]
    assert climb(forms, profile_of(100, 0.100)) == [1, 0]


def test_a_form_that_is_faster_and_no_larger_comes_first() -> None:
    forms = [profile_of(101, 0.050), profile_of(50, 0.080), profile_of(100, 0.070)]
    assert climb(forms, profile_of(100, 0.100)) == [2, 0]


def test_forms_to_go_over_to_are_numbered_from_the_one_that_is_loaded() -> None:
    served, other = form(0.0, 0.100), form(0.3, 0.050)
    assert [each.profile.tier for each in (served, *faster([served, other], served))] == [0, 1]


def test_a_surplus_is_what_a_form_takes_and_saves_beyond_the_smaller_one() -> None:
    part = surplus(profile_of(130, 0.060, tier=1), profile_of(100, 0.100))
    assert part is not None
    assert (part.size_bytes, part.saved_s, part.tier) == (30, pytest.approx(0.040), 1)
    assert surplus(profile_of(100, 0.060, tier=1), profile_of(100, 0.100)) is None


def test_a_form_that_was_measured_at_other_sizes_is_none_to_go_over_to() -> None:
    served, other = form(0.0, 0.100), form(0.3, 0.050)
    costs = (SizeCost(sizes=(1,), workspace_bytes=1, exec_s=0.05),)
    assert faster([served, replace(other, costs=costs)], served) == ()


LOADED = form(0.001, 0.100)
#: To stay loses 0.6 executions each time, and a load of it takes as long as 2.5.
COMPILED = replace(form(0.250, 0.040), runtime="onnxruntime")


def test_a_model_changes_form_when_to_have_stayed_has_cost_the_load_of_the_fastest() -> None:
    changes = FormChanges({"m": (COMPILED,)})
    assert [changes.executed(LOADED, "mapped", 1.0) for _ in range(5)] == [None] * 4 + [COMPILED.profile]
    assert changes.executed(LOADED, "mapped", 1.0) is None, "the next attempt comes after as long again"


def test_a_model_climbs_one_form_at_a_time() -> None:
    faster_still = replace(form(0.250, 0.010), runtime="openvino")
    changes = FormChanges({"m": (COMPILED, faster_still)})
    assert changes.executed(LOADED, "mapped", 8.0) is COMPILED.profile
    assert changes.executed(LOADED, "onnxruntime", 8.0) is None, "to stay loses 6 of 6.25 executions"
    assert changes.executed(LOADED, "onnxruntime", 1.0) is faster_still.profile
    assert changes.executed(LOADED, "openvino", 1000.0) is None


def test_longer_executions_lose_more() -> None:
    assert FormChanges({"m": (COMPILED,)}).executed(LOADED, "mapped", 8.0) is COMPILED.profile


def test_what_was_lost_before_an_eviction_counts_on() -> None:
    """A model that is evicted after every few requests would never change otherwise."""
    changes = FormChanges({"m": (COMPILED,)})
    assert [changes.executed(LOADED, "mapped", 2.0) for _ in range(3)] == [None, None, COMPILED.profile]


def test_a_form_in_which_the_model_is_no_longer_loaded_is_left_at_once() -> None:
    assert FormChanges({"m": (COMPILED,)}).executed(COMPILED, "mapped", 1.0) is COMPILED.profile


def test_a_model_in_its_fastest_form_or_without_others_never_changes() -> None:
    assert FormChanges({}).executed(LOADED, "mapped", 1000.0) is None
    assert FormChanges({"m": (COMPILED,)}).executed(LOADED, "onnxruntime", 1000.0) is None


def test_a_form_that_cannot_be_loaded_is_not_tried_at_every_execution() -> None:
    changes = FormChanges({"m": (COMPILED,)})
    assert changes.executed(COMPILED, "mapped", 1.0) is COMPILED.profile
    compiled = replace(COMPILED, profile=replace(COMPILED.profile, exec_s=0.1))
    assert changes.executed(compiled, "mapped", 1.0) is None
