"""What is handed to Serve when a configuration has changed: which of two is newer, and whose replicas are replaced."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from deployment_support import write_configuration

#: Ray's own, of another library, as it is imported.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


@pytest.fixture
def edge(tmp_path: Path) -> Path:
    write_configuration(tmp_path, 0)
    return tmp_path / "edge.yaml"


def built(edge: Path, location: str | None = None) -> Any:
    """The router's deployment."""
    from serve_app.serving.app import AppArgs, build

    return build(AppArgs(edge=str(edge), location=location))._bound_deployment


def issued(edge: Path) -> int:
    return int(built(edge)._deployment_config.user_config["issued"])


def test_a_backup_that_is_put_back_is_the_newest_configuration(edge: Path, tmp_path: Path) -> None:
    backup = tmp_path / "edge.yaml.orig"
    shutil.copy(edge, backup)
    os.utime(backup, (1, 1))
    edge.write_text(edge.read_text())
    changed = issued(edge)
    backup.replace(edge)
    assert issued(edge) >= changed


def test_a_configuration_that_stays_is_as_new_as_before(edge: Path) -> None:
    assert issued(edge) == issued(edge)


def test_the_gateway_is_replaced_when_it_would_stand_in_for_a_location_that_has_gone(edge: Path) -> None:
    before = {name: built(edge, name)._version for name in (None, "tokyo")}
    settings = yaml.safe_load(edge.read_text())
    del settings["locations"]["paris"]
    edge.write_text(yaml.safe_dump(settings, sort_keys=False))
    assert built(edge)._version != before[None]
    assert built(edge, "tokyo")._version == before["tokyo"]


def test_a_worker_is_given_the_time_that_it_may_take_to_hand_over(edge: Path) -> None:
    def given_s() -> float:
        worker = built(edge, "paris").init_args[2]._bound_deployment
        return float(worker._deployment_config.graceful_shutdown_timeout_s)

    settings = yaml.safe_load(edge.read_text())
    times = []
    for hand_over in ("5s", "9s"):
        settings["worker"] = {"hand_over": hand_over}
        edge.write_text(yaml.safe_dump(settings))
        times.append(given_s())
    assert times[0] > 5
    assert times[1] - times[0] == 4
