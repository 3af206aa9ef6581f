"""Placement in the real cluster: what is required or listed is there, and what is lost is made up for."""

from __future__ import annotations

import os
import signal
from typing import Any

import httpx
from deployment_support import GUARDED, LISTED, LOCATIONS
from test_load_and_faults import complete, until


def rows(deployment: Any, model_id: str) -> dict[str, dict[str, Any]]:
    """The model's line at every location that has it ready."""
    status = deployment.status()
    return {
        name: row
        for name in LOCATIONS
        for row in status[name]["resident"]
        if row["model"] == model_id and row["state"] == "ready"
    }


def replicas(deployment: Any, location: str) -> set[str]:
    """The workers of a location that hold anything."""
    return {row["replica"] for row in deployment.status()[location]["resident"]}


def test_a_model_with_min_copies_is_at_so_many_locations_and_pinned_though_nobody_asks(deployment) -> None:
    until(lambda: len(rows(deployment, GUARDED)) >= 2, "there are two copies")
    until(lambda: sum(row["pinned"] for row in rows(deployment, GUARDED).values()) == 2, "two of them are pinned")
    (name, *_) = [name for name, row in rows(deployment, GUARDED).items() if row["pinned"]]
    refused = httpx.post(f"{deployment.location(name)}/v2/repository/models/{GUARDED}/unload", timeout=60)
    assert refused.status_code == 409
    assert "min_copies" in refused.json()["error"]


def test_a_copy_that_died_with_its_worker_is_made_up_for(deployment) -> None:
    until(lambda: len(rows(deployment, GUARDED)) >= 2, "there are two copies")
    (lost, *_) = rows(deployment, GUARDED)
    (pid,) = deployment.processes(f"ray::ServeReplica:{lost}:Worker")
    replica = rows(deployment, GUARDED)[lost]["replica"]
    os.kill(pid, signal.SIGKILL)
    until(
        lambda: len([row for row in rows(deployment, GUARDED).values() if row["replica"] != replica]) >= 2,
        "there are two copies again",
    )
    until(lambda: replica not in replicas(deployment, lost) and complete(deployment.status()), "a new worker is there")


def test_what_a_location_lists_is_loaded_as_its_worker_starts(deployment) -> None:
    # One that is killed while it starts would not come back for long.
    until(lambda: complete(deployment.status()), "every location has a worker")
    (pid,) = deployment.processes("ray::ServeReplica:tokyo:Worker")
    before = replicas(deployment, "tokyo")
    os.kill(pid, signal.SIGKILL)
    until(
        lambda: any(
            row["model"] == LISTED and row["replica"] not in before for row in deployment.status()["tokyo"]["resident"]
        ),
        "the new worker has it",
    )


def test_the_orders_are_counted(deployment) -> None:
    until(lambda: sum(deployment.status()[name]["preloads"] for name in LOCATIONS) >= 2, "preloads are reported")
    text = httpx.get(f"{deployment.url}/metrics", timeout=60).raise_for_status().text
    assert "edgeserve_preloads_total" in text
