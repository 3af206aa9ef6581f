"""The command in an empty folder, and files for it."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from simulator_support import Simulate

from serve_app.cli.main import cli


@pytest.fixture
def simulate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Simulate:
    """``edgeserve simulate`` in an empty folder, in this process, with one job by default."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("EDGESERVE_TRACES", raising=False)

    def run(*arguments: str) -> Result:
        jobs = () if "--jobs" in arguments else ("--jobs", "1")
        return CliRunner().invoke(cli, ["simulate", *arguments, *jobs])

    return run


@pytest.fixture
def simulate_rows(simulate: Simulate) -> Callable[..., list[dict[str, Any]]]:
    """The rows that it prints as JSON."""

    def run(*arguments: str) -> list[dict[str, Any]]:
        result = simulate(*arguments, "--json")
        assert result.exit_code == 0, result.output
        rows: list[dict[str, Any]] = json.loads(result.stdout)
        return rows

    return run


@pytest.fixture
def profiles_file(tmp_path: Path) -> Path:
    path = tmp_path / "profiles.csv"
    path.write_text("name,size_mb,load_s,exec_s\nsmall,10,1,0.5\nmedium,20,3,0.25\nlarge,40,4,1\n")
    return path


@pytest.fixture
def azure_file(tmp_path: Path) -> Path:
    """Twenty functions and forty minutes in the format of Azure Functions 2019."""
    rng = random.Random(0)
    lines = ["HashOwner,HashApp,HashFunction,Trigger," + ",".join(str(minute) for minute in range(1, 41))]
    for function in range(20):
        counts = [int(rng.random() < 1 / (1 + function)) + (minute % (function + 2) == 0) for minute in range(40)]
        lines.append(f"o{function % 5},a{function},f{function},timer," + ",".join(map(str, counts)))
    path = tmp_path / "calls.csv"
    path.write_text("\n".join(lines) + "\n")
    return path
