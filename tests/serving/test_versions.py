"""Versions at one router and one worker: which one answers, and how a change gets there."""

from __future__ import annotations

import random
from pathlib import Path

import httpx
import numpy as np
import pytest
from fakes import FakeLink, FakeMetrics, FakePool, done, make_router, published, report, view

from serve_app.config.edge import LimitSettings
from serve_app.core.catalog import Catalog
from serve_app.core.coordination.rules import CoordinatorRules
from serve_app.core.links import Link
from serve_app.core.routing.rules import RoutingRules
from serve_app.core.versions import VersionRoute
from serve_app.errors import NotFound
from serve_app.serving.api.http_app import build_http_app
from serve_app.serving.api.request_reader import HttpSettings
from serve_app.serving.router.request import InferenceRequest
from serve_app.serving.router.router import Router
from serve_app.serving.version_watcher import VersionWatcher
from serve_app.store.model_store import ModelStore
from serve_app.store.projects import Project, first_published

VERSIONS = (published("m"), published("m@2"))
QUERY = InferenceRequest(name="m", location="paris", payload={"input": np.zeros((1, 3, 8, 8), np.float32)})
BODY = {"inputs": [{"name": "input", "datatype": "FP32", "shape": [1, 3, 8, 8], "data": [0.0] * 192}]}


def catalog(**route: object) -> Catalog:
    return Catalog(VERSIONS, {"m": VersionRoute(**route)}, {"lost": "it is not in the store"})


def go_on(router: Router, changed: Catalog) -> None:
    rules = RoutingRules(
        profiles=changed.profiles(), links={}, default_link=Link(rtt_s=0.001, bytes_per_s=1e9), horizon_s=10
    )
    router.reconfigure(changed, ("paris", "tokyo"), rules, CoordinatorRules(half_life_s=60.0, stale_after_s=2.0))


class Coordinator(FakeLink):
    def configure(self, rules: CoordinatorRules) -> None:
        return None


async def test_a_router_goes_over_when_a_worker_of_its_location_has_loaded_the_next_version() -> None:
    link = Coordinator()
    pool = FakePool(paris=[done("paris-1")] * 3)
    router = make_router(pool, report("paris", "m"), catalog=catalog(current=1), coordinator=link)
    await router.serve(QUERY)
    go_on(router, catalog(current=2))
    await router.serve(QUERY)
    link.delta = view(report("paris", "m", "m@2", sequence=2))
    await router.refresh()
    response = await router.serve(QUERY)
    assert [call[2].model_id for call in pool.calls] == ["m", "m", "m@2"]
    assert (response.model.name, response.model.version) == ("m", 2)


async def test_a_canary_answers_its_share_of_the_requests_that_name_no_version() -> None:
    pool = FakePool(paris=[done("paris-1")] * 200)
    canary = catalog(current=1, canary=2, canary_share=0.25)
    router = make_router(pool, report("paris", "m", "m@2"), catalog=canary, rng=random.Random(1))
    for _ in range(200):
        await router.serve(QUERY)
    asked = [call[2].model_id for call in pool.calls]
    assert 35 <= asked.count("m@2") <= 65


def http(router: Router) -> httpx.AsyncClient:
    async def scrape() -> str:
        return ""

    settings = HttpSettings(location="paris", default_location="paris", limits=LimitSettings(), token=None)
    transport = httpx.ASGITransport(build_http_app(router, settings, scrape))
    return httpx.AsyncClient(transport=transport, base_url="http://edge")


async def test_versions_are_asked_for_by_their_number_and_named_in_the_answer() -> None:
    pool = FakePool(paris=[done("paris-1")] * 3)
    async with http(make_router(pool, report("paris", "m", "m@2"), catalog=catalog(current=2))) as client:
        first = await client.post("/v2/models/m/versions/1/infer", json=BODY)
        current = await client.post("/v2/models/m/infer", json=BODY)
        missing = await client.post("/v2/models/m/versions/3/infer", json=BODY)
        metadata = (await client.get("/v2/models/m")).json()
        older = (await client.get("/v2/models/m/versions/1")).json()
    assert [call[2].model_id for call in pool.calls] == ["m", "m@2"]
    assert [(each.json()["model_name"], each.json()["model_version"]) for each in (first, current)] == [
        ("m", "1"),
        ("m", "2"),
    ]
    assert "X-EdgeServe-Version" not in first.headers
    assert current.headers["X-EdgeServe-Version"] == "2"
    assert (missing.status_code, "there is '1', '2'" in missing.json()["error"]) == (404, True)
    assert (metadata["versions"], metadata["parameters"]["version"]) == (["1", "2"], "2")
    assert older["parameters"]["version"] == "1"


async def test_what_cannot_be_served_says_why_before_a_request_does() -> None:
    broken = report("paris", unusable={"m": "its factory fails"})
    async with http(make_router(FakePool(), broken, catalog=catalog(current=1))) as client:
        ready = await client.get("/v2/models/m/ready")
        lost = await client.get("/v2/models/lost/ready")
        index = (await client.post("/v2/repository/index")).json()
        metadata = (await client.get("/v2/models/m")).json()
        asked = await client.post("/v2/models/lost/infer", json=BODY)
        rows = (await client.get("/v1/locations")).json()["locations"]
    assert (ready.status_code, ready.json()["reason"]) == (503, "its factory fails")
    assert (lost.status_code, lost.json()["reason"]) == (503, "it is not in the store")
    reasons = {(row["name"], row["version"]): row["reason"] for row in index}
    assert reasons == {("m", "1"): "its factory fails", ("m", "2"): "", ("lost", ""): "it is not in the store"}
    assert metadata["parameters"]["problem"] == "its factory fails"
    assert (asked.status_code, "not in the store" in asked.json()["error"]) == (404, True)
    assert rows[0]["unusable"] == {"m": "its factory fails"}


async def test_a_model_that_one_worker_can_serve_is_ready() -> None:
    broken = report("paris", unusable={"m": "its factory fails"})
    async with http(make_router(FakePool(), broken, report("tokyo"), catalog=catalog(current=1))) as client:
        assert (await client.get("/v2/models/m/ready")).json() == {"name": "m", "ready": True}


async def test_a_watcher_calls_back_once_for_every_change_and_records_what_is_served(tmp_path: Path) -> None:
    store, project = ModelStore(tmp_path / "store"), Project.of(tmp_path / "catalog.yaml")
    changes = []

    async def changed() -> None:
        changes.append(store.projects.read(project.key))

    watcher = VersionWatcher(store.projects, project.key, changed, lambda: ("m",))
    await watcher.look()
    assert store.projects.in_use(project.key, 60) == {"m"}
    first = first_published("f-a", 1.0)
    for versions in (first, first.published("f-b", 2.0)):
        store.projects.update(project, lambda state, versions=versions: state.with_versions("m", versions))
        await watcher.look()
        await watcher.look()
    assert [state.models["m"].current for state in changes if state is not None] == [1, 2]


def test_a_name_that_the_catalog_has_and_the_store_has_not_is_told_apart_from_one_that_nobody_has() -> None:
    router = make_router(FakePool(), catalog=catalog(current=1), metrics=FakeMetrics())
    with pytest.raises(NotFound, match="model lost is in the catalog and not served: it is not in the store"):
        router.models_named("lost")
    with pytest.raises(NotFound, match="no model or family is called 'found'"):
        router.models_named("found")
