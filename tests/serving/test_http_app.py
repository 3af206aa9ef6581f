"""Every address of a router's HTTP interface, without Ray: what it answers, and how it refuses."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import httpx
import pytest
from fakes import FakePool, done, make_router, published, report

from serve_app.config.edge import LimitSettings
from serve_app.core.catalog import Catalog
from serve_app.serving.api.http_app import build_http_app
from serve_app.serving.api.request_reader import HttpSettings

IMAGE = {"Content-Type": "image/png"}


def client(
    *reports: Any,
    pool: FakePool | None = None,
    location: str | None = "paris",
    catalog: Catalog | None = None,
    **limits: int,
) -> Any:
    settings = HttpSettings(
        location=location, default_location="paris", limits=LimitSettings(**{"body": 4096, **limits}), token=None
    )

    async def scrape() -> str:
        return "ray_edgeserve_resident_models 1\n"

    changes = {"catalog": catalog} if catalog else {}
    app = build_http_app(make_router(pool or FakePool(), *reports, **changes), settings, scrape)
    return httpx.AsyncClient(transport=httpx.ASGITransport(app, raise_app_exceptions=False), base_url="http://edge")


async def test_the_server_names_its_extensions() -> None:
    async with client() as http:
        content = (await http.get("/v2")).json()
    assert content["name"] == "edgeserve"
    assert {"binary_tensor_data", "classification", "model_repository"} <= set(content["extensions"])


async def test_a_location_is_ready_once_it_has_a_worker() -> None:
    async with client(report("tokyo")) as http:
        assert (await http.get("/v2/health/live")).status_code == 200
        assert (await http.get("/v2/health/ready")).status_code == 503
    async with client(report("paris")) as http:
        assert (await http.get("/v2/health/ready")).json() == {"ready": True}


async def test_a_model_is_ready_where_a_worker_can_hold_it() -> None:
    async with client(report("paris", capacity_bytes=99)) as http:
        answer = await http.get("/v2/models/small/ready")
    assert (answer.status_code, answer.json()) == (
        503,
        {"name": "small", "ready": False, "reason": "no worker has memory for small"},
    )
    async with client(report("paris", capacity_bytes=100)) as http:
        assert (await http.get("/v2/models/small/versions/1/ready")).status_code == 200


async def test_metadata_are_of_a_model_that_exists_in_the_one_version() -> None:
    async with client() as http:
        assert (await http.get("/v2/models/small")).json()["parameters"]["family"] == "digits"
        assert (await http.get("/v2/models/small/versions/2")).status_code == 404
        assert (await http.get("/v2/models/medium")).status_code == 404


async def test_the_index_says_which_models_the_location_holds() -> None:
    async with client(report("paris", "small"), report("tokyo", "big")) as http:
        index = (await http.post("/v2/repository/index")).json()
    assert {model["name"]: model["state"] for model in index} == {"small": "READY", "big": "UNAVAILABLE"}


async def test_models_are_loaded_and_unloaded_by_name() -> None:
    async with client(report("paris", "small")) as http:
        for order in ("load", "unload"):
            assert (await http.post(f"/v2/repository/models/small/{order}")).json() == {}
            assert (await http.post(f"/v2/repository/models/medium/{order}")).status_code == 404


async def test_the_status_has_every_location() -> None:
    async with client(report("paris", "small")) as http:
        content = (await http.get("/v1/locations")).json()
    rows = {row["name"]: row for row in content["locations"]}
    assert [model["model"] for model in rows["paris"]["resident"]] == ["small"]
    assert rows["tokyo"]["replicas"] == 0


async def test_metrics_are_plain_text() -> None:
    async with client() as http:
        answer = await http.get("/metrics")
    assert answer.headers["Content-Type"].startswith("text/plain; version=0.0.4")
    assert answer.text.startswith("ray_edgeserve_")


async def test_an_image_is_answered_with_the_labels_that_the_worker_found() -> None:
    answer = {"predictions": [{"label": "cat", "index": 1, "probability": 0.7}]}
    pool = FakePool(paris=[done("paris-1", outputs={}, answer=answer)])
    async with client(report("paris", "small"), pool=pool) as http:
        response = await http.post("/v1/classify?model=small&top_k=2", content=b"image", headers=IMAGE)
    content = response.json()
    assert content["predictions"] == answer["predictions"]
    assert pool.calls[0][2].payload.options["top_k"] == "2"
    assert (content["outcome"], response.headers["X-EdgeServe-Outcome"]) == ("hit", "hit")
    assert set(content["timing_ms"]) == {"queue", "load", "decode", "exec", "forward"}
    assert "warning" not in content


@pytest.mark.parametrize(("actual", "header"), [("random:0", "fallback"), ("pretrained", None)])
async def test_every_answer_says_that_random_weights_stand_in_for_real_ones(actual: str, header: str | None) -> None:
    catalog = Catalog((replace(published("small"), weights_requested="pretrained", weights_actual=actual),))
    pool = FakePool(paris=[done("paris-1"), done("paris-1", outputs={}, answer={"predictions": []})])
    tensor = {"name": "input", "datatype": "FP32", "shape": [1, 3, 8, 8], "data": [0.0] * 192}
    async with client(report("paris", "small"), pool=pool, catalog=catalog) as http:
        inferred = await http.post("/v2/models/small/infer", json={"inputs": [tensor]})
        classified = await http.post("/v1/classify?model=small", content=b"image", headers=IMAGE)
    assert [answer.status_code for answer in (inferred, classified)] == [200, 200]
    assert [answer.headers.get("X-EdgeServe-Weights") for answer in (inferred, classified)] == [header, header]


@pytest.mark.parametrize("query", ["", "model=small&top_k=0", "model=small&top_k=1001", "model=small&deadline_ms=soon"])
async def test_a_wrong_query_is_400(query: str) -> None:
    async with client(report("paris")) as http:
        assert (await http.post(f"/v1/classify?{query}", content=b"image", headers=IMAGE)).status_code == 400


async def test_a_body_must_have_an_accepted_type_and_size() -> None:
    async with client(report("paris")) as http:
        url = "/v1/classify?model=small"
        assert (await http.post(url, content=b"", headers=IMAGE)).status_code == 400
        assert (await http.post(url, content=b"x", headers={"Content-Type": "text/plain"})).status_code == 415
        assert (await http.post(url, content=b"x", headers={**IMAGE, "Content-Encoding": "gzip"})).status_code == 415
        assert (await http.post(url, content=b"x" * 4097, headers=IMAGE)).status_code == 413

        async def chunks() -> Any:
            for _ in range(5):
                yield b"x" * 1024

        assert (await http.post(url, content=chunks(), headers=IMAGE)).status_code == 413


async def test_a_location_serves_its_own_address_and_the_gateway_every_location() -> None:
    tokyo = {"X-Edge-Location": "tokyo"}
    async with client(report("paris"), report("tokyo")) as http:
        assert (await http.get("/v2/health/ready", headers=tokyo)).status_code == 404
    async with client(report("tokyo"), location=None) as http:
        assert (await http.get("/v2/health/ready", headers=tokyo)).status_code == 200
        assert (await http.get("/v2/health/ready")).status_code == 503
        assert (await http.get("/v2/health/ready", headers={"X-Edge-Location": "atlantis"})).status_code == 404


async def test_an_unknown_path_or_method_is_explained_in_one_sentence() -> None:
    async with client() as http:
        missing, method = await http.get("/v3"), await http.get("/v1/classify")
    assert (missing.status_code, method.status_code) == (404, 405)
    assert "/v3" in missing.json()["error"]
    assert "GET" in method.json()["error"]
