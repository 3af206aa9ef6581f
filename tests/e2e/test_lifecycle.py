"""Versions, stores that projects share, and damaged files, as users of a running deployment see them."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import yaml
from deployment_support import Deployment, family_of, free_port, run_cli
from model_support import images

from serve_app.store.model_store import ModelStore

SUPPORT = Path(__file__).parents[1] / "support"
#: Of the model that changes, by its seeds.
FIRST, SECOND = "random:1", "random:2"
INPUT = {"resize_px": 32, "crop_px": 32}


def write_catalog(folder: Path, weights: str, **more: Any) -> None:
    # Of one form each, so that answers are equal to the last digit.
    tiny = {"builder": "tiny_models:Tied", "input": INPUT, "runtime": "torch"}
    models = {
        "changing": {**tiny, "weights": weights},
        "steady": {**tiny, "weights": "random:7"},
        "sometimes": {**tiny, "builder": "sometimes_models:needs_file", "weights": "random:1"},
        "compiled": {"builder": "torchvision:squeezenet1_1", "weights": "random:1", "input": INPUT},
        **more,
    }
    (folder / "catalog.yaml").write_text(yaml.safe_dump({"models": models}))


def write_project(folder: Path, store: Path, port: int, weights: str) -> None:
    folder.mkdir(exist_ok=True)
    edge = {"catalog": "catalog.yaml", "store": str(store), "locations": {"paris": {"memory": "64MiB"}}}
    application = {
        "name": "paris",
        "route_prefix": "/",
        "import_path": "serve_app.serving.app:build",
        "args": {"edge": str(folder / "edge.yaml"), "location": "paris"},
    }
    local = {"http_options": {"host": "127.0.0.1", "port": port}, "applications": [application]}
    write_catalog(folder, weights)
    (folder / "edge.yaml").write_text(yaml.safe_dump(edge))
    (folder / "local.yaml").write_text(yaml.safe_dump(local))


def until(condition: Callable[[], bool], what: str) -> None:
    deadline_s = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline_s, what
        time.sleep(0.05)


@pytest.fixture(scope="module")
def lifecycle() -> Iterator[Deployment]:
    folder = Path(tempfile.mkdtemp(prefix="es-"))
    port = free_port()
    write_project(folder / "mine", folder / "store", port, FIRST)
    write_project(folder / "others", folder / "store", port, SECOND)
    flag = folder / "flag"
    flag.touch()
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "EDGESERVE_"))},
        "RAY_TMPDIR": str(folder),
        "XDG_CACHE_HOME": str(folder / "cache"),
        "PYTHONPATH": os.pathsep.join([str(SUPPORT), str(SUPPORT.parents[1])]),
        "SOMETIMES_FILE": str(flag),
    }
    published = run_cli(("publish", "--edge", str(folder / "mine" / "edge.yaml")), environment)
    assert published.returncode == 0, published.stderr
    flag.unlink()
    shutil.rmtree(folder / "store" / "forms")
    started = run_cli(("up", str(folder / "mine" / "local.yaml"), "--detach", "--no-compile"), environment)
    try:
        assert started.returncode == 0, f"{started.stdout}\n{started.stderr}"
        (folder / "up.err").write_text(started.stderr)
        running = json.loads((folder / "cache" / "edgeserve" / "up.json").read_text())
        yield Deployment(f"http://127.0.0.1:{port}", folder, environment, running["address"])
    finally:
        stopped = run_cli(("down",), environment)
        left = [f"{process.pid} {process.name()}" for process in family_of(folder)]
        shutil.rmtree(folder, ignore_errors=True)
    assert stopped.returncode == 0, stopped.stderr
    assert not left


def test_locations_take_over_what_is_compiled_while_they_serve(lifecycle: Deployment) -> None:
    """The first test, because every ``publish`` compiles what is not."""
    first = infer(lifecycle, "compiled")
    assert first.headers["X-EdgeServe-Form"] == "mapped; precision=float32"
    seen: list[httpx.Response] = []
    done = threading.Event()

    def ask() -> None:
        while not done.is_set():
            seen.append(infer(lifecycle, "compiled"))

    thread = threading.Thread(target=ask)
    thread.start()
    try:
        assert edgeserve(lifecycle, "publish").returncode == 0
        until(lambda: seen[-1].headers.get("X-EdgeServe-Form", "").startswith("onnxruntime"), "another form answers")
    finally:
        done.set()
        thread.join()
    assert {response.status_code for response in seen} == {200}
    expected = numbers(first.json())
    for response in seen:
        np.testing.assert_allclose(numbers(response.json()), expected, rtol=0, atol=1e-4 * np.abs(expected).max())


@pytest.fixture(autouse=True)
def _begin_with_the_first_version(lifecycle: Deployment, request: pytest.FixtureRequest) -> None:
    if request.function is test_locations_take_over_what_is_compiled_while_they_serve:
        return
    write_catalog(lifecycle.folder / "mine", FIRST)
    assert edgeserve(lifecycle, "publish").returncode == 0
    edgeserve(lifecycle, "rollback", "changing", "--to", "1")
    until(lambda: answer(lifecycle)["model_version"] == "1", "version 1 answers")


def edgeserve(deployment: Deployment, *arguments: str, project: str = "mine") -> Any:
    return deployment.cli(*arguments, "--edge", str(deployment.folder / project / "edge.yaml"))


def infer(deployment: Deployment, model: str = "changing", version: str = "") -> httpx.Response:
    path = f"/v2/models/{model}" + (f"/versions/{version}" if version else "")
    tensor = {"name": "input", "datatype": "FP32", "shape": [1, 3, 32, 32], "data": images(1, 32).ravel().tolist()}
    return httpx.post(f"{deployment.url}{path}/infer", json={"inputs": [tensor]}, timeout=60)


def answer(deployment: Deployment, model: str = "changing", version: str = "") -> Any:
    response = infer(deployment, model, version)
    assert response.status_code == 200, response.text
    return response.json()


def numbers(response: Any) -> np.ndarray:
    return np.array(response["outputs"][0]["data"])


def publish_second(deployment: Deployment, *arguments: str) -> None:
    write_catalog(deployment.folder / "mine", SECOND)
    done = edgeserve(deployment, "publish", *arguments)
    assert done.returncode == 0, done.stderr


def test_up_and_readiness_say_which_model_no_worker_can_load_and_why(lifecycle: Deployment) -> None:
    said = (lifecycle.folder / "up.err").read_text()
    assert "model sometimes cannot be served at paris: FileNotFoundError: flag was moved" in " ".join(said.split())
    ready = httpx.get(f"{lifecycle.url}/v2/models/sometimes/ready", timeout=30)
    assert ready.status_code == 503
    assert ready.json()["reason"] == "FileNotFoundError: flag was moved"
    metadata = httpx.get(f"{lifecycle.url}/v2/models/sometimes", timeout=30).json()
    assert metadata["parameters"]["problem"] == "FileNotFoundError: flag was moved"
    assert httpx.get(f"{lifecycle.url}/v2/models/steady/ready", timeout=30).json() == {"name": "steady", "ready": True}


def test_another_project_that_publishes_the_same_name_changes_no_answer(lifecycle: Deployment) -> None:
    before = numbers(answer(lifecycle))
    flag = lifecycle.folder / "flag"
    flag.touch()
    try:
        assert edgeserve(lifecycle, "publish", project="others").returncode == 0
    finally:
        flag.unlink()
    httpx.post(f"{lifecycle.url}/v2/repository/models/changing/unload", timeout=60).raise_for_status()
    assert np.array_equal(numbers(answer(lifecycle)), before)


def test_a_new_version_takes_over_without_losing_a_request_and_is_rolled_back(lifecycle: Deployment) -> None:
    first = numbers(answer(lifecycle))
    seen: Counter[tuple[int, str]] = Counter()
    done = threading.Event()

    def ask() -> None:
        while not done.is_set():
            response = infer(lifecycle)
            seen[response.status_code, response.json().get("model_version", "")] += 1

    thread = threading.Thread(target=ask)
    thread.start()
    try:
        publish_second(lifecycle)
        until(lambda: answer(lifecycle)["model_version"] == "2", "version 2 answers")
        second = numbers(answer(lifecycle))
        assert not np.array_equal(first, second)
        assert np.array_equal(numbers(answer(lifecycle, version="1")), first), "side by side"
        assert httpx.get(f"{lifecycle.url}/v2/models/changing", timeout=30).json()["versions"] == ["1", "2"]
        assert httpx.get(f"{lifecycle.url}/v2/models/changing/versions/2/ready", timeout=30).status_code == 200
        assert "version 1 of changing answers" in edgeserve(lifecycle, "rollback", "changing").stdout
        until(lambda: answer(lifecycle)["model_version"] == "1", "version 1 answers again")
    finally:
        done.set()
        thread.join(60)
    assert {status for status, _ in seen} == {200}
    assert {version for _, version in seen} == {"1", "2"}
    assert "stays at version 1" in edgeserve(lifecycle, "publish").stdout
    assert answer(lifecycle)["model_version"] == "1", "publishing the same again does not undo a rollback"


def test_a_canary_answers_its_share(lifecycle: Deployment) -> None:
    publish_second(lifecycle)
    edgeserve(lifecycle, "rollback", "changing", "--to", "1")
    assert edgeserve(lifecycle, "canary", "changing", "50%").returncode == 0
    until(lambda: any(answer(lifecycle)["model_version"] == "2" for _ in range(20)), "the canary answers")
    seen = Counter(answer(lifecycle)["model_version"] for _ in range(60))
    assert seen.keys() == {"1", "2"}
    assert edgeserve(lifecycle, "canary", "changing", "0%").returncode == 0


def test_versions_that_are_removed_are_gone_and_their_space_is_given_back(lifecycle: Deployment) -> None:
    publish_second(lifecycle)
    edgeserve(lifecycle, "rollback", "changing", "--to", "1")
    until(lambda: infer(lifecycle, version="2").status_code == 200, "there are two versions")
    refused = edgeserve(lifecycle, "remove", "changing", "--version", "1")
    assert (refused.returncode, refused.stderr.count("\n")) == (1, 1)
    assert edgeserve(lifecycle, "remove", "changing", "--version", "2").returncode == 0
    until(lambda: infer(lifecycle, version="2").status_code == 404, "version 2 is gone")
    assert "there is '1'" in infer(lifecycle, version="2").json()["error"]
    assert "freed" in edgeserve(lifecycle, "store", "gc").stdout
    assert answer(lifecycle)["model_version"] == "1"


@pytest.mark.parametrize("how", ["truncated", "overwritten", "removed"])
def test_a_damaged_file_fails_its_own_model_with_a_sentence_until_it_is_published_again(
    lifecycle: Deployment, how: str
) -> None:
    before, workers = numbers(answer(lifecycle)), lifecycle.processes("ray::ServeReplica:paris:Worker")
    store = ModelStore(lifecycle.folder / "store")
    entries = ModelStore(lifecycle.folder / "store").manifest_keys("changing")
    manifest = next(each for each in map(store.read, entries) if each.model.weights_actual == FIRST)
    blob = store.blob_path(manifest.files[0].name)
    blob.chmod(0o644)
    if how == "truncated":
        os.truncate(blob, 100)
    elif how == "overwritten":
        blob.write_bytes(bytes(blob.stat().st_size))
    else:
        blob.unlink()
    failed = infer(lifecycle)
    assert failed.status_code == 500
    assert "publish it again" in failed.json()["error"]
    assert blob.name in failed.json()["error"]
    assert answer(lifecycle, "steady")["model_version"] == "1"
    assert edgeserve(lifecycle, "publish").returncode == 0
    until(lambda: infer(lifecycle).status_code == 200, "publishing again heals it")
    assert np.array_equal(numbers(answer(lifecycle)), before)
    assert lifecycle.processes("ray::ServeReplica:paris:Worker") == workers, "no worker died"
