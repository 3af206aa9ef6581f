"""The output from rows: the claims of the paper, tables and plots."""

from __future__ import annotations

import csv
import io
import json
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console
from simulator_support import workload

from serve_app.core.policies.registry import ORACLES
from serve_app.simulator.result_plot import plot
from serve_app.simulator.result_row import ResultRow
from serve_app.simulator.result_table import as_csv, as_json, as_table, percent, seconds, size
from serve_app.simulator.runner import ExperimentPlan, ReplaySpec, run
from serve_app.simulator.scenario import ALL_POLICIES, parse_capacities, parse_policies
from serve_app.simulator.studies.paper import SHARES, WORKLOAD_ONLY, PaperResults

PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture(scope="module")
def rows() -> tuple[ResultRow, ...]:
    replays = tuple(
        ReplaySpec(policy=policy, capacity=capacity)
        for capacity in parse_capacities(["40%", "80%"])
        for policy in parse_policies(["lru", "gdsf", "belady-am"])
    )
    return run(ExperimentPlan(workloads=(workload("abcabdaebacaad" * 5),), replays=replays), jobs=1)


def ratios(row: ResultRow, load_over_exec: dict[str, float], seed: int = 0) -> list[ResultRow]:
    """Rows of all policies, with the ratio 1 by default."""
    return [
        replace(
            row, policy=policy, capacity_share=share, load_over_exec=load_over_exec.get(policy, 1.0) * share, seed=seed
        )
        for share in SHARES
        for policy in ALL_POLICIES
    ]


def test_csv_has_the_values_of_json(rows: tuple[ResultRow, ...]) -> None:
    rows = (*rows, replace(rows[0], load_over_exec=None))
    table = list(csv.DictReader(io.StringIO(as_csv(rows))))
    listed = json.loads(as_json(rows))
    assert table == [{key: "" if value is None else str(value) for key, value in row.items()} for row in listed]


def test_json_refuses_what_is_not_json(rows: tuple[ResultRow, ...]) -> None:
    with pytest.raises(ValueError, match="JSON"):
        as_json([replace(rows[0], load_over_exec=float("nan"))])


def test_the_table_marks_the_best_that_knows_no_future_unless_all_are_the_same(rows: tuple[ResultRow, ...]) -> None:
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(as_table(rows, ORACLES))
    lines = console.export_text().splitlines()
    marked = [line for line in lines if "*" in line]
    # With 80 % of the memory, lru and gdsf are the same.
    assert len(marked) == 1
    assert "gdsf" in marked[0]
    assert "joins" not in lines[0]
    assert "(40.0%)" in lines[1]


@pytest.mark.parametrize("only", ["40%", "80%", None])
def test_one_memory_or_several_are_plotted(rows: tuple[ResultRow, ...], only: str | None, tmp_path: Path) -> None:
    drawn = [row for row in rows if only is None or row.capacity_share == float(only[:-1]) / 100]
    plot(drawn, tmp_path / "plot.png", oracles=ORACLES)
    assert (tmp_path / "plot.png").read_bytes().startswith(PNG)


@pytest.mark.parametrize("ratio", [None, 0.0])
def test_rows_without_ratios_are_plotted(rows: tuple[ResultRow, ...], ratio: float | None, tmp_path: Path) -> None:
    drawn = [replace(row, load_over_exec=ratio, trace="csv:$a.csv", compulsory_load_over_exec=ratio) for row in rows]
    plot(drawn, tmp_path / "plot.png", oracles=ORACLES)
    assert (tmp_path / "plot.png").read_bytes().startswith(PNG)


def test_a_claim_holds_only_if_it_does_for_every_seed(rows: tuple[ResultRow, ...]) -> None:
    good = ratios(rows[0], {"edgeserve": 0.3})
    bad = ratios(rows[0], {"edgeserve": 0.4}, seed=1)
    ours = [claim for claim in PaperResults([*good, *bad]).claims() if claim.policy == "edgeserve"]
    assert [claim.holds for claim in ours] == [True, False, True]
    assert [str(claim.ours) for claim in ours] == ["15.0% .. 20.0%", "30.0% .. 40.0%", "60.0% .. 70.0%"]


def test_load_delay_is_compared_with_the_best_policy_that_uses_the_workload_only(
    rows: tuple[ResultRow, ...],
) -> None:
    results = PaperResults(
        ratios(rows[0], {"edgeserve": 0.6, "modelmesh": 0.8, "gdsf": 0.1, "belady": 0.1, "random": 0.1})
    )
    lower = results.lower_by_up_to("edgeserve", WORKLOAD_ONLY)
    assert lower is not None
    assert lower.most == lower.least == pytest.approx(0.25)


def test_without_ratios_no_claim_holds(rows: tuple[ResultRow, ...]) -> None:
    results = PaperResults([replace(row, load_over_exec=None) for row in ratios(rows[0], {})])
    assert not any(claim.holds or claim.ours for claim in results.claims())


def test_figures_read_well() -> None:
    assert [percent(ratio) for ratio in (None, 0.0, 0.00042, 0.914, 3.15)] == ["-", "0.0%", "0.042%", "91.4%", "315.0%"]
    assert [seconds(value) for value in (0.0012, 0.75, 20.74)] == ["1.2 ms", "750.0 ms", "20.74 s"]
    assert [size(value) for value in (999, 2048, 3 * 2**20, 2**31)] == ["999 B", "2.00 KiB", "3.00 MiB", "2.00 GiB"]
