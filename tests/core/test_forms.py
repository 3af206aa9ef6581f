"""Which form of a model serves it."""

from __future__ import annotations

from dataclasses import replace

from fakes import published

from serve_app.core.forms import soonest


def form(load_s: float, exec_s: float):
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
