"""``edgeserve simulate``, the command."""

from __future__ import annotations

import csv
import gzip
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from simulator_support import SMALL, Simulate

from serve_app.cli.main import main
from serve_app.core.policies.registry import ORACLES, POLICIES
from serve_app.simulator.studies.reference_workload import PROFILES_FILE, TRACE_FILE

pytestmark = pytest.mark.slow

KEYS = [
    "trace", "policy", "capacity_bytes", "capacity_share", "locations", "requests", "models", "hits", "misses", "joins",
    "forwards", "preloads", "evictions", "load_s_per_request", "load_over_exec", "compulsory_load_over_exec",
    "mean_latency_s", "p50_s", "p99_s", "wall_s", "requests_per_s",
]  # fmt: skip
ADDED = {
    "time", "seed", "rejected", "wasted_preloads", "preload_s_per_request", "preload_over_exec", "coordination",
    "forms", "form_changes", "background_load_over_exec",
}  # fmt: skip
FULL = ("--trace", "zipf:models=12&requests=300&rate=0.2", "--capacity", "40%", "--time", "full")
PNG = b"\x89PNG\r\n\x1a\n"

SimulateRows = Callable[..., list[dict[str, Any]]]


def fails(capsys: pytest.CaptureFixture[str], code: int, *arguments: str) -> str:
    """The one line on stderr with which the command fails."""
    with pytest.raises(SystemExit) as caught:
        main(["simulate", *arguments])
    shown = capsys.readouterr()
    assert (caught.value.code, shown.out) == (code, "")
    assert shown.err.startswith("edgeserve: ")
    assert shown.err.count("\n") == 1
    return shown.err


def without_clock(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{key: value for key, value in row.items() if key not in ("wall_s", "requests_per_s")} for row in rows]


def test_json_has_the_promised_columns_and_sums(simulate_rows: SimulateRows, profiles_file: Path) -> None:
    rows = simulate_rows("--trace", SMALL, "--models", str(profiles_file), "--policy", "all", "--capacity", "30%")
    assert [row["policy"] for row in rows] == [*POLICIES, *ORACLES]
    for row in rows:
        assert list(row)[: len(KEYS)] == KEYS
        assert set(row) == {*KEYS, *ADDED}
        assert row["hits"] + row["misses"] + row["joins"] + row["forwards"] == row["requests"] == 2000
        assert all(math.isfinite(value) for value in row.values() if isinstance(value, float))
        assert (row["trace"], row["models"], row["capacity_share"], row["locations"]) == (SMALL, 12, 0.3, 1)


def test_rows_keep_the_order_of_the_options(simulate_rows: SimulateRows) -> None:
    options = ("--policy", "lru,random", "--policy", "gdsf", "--capacity", "50%", "--capacity", "20%,1GiB")
    rows = simulate_rows("--trace", SMALL, *options)
    assert [row["policy"] for row in rows] == ["lru", "random", "gdsf"] * 3
    assert [row["capacity_share"] for row in rows[:6]] == [0.5] * 3 + [0.2] * 3
    assert [row["capacity_bytes"] for row in rows[6:]] == [2**30] * 3


def test_the_same_seed_gives_the_same_rows_in_any_number_of_processes(simulate_rows: SimulateRows) -> None:
    options = ("--trace", SMALL, "--policy", "random", "--policy", "edgeserve", "--capacity", "30%")
    alone = without_clock(simulate_rows(*options, "--seed", "3", "--jobs", "1"))
    assert without_clock(simulate_rows(*options, "--seed", "3", "--jobs", "2")) == alone
    assert without_clock(simulate_rows(*options, "--seed", "4")) != alone


def test_csv_and_plot_are_written_in_addition_to_json(simulate: Simulate, tmp_path: Path) -> None:
    options = ("--policy", "lru", "--policy", "belady", "--capacity", "30%", "--capacity", "60%")
    result = simulate("--trace", SMALL, *options, "--json", "--csv", "rows.csv", "--plot", "rows.png")
    assert result.stderr == "wrote rows.csv\nwrote rows.png\n"
    with (tmp_path / "rows.csv").open(newline="") as file:
        table = list(csv.DictReader(file))
    assert table == [{key: str(value) for key, value in row.items()} for row in json.loads(result.stdout)]
    assert (tmp_path / "rows.png").read_bytes().startswith(PNG)


def test_the_table_has_a_line_per_row(simulate: Simulate) -> None:
    result = simulate("--trace", SMALL, "--capacity", "30%")
    assert result.exit_code == 0
    assert result.stderr == ""
    assert "2,000 requests for 12 models" in result.stdout.splitlines()[0]
    assert len(result.stdout.splitlines()) == 2 + 5


def test_without_options_a_generated_stream_is_replayed(simulate_rows: SimulateRows) -> None:
    (row,) = simulate_rows("--policy", "lru")
    assert (row["trace"], row["capacity_share"], row["time"], row["seed"]) == ("azure-like:", 0.5, "load-delay", 0)


def test_requests_are_spread_over_locations(simulate_rows: SimulateRows) -> None:
    one, three = (
        simulate_rows("--trace", SMALL, "--policy", "belady-am", "--capacity", "100%", "--locations", number)[0]
        for number in ("1", "3")
    )
    assert (three["locations"], three["requests"], three["misses"]) == (3, 2000, 3 * one["misses"])
    assert three["load_over_exec"] == pytest.approx(three["compulsory_load_over_exec"])


def test_the_full_model_of_time_gives_the_same_columns(simulate: Simulate) -> None:
    result = simulate(*FULL, "--json", "--locations", "2", "--policy", "lru,belady-am")
    (row,) = json.loads(result.stdout)
    assert "belady-am left out" in result.stderr
    assert set(row) == {*KEYS, *ADDED}
    assert (row["policy"], row["time"], row["locations"], row["coordination"]) == ("lru", "full", 2, "full")
    assert row["hits"] + row["misses"] + row["joins"] + row["forwards"] == row["requests"] == 300


def test_coordination_is_chosen_and_shown(simulate: Simulate, simulate_rows: SimulateRows, profiles_file: Path) -> None:
    trace = "zipf:models=30&requests=2000&rate=2"
    models = ("--models", str(profiles_file), "--locations", "3", "--policy", "lru")
    options = ("--trace", trace, *models, "--time", "full", "--coordination")
    rows = {mode: simulate_rows(*options, mode)[0] for mode in ("none", "forwarding", "full")}
    assert [row["coordination"] for row in rows.values()] == list(rows)
    assert [row["forwards"] > 0 for row in rows.values()] == [False, True, True]
    assert [row["preloads"] > 0 for row in rows.values()] == [False, False, True]
    assert "3 locations, time full, coordination forwarding" in simulate(*options, "forwarding").stdout


def test_one_location_runs_without_coordination(simulate_rows: SimulateRows) -> None:
    (row,) = simulate_rows(*FULL, "--policy", "lru", "--coordination", "full")
    assert (row["coordination"], row["forwards"], row["preloads"]) == ("none", 0, 0)


def test_locations_on_their_own_can_know_their_future(simulate_rows: SimulateRows) -> None:
    options = ("--locations", "2", "--policy", "belady-am", "--coordination", "none")
    assert [row["policy"] for row in simulate_rows(*FULL, *options)] == ["belady-am"]


def test_more_load_than_the_locations_can_execute_is_a_warning(simulate: Simulate, profiles_file: Path) -> None:
    options = ("--trace", "zipf:models=3&requests=200&rate=9", "--models", str(profiles_file), "--time", "full")
    result = simulate(*options, "--policy", "lru", "--capacity", "100%")
    assert "the locations run 2: queues grow to the end" in result.stderr
    assert "queues" not in simulate(*options, "--policy", "lru", "--capacity", "100%", "--locations", "9").stderr


def test_rows_of_the_table_can_be_the_models(simulate_rows: SimulateRows, profiles_file: Path, tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("arrival_s,model\n0,small\n1,large\n2,small\n")
    (row,) = simulate_rows(
        "--trace", "csv:t.csv", "--models", str(profiles_file), "--map", "keep", "--policy", "lru", "--capacity", "50MB"
    )
    assert (row["hits"], row["misses"]) == (1, 2)
    assert row["load_over_exec"] == pytest.approx((1 + 4) / (0.5 + 1 + 0.5))


def test_a_memory_into_which_no_model_fits_is_replayed_with_a_warning(simulate: Simulate) -> None:
    result = simulate("--trace", SMALL, "--policy", "lru", "--capacity", "1KiB", "--json")
    (row,) = json.loads(result.stdout)
    assert (row["misses"], row["rejected"], row["hits"]) == (2000, 2000, 0)
    assert "no model fits into 1024 bytes" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--policy", "marvel"), "unknown policy 'marvel'; there are random, fifo, lru"),
        (("--capacity", "0"), "more than 0 bytes"),
        (("--capacity", "-5%"), "'-5%' is not a capacity; write it like 2GiB or 25%"),
        (("--trace", "nowhere:"), "trace 'nowhere:' must begin with one of"),
        (("--trace", "azure:absent.csv"), "absent.csv"),
        (("--models", "absent.csv"), "absent.csv"),
        (("--csv", "no/such/folder.csv"), "there is no folder no/such"),
        (("--plot", "picture.txt"), "must end in .png"),
        (("--locations", "0"), "--locations"),
        (("--time", "full", "--locations", "2", "--policy", "belady"), "cannot know what locations will forward"),
        (("--paper", "--benchmark"), "choose one"),
        (("--paper", "--policy", "lru"), "choose policies"),
        (("--benchmark", "--json"), "takes --data and --seed alone"),
        (("--paper", "--data", "absent", "--trace", "zipf:"), "choose one"),
        (("--seeds", "2"), "--seeds is for --paper"),
        (("--coordination", "none"), "--coordination is for --time full"),
        (("--paper", "--data", "absent"), TRACE_FILE),
        (("--data", "absent"), "--data is for"),
    ],
)
def test_bad_usage_is_one_line_and_exit_code_2(
    arguments: tuple[str, ...],
    words: str,
    simulate: Simulate,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert words in fails(capsys, 2, *arguments)


def test_a_malformed_trace_is_named_with_line_and_column(
    simulate: Simulate, azure_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = azure_file.read_text().splitlines()
    lines[7] = lines[7].rpartition(",")[0] + ",many"
    azure_file.write_text("\n".join(lines))
    message = fails(capsys, 2, "--trace", f"azure:{azure_file}")
    assert "calls.csv, line 8, column 40 (44): 'many' is not a count" in message


def test_a_malformed_profile_is_named_with_line_and_column(
    simulate: Simulate, profiles_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    profiles_file.write_text("name,size_mb,load_s,exec_s\na,1,1,1\nb,1,nan,1\n")
    assert "profiles.csv, line 3, column load_s (3)" in fails(capsys, 2, "--models", str(profiles_file))


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
def test_a_full_disk_is_one_line_and_exit_code_1(simulate: Simulate, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["simulate", "--trace", SMALL, "--policy", "lru", "--csv", "/dev/full"])
    assert caught.value.code == 1
    assert capsys.readouterr().err == "edgeserve: /dev/full: cannot be written (No space left on device)\n"


def test_the_paper_is_replayed_on_files_in_the_reference_format(
    simulate: Simulate, azure_file: Path, profiles_file: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / TRACE_FILE).write_bytes(gzip.compress(azure_file.read_bytes()))
    (folder / PROFILES_FILE).write_bytes(profiles_file.read_bytes())
    result = simulate("--paper", "--data", str(folder), "--seeds", "2", "--plot", "p.png", "--csv", "p.csv")
    assert result.exit_code == 0, result.output
    assert "reference workload" in result.stdout
    verdicts = [line for line in result.stdout.splitlines() if line.endswith(("holds", "does not hold"))]
    assert len(verdicts) == 13
    assert "edgeserve / belady-am" in result.stdout
    assert "background loads of edgeserve" in result.stdout
    assert result.stderr == "wrote p.csv\nwrote p.png\n"
    assert (tmp_path / "p.png").read_bytes().startswith(PNG)


def test_the_claims_of_the_paper_can_be_checked_on_another_trace(
    simulate: Simulate, azure_file: Path, tmp_path: Path
) -> None:
    result = simulate("--paper", "--trace", f"azure:{azure_file}", "--seeds", "1", "--json")
    rows = json.loads(result.stdout)
    assert {row["policy"] for row in rows} == {*POLICIES, *ORACLES, "edgeserve, preloads 2 at a time"}
    assert {0.1, 0.25, 0.5} <= {row["capacity_share"] for row in rows}
    assert "as asked for" in result.stderr
    assert (tmp_path / "edgeserve-paper.png").exists()


def test_help_and_a_run_work_as_a_process_and_help_imports_nothing_heavy(tmp_path: Path) -> None:
    heavy = {"matplotlib", "numpy", "torch", "ray"}
    script = (
        "import sys\nfrom serve_app.cli.main import main\n"
        "try:\n    main(['simulate', '--help'])\nexcept SystemExit:\n    pass\n"
        f"print(sorted({heavy!r} & sys.modules.keys()))"
    )
    shown = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert "--capacity" in shown.stdout
    assert shown.stdout.splitlines()[-1] == "[]"
    command = [sys.executable, "-m", "serve_app", "simulate", "--trace", SMALL, "--policy", "lru,fifo", "--json"]
    environment = {**os.environ, "PYTHONWARNINGS": "error"}
    done = subprocess.run(
        [*command, "--jobs", "2"], capture_output=True, text=True, check=True, cwd=tmp_path, env=environment
    )
    assert [row["policy"] for row in json.loads(done.stdout)] == ["lru", "fifo"]
    assert done.stderr == ""
