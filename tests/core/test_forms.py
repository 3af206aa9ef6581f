"""Which form of a model serves it."""

from __future__ import annotations

from dataclasses import replace

from fakes import published

from serve_app.core.catalog import PublishedModel
from serve_app.core.contract import SizeCost
from serve_app.core.forms import FormChanges, fastest, soonest


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


def test_a_model_goes_over_to_the_fastest_form_only_if_it_is_clearly_faster() -> None:
    served, hardly, much = form(0.0, 0.100), form(0.3, 0.095), form(0.3, 0.050)
    assert fastest([served, hardly], served) is None
    assert fastest([served, hardly, much], served) is much


def test_a_form_that_was_measured_at_other_sizes_is_none_to_go_over_to() -> None:
    served, other = form(0.0, 0.100), form(0.3, 0.050)
    costs = (SizeCost(sizes=(1,), workspace_bytes=1, exec_s=0.05),)
    assert fastest([served, replace(other, costs=costs)], served) is None


def test_a_model_changes_form_when_to_have_stayed_has_cost_the_load_of_the_faster_one() -> None:
    slow, fast = form(0.001, 0.100).profile, form(0.250, 0.040).profile
    changes = FormChanges({"m": fast})
    # Each execution loses 60 ms.
    assert [changes.executed(slow, 1.0) for _ in range(5)] == [None] * 4 + [fast]
    assert changes.executed(slow, 1.0) is None, "the next attempt comes after as long again"


def test_longer_executions_lose_more() -> None:
    slow, fast = form(0.001, 0.100).profile, form(0.250, 0.040).profile
    assert FormChanges({"m": fast}).executed(slow, 8.0) is fast


def test_a_load_begins_anew() -> None:
    slow, fast = form(0.001, 0.100).profile, form(0.100, 0.040).profile
    changes = FormChanges({"m": fast})
    changes.executed(slow, 1.0)
    changes.loaded("m")
    assert changes.executed(slow, 1.0) is None


def test_a_model_without_a_faster_form_never_changes() -> None:
    assert FormChanges({}).executed(form(0.001, 0.1).profile, 1000.0) is None
