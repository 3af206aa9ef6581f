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


def deployment_of(application: Any) -> Any:
    """What Serve deploys for an application; Serve has no public name for it."""
    return application._bound_deployment


def router(edge: Path, location: str | None = None) -> Any:
    """The deployment of a router."""
    from serve_app.serving.app import AppArgs, build

    return deployment_of(build(AppArgs(edge=str(edge), location=location)))


def issued(edge: Path) -> int:
    return int(router(edge).user_config["issued"])


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
    before = {name: router(edge, name).version for name in (None, "tokyo")}
    settings = yaml.safe_load(edge.read_text())
    del settings["locations"]["paris"]
    edge.write_text(yaml.safe_dump(settings, sort_keys=False))
    assert router(edge).version != before[None]
    assert router(edge, "tokyo").version == before["tokyo"]


def test_a_worker_is_given_the_time_that_it_may_take_to_hand_over(edge: Path) -> None:
    def given_s() -> float:
        from ray.serve.deployment import deployment_to_schema

        worker = deployment_of(router(edge, "paris").init_args[2])
        return float(deployment_to_schema(worker).graceful_shutdown_timeout_s)

    settings = yaml.safe_load(edge.read_text())
    times = []
    for hand_over in ("5s", "9s"):
        settings["worker"] = {"hand_over": hand_over}
        edge.write_text(yaml.safe_dump(settings))
        times.append(given_s())
    assert times[0] > 5
    assert times[1] - times[0] == 4
