"""Under load nothing is lost, memory stays bounded, and the death of a part is survived."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import httpx
from deployment_support import LOCATIONS, SMALL

from serve_app.serving import code_version
from serve_app.serving.coordinator import actor
from serve_app.store.model_store import ModelStore

HEADERS = {"Content-Type": "image/jpeg"}


class Load:
    """Bounded load from several threads: what came back, and what memory was reported meanwhile."""

    def __init__(self, deployment, photo: bytes, *, seed: int, clients: int = 6) -> None:
        self._deployment = deployment
        self._photo = photo
        self._seed = seed
        self._clients = clients
        self._stop = threading.Event()
        self.statuses: Counter[int] = Counter()
        self.outcomes: Counter[str] = Counter()
        self.errors: list[str] = []
        self.overrun: list[str] = []
        self._lock = threading.Lock()

    @contextmanager
    def running(self) -> Iterator[Load]:
        threads = [threading.Thread(target=self._client, args=(number,)) for number in range(self._clients)]
        threads.append(threading.Thread(target=self._watch))
        for thread in threads:
            thread.start()
        try:
            yield self
        finally:
            self._stop.set()
            for thread in threads:
                thread.join(timeout=120)

    @property
    def served(self) -> int:
        return self.statuses[200]

    def _client(self, number: int) -> None:
        rng = random.Random(self._seed + number)
        weights = [1 / (rank + 1) for rank in range(len(SMALL))]
        with httpx.Client(timeout=90) as client:
            for _ in range(2000):
                if self._stop.is_set():
                    return
                (model,) = rng.choices(SMALL, weights)
                url = f"{self._deployment.location(rng.choice(LOCATIONS))}/v1/classify?model={model}"
                try:
                    response = client.post(url, content=self._photo, headers=HEADERS)
                except httpx.HTTPError as error:
                    with self._lock:
                        self.errors.append(repr(error))
                    continue
                with self._lock:
                    self.statuses[response.status_code] += 1
                    if response.is_success:
                        self.outcomes[response.headers["X-EdgeServe-Outcome"]] += 1
                    else:
                        self.errors.append(response.text)

    def _watch(self) -> None:
        while not self._stop.wait(0.1):
            status = self._deployment.status()
            for name in LOCATIONS:
                row = status[name]
                if row["used_bytes"] > row["capacity_bytes"]:
                    self.overrun.append(f"{name}: {row['used_bytes']} > {row['capacity_bytes']}")


def until(condition, what: str, limit_s: float = 60) -> float:
    """Wait for something to come true and return the seconds; the bound only ends a test that would hang."""
    began = time.monotonic()
    while not condition():
        assert time.monotonic() - began < limit_s, f"{what}: not within {limit_s} s"
        time.sleep(0.05)
    return time.monotonic() - began


def check_nothing_lost(load: Load) -> None:
    assert not load.errors, load.errors[:3]
    assert set(load.statuses) == {200}
    assert not load.overrun, load.overrun[:3]


def check_directory_is_right(deployment) -> None:
    """Every location has one worker in the directory, and it holds what the directory says: nothing is loaded anew."""
    until(lambda: complete(deployment.status()), "every location is in the directory")
    until(lambda: _settled(deployment), "the last loads are reported")
    until(lambda: _loads_nothing_anew(deployment), "nothing is loaded in the background meanwhile")


def _loads_nothing_anew(deployment) -> bool:
    """Loads all that should be there; False if the background displaced some of it meanwhile, and nothing was shown."""
    before = deployment.status()
    for name in LOCATIONS:
        for row in before[name]["resident"]:
            url = f"{deployment.location(name)}/v2/repository/models/{row['model']}/load"
            httpx.post(url, timeout=60).raise_for_status()
    version = deployment.status()["coordinator"]["version"]
    until(lambda: deployment.status()["coordinator"]["version"] > version + 10, "new reports are in")
    after = deployment.status()
    if any(after[name]["preloads"] != before[name]["preloads"] for name in LOCATIONS):
        return False
    assert {name: after[name]["model_loads"] for name in LOCATIONS} == {
        name: before[name]["model_loads"] for name in LOCATIONS
    }
    return True


def complete(status) -> bool:
    """Whether every location has its worker in the directory."""
    return status["coordinator"]["up"] and all(status[name]["replicas"] == 1 for name in LOCATIONS)


def _settled(deployment) -> bool:
    """Whether several rounds of reports have brought no change."""
    before = deployment.status()
    version = before["coordinator"]["version"]
    until(lambda: deployment.status()["coordinator"]["version"] > version + 10, "new reports are in")
    after = deployment.status()
    return complete(after) and all(
        before[name][field] == after[name][field]
        for name in LOCATIONS
        for field in ("requests", "model_loads", "preloads")
    )


def test_twenty_concurrent_requests_for_an_absent_model_cause_one_load(deployment, photo) -> None:
    model, url = "mobilenet_v3_small", deployment.location("tokyo")
    for location in LOCATIONS:
        httpx.post(f"{deployment.location(location)}/v2/repository/models/{model}/unload", timeout=60)
    until(lambda: not _held(deployment, model), "the model is absent everywhere")
    before = deployment.status()["tokyo"]["model_loads"]

    async def burst() -> list[httpx.Response]:
        async with httpx.AsyncClient(timeout=60, limits=httpx.Limits(max_connections=20)) as client:
            query = f"{url}/v1/classify?model={model}&forward=never"
            return await asyncio.gather(*(client.post(query, content=photo, headers=HEADERS) for _ in range(20)))

    responses = asyncio.run(burst())
    assert [response.status_code for response in responses] == [200] * 20
    outcomes = Counter(response.headers["X-EdgeServe-Outcome"] for response in responses)
    assert outcomes["load"] == 1
    assert set(outcomes) <= {"load", "join", "hit"}
    until(lambda: deployment.status()["tokyo"]["model_loads"] > before, "the load is reported")
    assert deployment.status()["tokyo"]["model_loads"] == before + 1


def test_under_load_memory_is_bounded_nothing_is_lost_and_all_outcomes_occur(deployment, photo) -> None:
    load = Load(deployment, photo, seed=1)
    with load.running():
        until(
            lambda: load.errors or (load.served > 150 and set(load.outcomes) == {"hit", "join", "load", "forward"}),
            "all four outcomes",
            limit_s=120,
        )
    check_nothing_lost(load)
    assert set(load.outcomes) == {"hit", "join", "load", "forward"}


def test_killing_the_coordinator_during_load_loses_no_request(deployment, ray_cluster, photo) -> None:
    epoch = deployment.status()["coordinator"]["epoch"]
    load = Load(deployment, photo, seed=2)
    with load.running():
        until(lambda: load.served > 20, "load is under way")
        ray_cluster.kill(ray_cluster.get_actor("coordinator", namespace="edgeserve"), no_restart=False)
        served = load.served
        until(lambda: load.errors or load.served > served + 50, "requests are served meanwhile")
        until(
            lambda: deployment.status()["coordinator"]["epoch"] != epoch and deployment.status()["coordinator"]["up"],
            "a new coordinator is known",
        )
    check_nothing_lost(load)
    check_directory_is_right(deployment)


def test_a_coordinator_that_is_killed_for_good_is_replaced(deployment, ray_cluster) -> None:
    epoch = deployment.status()["coordinator"]["epoch"]
    ray_cluster.kill(ray_cluster.get_actor("coordinator", namespace="edgeserve"), no_restart=True)
    until(
        lambda: deployment.status()["coordinator"]["up"] and deployment.status()["coordinator"]["epoch"] != epoch,
        "a new coordinator is known",
    )
    check_directory_is_right(deployment)


def test_a_coordinator_of_other_code_is_replaced_and_one_of_this_code_is_not(
    deployment, ray_cluster, monkeypatch
) -> None:
    epoch = deployment.status()["coordinator"]["epoch"]
    actor.end_outdated()
    # It answers calls in order, so it would be gone by now.
    assert (
        ray_cluster.get(ray_cluster.get_actor("coordinator", namespace="edgeserve").code.remote())
        == code_version.digest()
    )
    assert deployment.status()["coordinator"]["epoch"] == epoch
    monkeypatch.setattr(code_version, "digest", lambda: "of an upgrade")
    actor.end_outdated()
    until(
        lambda: deployment.status()["coordinator"]["up"] and deployment.status()["coordinator"]["epoch"] != epoch,
        "a new coordinator is known",
    )
    check_directory_is_right(deployment)


def test_killing_a_worker_during_load_loses_no_request(deployment, photo) -> None:
    (pid,) = deployment.processes("ray::ServeReplica:paris:Worker")
    replica = {row["replica"] for row in deployment.status()["paris"]["resident"]}
    load = Load(deployment, photo, seed=3)
    with load.running():
        until(lambda: load.served > 20, "load is under way")
        os.kill(pid, signal.SIGKILL)
        served = load.served
        until(lambda: load.errors or load.served > served + 50, "requests are served meanwhile")
        until(
            lambda: not replica & {row["replica"] for row in deployment.status()["paris"]["resident"]},
            "the dead worker has left the directory",
        )
        until(lambda: deployment.status()["paris"]["replicas"] == 1, "a new worker is in the directory")
    check_nothing_lost(load)
    check_directory_is_right(deployment)


def _held(deployment, model: str) -> bool:
    status = deployment.status()
    return any(model in {row["model"] for row in status[name]["resident"]} for name in LOCATIONS)


def test_a_truncated_weights_file_fails_its_own_model_only_and_the_log_says_why(deployment, photo) -> None:
    model, url = "shufflenet_v2_x1_0", deployment.location("paris")
    for location in LOCATIONS:
        httpx.post(f"{deployment.location(location)}/v2/repository/models/{model}/unload", timeout=60)
    until(lambda: not _held(deployment, model), "the model is absent everywhere")
    store = ModelStore(deployment.folder / "store")
    blob = store.blob_path(store.manifest(model).files[0].name)
    whole = blob.rename(blob.with_suffix(".whole"))
    blob.write_bytes(b"cut short")

    def ready() -> httpx.Response:
        return httpx.get(f"{url}/v2/models/{model}/ready", timeout=60)

    try:
        until(lambda: ready().status_code == 503, "the model is not ready, before any request finds out")
        assert "publish it again" in ready().json()["reason"]
        assert httpx.get(f"{url}/v2/models/squeezenet1_1/ready", timeout=60).status_code == 200
        broken = httpx.post(
            f"{url}/v1/classify?model={model}&forward=never",
            content=photo,
            headers={**HEADERS, "X-Request-Id": "the-broken-one"},
            timeout=60,
        )
        assert broken.status_code == 500
        assert "publish it again" in broken.json()["error"]
        assert "the-broken-one" in broken.json()["error"]
        other = httpx.post(f"{url}/v1/classify?model=squeezenet1_1", content=photo, headers=HEADERS, timeout=60)
        assert other.status_code == 200
        logs = (deployment.folder / "ray").glob("session_2*/logs/serve/replica_paris_Router_*.log")
        assert any("the-broken-one" in log.read_text() for log in logs)
    finally:
        whole.rename(blob)
    until(lambda: ready().status_code == 200, "the model is ready once its file is whole")
    retried = httpx.post(f"{url}/v2/repository/models/{model}/load", timeout=60)
    assert retried.status_code == 200, retried.text
