"""``edgeserve-sim``: the simulator in an environment without Ray and torch."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

import pytest
from wheel_support import SIMULATOR, Installation, build_wheel, install

from serve_app import __version__
from serve_app.cli.main import COMMANDS

HEAVY = ("ray", "torch", "torchvision", "fastapi", "httpx", "safetensors")
TRACE = "zipf:models=12&requests=300&rate=0.2"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_wheel(SIMULATOR, tmp_path_factory.mktemp("dist"))


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Installation:
    return install(wheel, tmp_path_factory.mktemp("installed"), dependencies=True, variables={})


def test_nothing_of_the_deployment_is_in_the_wheel(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as content:
        folders = {name.split("/")[1] for name in content.namelist() if name.startswith("serve_app/")}
    assert folders & {"core", "simulator", "workload"} == {"core", "simulator", "workload"}
    assert not folders & {"serving", "models", "store", "defaults"}
    assert wheel.name.startswith(f"edgeserve_sim-{__version__}-")


def test_neither_ray_nor_torch_is_installed(installed: Installation) -> None:
    script = f"import importlib.util; print([name for name in {HEAVY} if importlib.util.find_spec(name)])"
    assert installed.python(script) == "[]\n"


@pytest.mark.parametrize("time", ["load-delay", "full"])
def test_simulate_works(installed: Installation, time: str) -> None:
    options = ("--trace", TRACE, "--policy", "lru,edgeserve", "--locations", "2", "--time", time)
    rows = json.loads(installed.edgeserve("simulate", *options, "--json", "--plot", f"{time}.png").stdout)
    assert [row["policy"] for row in rows] == ["lru", "edgeserve"]
    assert (installed.work / f"{time}.png").stat().st_size


@pytest.mark.parametrize("command", [name for name in COMMANDS if name != "simulate"])
def test_other_commands_say_what_to_install(installed: Installation, command: str) -> None:
    said = installed.edgeserve(command, "--detach", "argument", fails=True)
    assert said.stdout == ""
    assert said.stderr.startswith(f"edgeserve: edgeserve {command} needs the package edgeserve")
    assert said.stderr.endswith("pip install edgeserve\n")
    assert said.stderr.count("\n") == 1


def test_help_names_all_commands_and_version_is_that_of_the_project(installed: Installation) -> None:
    shown = installed.edgeserve("--help").stdout
    assert all(f"\n  {command} " in shown for command in COMMANDS)
    assert installed.edgeserve("--version").stdout.split()[-1] == __version__
