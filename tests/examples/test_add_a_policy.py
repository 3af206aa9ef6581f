"""The example of a policy of one's own runs, and its policy is a good citizen."""

from __future__ import annotations

import random
import runpy
from pathlib import Path
from typing import Any

import pytest

from serve_app.core.catalog import ModelProfile
from serve_app.core.policies.registry import POLICIES

SCRIPT = Path(__file__).parents[2] / "deploy" / "examples" / "add_a_policy" / "compare.py"


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Names of the script; its line in ``POLICIES`` is gone after the test."""
    found = runpy.run_path(str(SCRIPT))
    monkeypatch.setitem(POLICIES, found["NAME"], found["RecentCost"])
    return found


def test_the_example_prints_a_row_for_every_policy(example: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    example["main"](["--trace", "zipf:models=20&requests=2000&rate=2", "--seed", "1"])
    rows = [line.split()[0] for line in capsys.readouterr().out.splitlines()[1:]]
    assert rows == [example["NAME"], "lru", "gdsf", "edgeserve"]


def test_the_policy_prefers_what_was_asked_for_lately(example: dict[str, Any]) -> None:
    policy = example["RecentCost"](random.Random(0), half_life_s=10.0)
    before, lately = (
        ModelProfile(model_id=name, size_bytes=10, load_s=1.0, exec_s=0.1) for name in ("before", "lately")
    )
    for _ in range(3):
        policy.on_request(before, 0.0)
    policy.on_request(lately, 30.0)
    assert policy.utility(lately, 30.0) > policy.utility(before, 30.0) > 0


def test_the_order_of_the_policy_survives_a_long_time(example: dict[str, Any]) -> None:
    policy = example["RecentCost"](random.Random(0), half_life_s=1.0)
    twice, once = (ModelProfile(model_id=name, size_bytes=10, load_s=1.0, exec_s=0.1) for name in ("twice", "once"))
    policy.on_request(once, 400.0)
    policy.on_request(twice, 500.0)
    policy.on_request(once, 505.0)
    policy.on_request(twice, 505.0)
    assert policy.utility(twice, 505.0) > policy.utility(once, 505.0) > 0
