"""Changes of the configuration under load: nothing that users ask for meanwhile may fail."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from deployment_support import LARGE, LOCATIONS, SMALL, Deployment

CLIENTS = 3
#: Between two requests of a client: what is changed needs the processors as well.
PAUSE_S = 0.1


@dataclass
class Load:
    """What clients that never rest have seen."""

    served: int = 0
    failures: list[str] = field(default_factory=list)


@contextmanager
def load(deployment: Deployment, photo: bytes) -> Iterator[Load]:
    """Requests to every location, and through the gateway, until the end of the block."""
    seen, lock, over = Load(), threading.Lock(), threading.Event()
    urls = [deployment.location(name) for name in LOCATIONS] + [deployment.url]

    def client(number: int) -> None:
        with httpx.Client(timeout=60) as http:
            turn = number
            while not over.wait(PAUSE_S):
                turn += 1
                url = f"{urls[turn % len(urls)]}/v1/classify?model={SMALL[turn % len(SMALL)]}"
                try:
                    answer = http.post(url, content=photo, headers={"Content-Type": "image/jpeg"})
                    problem = None if answer.status_code == httpx.codes.OK else f"{answer.status_code} {answer.text}"
                except httpx.HTTPError as error:
                    problem = repr(error)
                with lock:
                    if problem is None:
                        seen.served += 1
                    else:
                        seen.failures.append(f"{url}: {problem}"[:300])

    threads = [threading.Thread(target=client, args=(number,)) for number in range(CLIENTS)]
    for thread in threads:
        thread.start()
    try:
        yield seen
    finally:
        over.set()
        for thread in threads:
            thread.join()


@pytest.fixture(scope="module")
def change(deployment: Deployment, photo: bytes) -> Iterator[Callable[[Callable[[dict[str, Any]], None]], Load]]:
    """Change configuration files (by name, as they are parsed) under load; afterwards all is as it was."""
    files = {name: deployment.folder / f"{name}.yaml" for name in ("catalog", "edge", "local")}
    original = {name: path.read_text() for name, path in files.items()}

    def make(edit: Callable[[dict[str, Any]], None]) -> Load:
        parsed = {name: yaml.safe_load(path.read_text()) for name, path in files.items()}
        edit(parsed)
        for name, content in parsed.items():
            files[name].write_text(yaml.safe_dump(content))
        return renew()

    def renew() -> Load:
        with load(deployment, photo) as seen:
            done = deployment.cli("up", str(files["local"]), "--detach", "--no-compile")
        assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
        return seen

    yield make
    for name, path in files.items():
        path.write_text(original[name])
    require_none_lost(renew())


def require_none_lost(seen: Load) -> None:
    assert not seen.failures, f"{len(seen.failures)} of {seen.served} failed: {seen.failures[:5]}"
    assert seen.served


def application(folder: Path, name: str) -> dict[str, Any]:
    return {
        "name": name,
        "route_prefix": f"/{name}",
        "import_path": "serve_app.serving.app:build",
        "args": {"edge": str(folder / "edge.yaml"), "location": name},
    }


def test_a_location_comes_and_goes_and_no_request_is_lost(deployment: Deployment, change: Any, photo: bytes) -> None:
    def add_oslo(files: dict[str, Any]) -> None:
        files["edge"]["locations"]["oslo"] = {"memory": "42MiB"}
        files["local"]["applications"].append(application(deployment.folder, "oslo"))

    require_none_lost(change(add_oslo))
    answer = httpx.post(
        f"{deployment.location('oslo')}/v1/classify?model={SMALL[0]}&forward=never",
        content=photo, headers={"Content-Type": "image/jpeg"}, timeout=60,
    )  # fmt: skip
    assert answer.json()["location"] == "oslo"
    through_gateway = httpx.post(
        f"{deployment.url}/v1/classify?model={SMALL[0]}&forward=never",
        content=photo, headers={"Content-Type": "image/jpeg", "X-Edge-Location": "oslo"}, timeout=60,
    )  # fmt: skip
    assert through_gateway.status_code == httpx.codes.OK


def test_a_location_that_goes_hands_over_what_it_is_popular_for(
    deployment: Deployment, change: Any, photo: bytes
) -> None:
    def add_oslo(files: dict[str, Any]) -> None:
        if "oslo" not in files["edge"]["locations"]:
            files["local"]["applications"].append(application(deployment.folder, "oslo"))
        # Room for it beside everything that the clients ask for all the time.
        files["edge"]["locations"]["oslo"] = {"memory": "180MiB"}
        files["edge"]["locations"]["virginia"]["memory"] = "180MiB"
        # Loads nothing on its own, so that whoever holds the model afterwards was told to.
        files["edge"]["policy"] = {"name": "lru"}
        files["edge"]["coordinator"]["placement_every"] = "1h"

    def remove_oslo(files: dict[str, Any]) -> None:
        del files["edge"]["locations"]["oslo"]
        files["local"]["applications"] = [app for app in files["local"]["applications"] if app["name"] != "oslo"]

    require_none_lost(change(add_oslo))
    for name in LOCATIONS:
        deployment.cli("unload", LARGE, "--location", name, "--url", deployment.url)
    for _ in range(20):
        answer = httpx.post(
            f"{deployment.location('oslo')}/v1/classify?model={LARGE}&forward=never",
            content=photo, headers={"Content-Type": "image/jpeg"}, timeout=60,
        )  # fmt: skip
        assert answer.json()["location"] == "oslo"
    assert not any(LARGE in {model["model"] for model in deployment.status()[name]["resident"]} for name in LOCATIONS)
    require_none_lost(change(remove_oslo))
    status = deployment.status()
    assert "oslo" not in status
    assert any(LARGE in {model["model"] for model in status[name]["resident"]} for name in LOCATIONS)


def test_memory_policy_and_models_change_in_place(deployment: Deployment, change: Any, photo: bytes) -> None:
    before = set(deployment.processes("ray::ServeReplica"))
    assert deployment.cli("load", LARGE, "--location", "virginia", "--url", deployment.url).returncode == 0

    def edit(files: dict[str, Any]) -> None:
        files["edge"]["locations"]["paris"]["memory"] = "30MiB"
        files["edge"]["policy"] = {"name": "gdsf"}
        files["catalog"]["models"]["added"] = {"builder": "torchvision:squeezenet1_1", "weights": "random:8"}
        del files["catalog"]["models"][LARGE]

    require_none_lost(change(edit))
    assert set(deployment.processes("ray::ServeReplica")) == before
    status = deployment.status()
    assert status["paris"]["capacity_bytes"] == 30 * 2**20
    assert status["paris"]["used_bytes"] <= 30 * 2**20
    for name in LOCATIONS:
        assert LARGE not in {model["model"] for model in status[name]["resident"]}
        for model_id, code in {"added": httpx.codes.OK, LARGE: httpx.codes.NOT_FOUND}.items():
            answer = httpx.post(
                f"{deployment.location(name)}/v1/classify?model={model_id}",
                content=photo, headers={"Content-Type": "image/jpeg"}, timeout=60,
            )  # fmt: skip
            assert answer.status_code == code, answer.text


def test_a_setting_that_replicas_cannot_take_in_replaces_them_and_no_request_is_lost(
    deployment: Deployment, change: Any
) -> None:
    before = set(deployment.processes("ray::ServeReplica"))

    def smaller_batches(files: dict[str, Any]) -> None:
        files["edge"]["limits"]["batch"] = 2

    require_none_lost(change(smaller_batches))
    after = set(deployment.processes("ray::ServeReplica"))
    assert len(after) == len(before)
    assert not before & after


def test_what_has_not_changed_is_left_as_it_is(deployment: Deployment, change: Any) -> None:
    before = set(deployment.processes("ray::ServeReplica"))
    require_none_lost(change(lambda files: None))
    assert set(deployment.processes("ray::ServeReplica")) == before


def test_the_address_cannot_change_while_it_serves(deployment: Deployment, tmp_path: Path) -> None:
    moved = yaml.safe_load((deployment.folder / "local.yaml").read_text())
    moved["http_options"]["port"] += 1
    (tmp_path / "moved.yaml").write_text(yaml.safe_dump(moved))
    refused = deployment.cli("up", str(tmp_path / "moved.yaml"), "--detach", "--no-compile")
    assert refused.returncode == 1
    assert "edgeserve down" in refused.stderr
    assert len(refused.stderr.strip().splitlines()) == 1
