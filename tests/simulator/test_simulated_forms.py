"""Models in several forms, in both models of time, in traces so small that every second can be counted."""

from __future__ import annotations

import math
from array import array
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from simulator_support import Simulate

from serve_app.cli.main import main
from serve_app.core.catalog import ModelProfile
from serve_app.simulator.forms import choose
from serve_app.simulator.result_row import ResultRow
from serve_app.simulator.runner import ExperimentPlan, ReplaySpec, TimeModel, run
from serve_app.simulator.scenario import Capacity, Workload, make_workloads, parse_policies
from serve_app.workload.profiles import FormProfile
from serve_app.workload.trace import Trace


def form(name: str, size_bytes: int, load_s: float, exec_s: float, model_id: str = "a") -> FormProfile:
    profile = ModelProfile(model_id=model_id, size_bytes=size_bytes, load_s=load_s, exec_s=exec_s)
    return FormProfile(form=name, profile=profile)


def forms(model_id: str) -> tuple[FormProfile, ...]:
    """Loaded in 1/16 s and executed in 1, or loaded in 2 and executed in 1/2, at 10 and 15 bytes."""
    return form("mapped", 10, 0.0625, 1.0, model_id), form("fast", 15, 2.0, 0.5, model_id)


def workload(*requests: tuple[float, str], choice: str = "tiered") -> Workload:
    names = tuple(sorted({name for _, name in requests}))
    ladders = {name: choose(forms(name), choice) for name in names}
    return Workload(
        trace=Trace(
            name="letters",
            models=names,
            locations=("local",),
            arrival_s=array("d", (at_s for at_s, _ in requests)),
            model=array("I", (names.index(name) for _, name in requests)),
            source=array("I", [0] * len(requests)),
            location=None,
        ),
        profiles=tuple(ladders[name].loaded.profile for name in names),
        seed=0,
        forms=choice,
        ladders=ladders,
        published_bytes=10 * len(names),
    )


def play(played: Workload, capacity_bytes: int, time: TimeModel = "load-delay") -> ResultRow:
    replays = (ReplaySpec(policy=parse_policies(["lru"])[0], capacity=Capacity(given_bytes=capacity_bytes)),)
    (row,) = run(ExperimentPlan(workloads=(played,), replays=replays, time=time), jobs=1)
    return row


EVERY_TIME = pytest.mark.parametrize("time", ["load-delay", "full"])
#: After four executions the model has lost 2 s, which is a load of its fast form; the fifth finds that in memory.
FIVE = [(10.0 * number, "a") for number in range(4)] + [(50.0, "a")]


@EVERY_TIME
def test_a_model_goes_over_to_its_fast_form_when_its_load_has_paid_back(time: TimeModel) -> None:
    row = play(workload(*FIVE), 100, time)
    assert (row.hits, row.misses, row.form_changes) == (4, 1, 1)
    assert row.mean_latency_s == pytest.approx((0.0625 + 4 * 1.0 + 0.5) / 5)
    assert row.load_over_exec == pytest.approx(0.0625 / 4.5)
    assert (row.preload_over_exec, row.background_load_over_exec) == (0.0, pytest.approx(2.0 / 4.5))


@EVERY_TIME
@pytest.mark.parametrize(("choice", "first_s", "others_s"), [("mapped", 1.0625, 1.0), ("compiled", 2.5, 0.5)])
def test_a_model_stays_in_a_form_that_is_chosen_by_name(
    choice: str, first_s: float, others_s: float, time: TimeModel
) -> None:
    row = play(workload(*FIVE, choice=choice), 100, time)
    assert row.form_changes == 0
    assert row.mean_latency_s == pytest.approx((first_s + 4 * others_s) / 5)


@EVERY_TIME
def test_requests_are_served_by_the_former_form_until_the_other_one_is_loaded(time: TimeModel) -> None:
    requests = [*FIVE[:4], (31.5, "a"), (40.0, "a")]
    assert play(workload(*requests), 100, time).mean_latency_s == pytest.approx((0.0625 + 5 * 1.0 + 0.5) / 6)


@EVERY_TIME
def test_a_fast_form_is_given_up_before_its_model(time: TimeModel) -> None:
    row = play(workload(*FIVE, (60.0, "b"), (70.0, "a")), 26, time)
    assert (row.misses, row.hits, row.evictions, row.form_changes) == (2, 5, 0, 1)
    row = play(workload(*FIVE, (60.0, "b"), (70.0, "a")), 25, time)
    assert row.evictions == 0, "both fit, the one in its fast form"
    row = play(workload(*FIVE, (60.0, "b"), (70.0, "c"), (80.0, "a")), 30, time)
    assert (row.misses, row.hits, row.evictions, row.form_changes) == (3, 5, 0, 2)
    assert row.mean_latency_s == pytest.approx((3 * 1.0625 + 3 * 1.0 + 0.5 + 1.0) / 8)


@EVERY_TIME
def test_a_request_joins_the_load_of_the_smaller_form(time: TimeModel) -> None:
    row = play(workload(*FIVE, (60.0, "b"), (70.0, "c"), (70.03125, "a")), 30, time)
    assert (row.misses, row.hits, row.joins) == (3, 4, 1)


@EVERY_TIME
def test_models_of_one_form_are_replayed_as_without_forms(time: TimeModel) -> None:
    requests = [(1.5 * number, name) for number, name in enumerate("abcabdaebacaadbbcae" * 4)]
    alone = workload(*requests, choice="mapped")
    with_forms = play(alone, 25, time)
    plain = play(Workload(trace=alone.trace, profiles=alone.profiles, seed=0), 25, time)
    differs = ("wall_s", "requests_per_s", "forms", "capacity_share")
    for name in ResultRow.__slots__:
        if name not in differs:
            value, expected = getattr(with_forms, name), getattr(plain, name)
            assert value == (pytest.approx(expected) if isinstance(expected, float) else expected), name


def test_the_form_of_each_choice() -> None:
    slow_to_load = (form("mapped", 10, 0.1, 1.0), form("quick", 12, 0.2, 0.5), form("fast", 40, 9.0, 0.25))
    chosen = {choice: choose(slow_to_load, choice) for choice in ("tiered", "soonest", "compiled", "mapped", "absent")}
    assert {choice: ladder.loaded.form for choice, ladder in chosen.items()} == {
        "tiered": "quick",
        "soonest": "quick",
        "compiled": "fast",
        "mapped": "mapped",
        "absent": "mapped",
    }
    assert [[each.form for each in ladder.faster] for ladder in chosen.values()] == [["fast"], [], [], [], []]


def test_memory_is_a_share_of_the_models_as_published_whatever_their_forms() -> None:
    choices = ("tiered", "mapped", "compiled")
    workloads = make_workloads(trace="zipf:models=12&requests=50", choices=choices)
    assert len({each.total_bytes for each in workloads}) == 1
    assert [each.forms for each in workloads] == list(choices)


@pytest.mark.slow
@pytest.mark.parametrize("share", [0.1, 0.25, 0.5])
@pytest.mark.parametrize("policy", ["edgeserve", "lru"])
def test_tiers_are_as_good_as_the_better_of_mapped_and_compiled(policy: str, share: float) -> None:
    """On sessions of users; the results file has more."""
    trace = "sessions:days=1&models=60&sessions_per_day=600"
    workloads = make_workloads(trace=trace, choices=("tiered", "mapped", "compiled"))
    replays = [
        ReplaySpec(workload=number, policy=parse_policies([policy])[0], capacity=Capacity(given_share=share))
        for number in range(3)
    ]
    tiered, mapped, compiled = run(ExperimentPlan(workloads=workloads, replays=tuple(replays)), jobs=1)
    assert tiered.mean_latency_s < 1.03 * min(mapped.mean_latency_s, compiled.mean_latency_s)


# The command

ROWS = "name,form,size_mb,load_s,exec_s\na,mapped,10,0.1,1\na,fast,20,2,0.5\nb,mapped,10,0.1,1\n"
SimulateRows = Callable[..., list[dict[str, Any]]]


@pytest.fixture
def table(tmp_path: Path) -> Sequence[str]:
    path = tmp_path / "forms.csv"
    path.write_text(ROWS)
    return "--trace", "zipf:models=12&requests=500&rate=0.2", "--models", str(path), "--capacity", "30%"


@pytest.mark.slow
def test_forms_stand_side_by_side(table: Sequence[str], simulate: Simulate, simulate_rows: SimulateRows) -> None:
    options = (*table, "--policy", "lru,gdsf", "--forms", "tiered,mapped", "--forms", "fast")
    rows = simulate_rows(*options)
    assert [(row["policy"], row["forms"]) for row in rows] == [
        (policy, choice) for policy in ("lru", "gdsf") for choice in ("tiered", "mapped", "fast")
    ]
    assert len({row["capacity_bytes"] for row in rows}) == 1
    assert rows[0]["form_changes"] > 0 == rows[1]["form_changes"]
    assert all(math.isfinite(row["background_load_over_exec"]) for row in rows)
    result = simulate(*options)
    header = result.stdout.splitlines()[1].split()
    assert header[:4] == ["memory", "policy", "forms", "mean"]
    assert result.stdout.count(" *") == 1, "the least mean latency is marked"


@pytest.mark.slow
def test_forms_that_do_not_exist_are_named(table: Sequence[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["simulate", *table, "--forms", "tired"])
    assert caught.value.code == 2
    assert "'tired' is no form; there are tiered, soonest, compiled, mapped, fast" in capsys.readouterr().err


@pytest.mark.slow
def test_a_table_without_forms_is_refused(simulate: Simulate, profiles_file: Path) -> None:
    result = simulate("--models", str(profiles_file), "--forms", "tiered")
    assert result.exit_code != 0
    assert "there is no column form" in str(result.exception or result.output)
