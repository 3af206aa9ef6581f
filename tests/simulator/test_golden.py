"""The results of every policy on small generated streams, to the single request: a change does not go unnoticed.

After an intended change this prints the new table::

    python tests/simulator/test_golden.py > tests/simulator/golden.csv
"""

from __future__ import annotations

import csv
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from serve_app.simulator.result_row import ResultRow
from serve_app.simulator.runner import ExperimentPlan, ReplaySpec, run
from serve_app.simulator.scenario import ALL_POLICIES, Capacity, make_workload, parse_policies

GOLDEN = Path(__file__).with_name("golden.csv")
#: One of each regime: timers and steady functions, and sessions of users.
TRACES = (
    "azure-like:functions=30&minutes=120&rate_cap=10&seed=1",
    "sessions:days=2&models=40&sessions_per_day=600&seed=1",
)
CAPACITY_SHARES = (0.15, 0.4)
COLUMNS = (
    "trace", "policy", "capacity_share", "requests", "hits", "misses", "joins", "rejected", "evictions", "preloads",
    "wasted_preloads", "load_s", "preload_s",
)  # fmt: skip


def rows_of(policy: str) -> Iterator[dict[str, str]]:
    """Format the row as in the table."""
    plan = ExperimentPlan(
        workloads=tuple(make_workload(trace=trace, seed=0) for trace in TRACES),
        replays=tuple(
            ReplaySpec(workload=number, policy=parse_policies([policy])[0], capacity=Capacity(given_share=share))
            for number in range(len(TRACES))
            for share in CAPACITY_SHARES
        ),
    )
    return map(written, run(plan, jobs=1))


def written(row: ResultRow) -> dict[str, str]:
    seconds = {"load_s": row.load_s_per_request, "preload_s": row.preload_s_per_request}
    # Sums over all requests show more in as many digits than means.
    return {
        column: f"{seconds[column] * row.requests:.6f}" if column in seconds else str(getattr(row, column))
        for column in COLUMNS
    }


def print_table() -> None:
    table = csv.DictWriter(sys.stdout, COLUMNS, lineterminator="\n")
    table.writeheader()
    for policy in ALL_POLICIES:
        table.writerows(rows_of(policy))


@pytest.fixture(scope="module")
def golden() -> list[dict[str, str]]:
    with GOLDEN.open(newline="") as lines:
        return list(csv.DictReader(lines))


@pytest.mark.parametrize("policy", ALL_POLICIES)
def test_a_policy_gives_its_golden_rows(policy: str, golden: list[dict[str, str]]) -> None:
    assert list(rows_of(policy)) == [row for row in golden if row["policy"] == policy]


def test_every_policy_has_golden_rows_and_no_other(golden: list[dict[str, str]]) -> None:
    assert list(dict.fromkeys(row["policy"] for row in golden)) == list(ALL_POLICIES)


def test_every_golden_row_distinguishes_something(golden: list[dict[str, str]]) -> None:
    """Nothing fits whole, something is hit, and every regime has enough requests to tell policies apart."""
    for row in golden:
        assert int(row["requests"]) > 500
        assert 0 < int(row["hits"]) < int(row["requests"])
        assert int(row["evictions"]) > 0


if __name__ == "__main__":
    print_table()
