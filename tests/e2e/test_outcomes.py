"""Every task on every runtime, over HTTP: answers are those of the original framework, whatever the outcome."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import embedder_model
import httpx
import mixed_models
import numpy as np
import pytest
import yaml
from deployment_support import Deployment, free_port, run_cli

pytestmark = [pytest.mark.ray, pytest.mark.slow]

pytest.importorskip("tokenizers")

LOCATIONS = ("paris", "tokyo")
#: Loads so slowly that requests which come meanwhile wait for their turn together.
SLOW = "slow"
CLIENTS = 8
#: Answers are rounded to four digits at most.
TOLERANCE = 1e-4


def runtimes() -> tuple[str, ...]:
    import importlib.util

    return tuple(name for name in mixed_models.RUNTIMES if importlib.util.find_spec(name) is not None)


def write_project(folder: Path, port: int) -> None:
    embedder_model.write(folder)
    mixed_models.write_slow(folder / "slow.onnx")
    models = {
        f"{task}-{runtime}": mixed_models.write(folder, task, runtime)
        for task in mixed_models.TASKS
        for runtime in runtimes()
    }
    edge = {
        "catalog": "catalog.yaml",
        "store": "store",
        "locations": {name: {"memory": "200MiB"} for name in LOCATIONS},
        "default_link": {"rtt": "100us"},
        # Nothing comes and goes but by requests, and one load at a time.
        "worker": {"parallel_loads": 1, "parallel_preloads": 0},
    }
    applications = [
        {
            "name": name or "gateway",
            "route_prefix": f"/{name}",
            "import_path": "serve_app.serving.app:build",
            "args": {"edge": str(folder / "edge.yaml"), **({"location": name} if name else {})},
        }
        for name in (*LOCATIONS, "")
    ]
    local = {"http_options": {"host": "127.0.0.1", "port": port}, "applications": applications}
    catalog = {"models": {**models, SLOW: {"builder": "onnx:slow.onnx"}}}
    for name, content in (("catalog", catalog), ("edge", edge), ("local", local)):
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(content))


@pytest.fixture(scope="module")
def mixture() -> Iterator[Deployment]:
    # Ray's sockets live below its folder, and their paths must be short.
    folder = Path(tempfile.mkdtemp(prefix="es-"))
    port = free_port()
    write_project(folder, port)
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "EDGESERVE_"))},
        "RAY_TMPDIR": str(folder),
        "XDG_CACHE_HOME": str(folder / "cache"),
    }
    started = run_cli(("up", str(folder / "local.yaml"), "--detach", "--no-compile"), environment)
    try:
        assert started.returncode == 0, f"edgeserve up failed:\n{started.stdout}\n{started.stderr}"
        running = json.loads((folder / "cache" / "edgeserve" / "up.json").read_text())
        yield Deployment(f"http://127.0.0.1:{port}", folder, environment, running["address"])
    finally:
        stopped = run_cli(("down",), environment)
        shutil.rmtree(folder, ignore_errors=True)
    assert stopped.returncode == 0, stopped.stderr


def unload_everywhere(mixture: Deployment, model: str) -> None:
    for name in LOCATIONS:
        unload_at(mixture, name, model)


def unload_at(mixture: Deployment, location: str, model: str) -> None:
    response = httpx.post(f"{mixture.location(location)}/v2/repository/models/{model}/unload", timeout=60)
    assert response.status_code in (200, 404), response.text


def is_held(mixture: Deployment, location: str, model: str) -> bool:
    """Whether a location holds a model, as far as its router knows."""
    index = httpx.post(f"{mixture.location(location)}/v2/repository/index", timeout=60).json()
    return next(row["state"] for row in index if row["name"] == model) == "READY"


@pytest.mark.parametrize("runtime", mixed_models.RUNTIMES)
@pytest.mark.parametrize("task", mixed_models.TASKS)
def test_every_outcome_of_a_task_answers_as_the_original_framework_does(
    mixture: Deployment, task: str, runtime: str
) -> None:
    pytest.importorskip(runtime)
    asked = mixed_models.TASKS[task]
    expected = asked.expected(mixed_models.original(mixture.folder, task, runtime))
    model = f"{task}-{runtime}"
    seen: set[str] = set()

    def ask(location: str, forward: str) -> str:
        response = httpx.post(
            f"{mixture.location(location)}/v1/predict",
            params={"model": model, "forward": forward, **asked.options},
            content=asked.sent,
            headers={"Content-Type": asked.content_type},
            timeout=60,
        )
        assert response.status_code == 200, response.text
        np.testing.assert_allclose(asked.given(response.json()), expected, rtol=0, atol=TOLERANCE)
        return response.headers["X-EdgeServe-Outcome"]

    def occupy(_: Any) -> str:
        slow = httpx.post(f"{mixture.location('paris')}/v2/repository/models/{SLOW}/load", timeout=60)
        assert slow.status_code == 200, slow.text
        return "occupied"

    deadline_s = time.monotonic() + 60
    while not {"load", "join"} <= seen:
        assert time.monotonic() < deadline_s, f"only {seen}"
        for each in (SLOW, model):
            unload_everywhere(mixture, each)
        with ThreadPoolExecutor(CLIENTS + 1) as clients:
            occupied = clients.submit(occupy, None)
            outcomes = list(clients.map(lambda _: ask("paris", "never"), range(CLIENTS)))
            occupied.result()
        assert outcomes.count("load") == 1, "simultaneous first requests make one load"
        seen.update(outcomes)
    seen.add(ask("paris", "never"))
    # The other location goes on loading the model itself until it knows that this one holds it.
    while "forward" not in seen:
        assert time.monotonic() < deadline_s, f"only {seen}"
        unload_at(mixture, "tokyo", model)
        while is_held(mixture, "tokyo", model):
            assert time.monotonic() < deadline_s, "the router of tokyo does not learn that its worker has unloaded it"
        seen.add(ask("tokyo", "prefer"))
    assert seen == {"load", "join", "hit", "forward"}
