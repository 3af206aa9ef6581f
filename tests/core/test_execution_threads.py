"""How many threads an execution gets."""

from __future__ import annotations

import pytest

from serve_app.core.execution_threads import threads_for


def test_a_long_execution_on_an_idle_machine_takes_all_cores() -> None:
    assert threads_for(0.04, others=0, machine_others=0, cores=8) == 8


@pytest.mark.parametrize(
    ("expected_s", "others", "machine_others"), [(0.04, 1, 0), (0.04, 0, 1), (0.001, 0, 0)],
    ids=["others-run-or-wait-here", "another-process-runs", "short"],
)  # fmt: skip
def test_any_other_execution_takes_one(expected_s: float, others: int, machine_others: int) -> None:
    assert threads_for(expected_s, others=others, machine_others=machine_others, cores=8) == 1
