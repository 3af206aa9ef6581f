"""``/v1/predict`` and ``/v1/embeddings`` without Ray: what they take, what they answer, and how they refuse."""

from __future__ import annotations

import base64
import dataclasses
from typing import Any

import httpx
import numpy as np
import pytest
from fakes import FakePool, ManualClock, done, make_router, published, report

from serve_app.config.edge import LimitSettings
from serve_app.core.catalog import Catalog, PublishedModel
from serve_app.core.task import ImageInput, TaskSpec
from serve_app.serving.api.http_app import build_http_app
from serve_app.serving.api.predict import TASK_OPTIONS
from serve_app.serving.api.request_reader import HttpSettings
from serve_app.serving.oip import OPTIONS
from serve_app.tasks.base import RawInput

TEXT = {"Content-Type": "text/plain; charset=utf-8"}
VECTORS = {"embeddings": [[0.6, 0.8], [1.0, 0.0]], "dimensions": 2, "tokens": 7}


def model_with(model_id: str, task: TaskSpec) -> PublishedModel:
    return dataclasses.replace(published(model_id), family=None, task=task)


MODELS = Catalog(
    (
        model_with("embedder", TaskSpec(kind="embedding", tokenizer="blob")),
        model_with("images", TaskSpec(kind="embedding", image=ImageInput())),
        model_with("detector", TaskSpec(kind="detection", image=ImageInput())),
    )
)


def client(*replies: Any) -> tuple[Any, FakePool]:
    pool = FakePool(paris=list(replies))
    router = make_router(pool, report("paris", *(model.model_id for model in MODELS.models)), clock=ManualClock())
    router.catalog = MODELS
    settings = HttpSettings(location="paris", default_location="paris", limits=LimitSettings(body=4096), token=None)

    async def scrape() -> str:
        return ""

    app = build_http_app(router, settings, scrape)
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    return httpx.AsyncClient(transport=transport, base_url="http://edge"), pool


async def test_an_answer_says_its_task_and_how_it_was_served() -> None:
    http, pool = client(done("paris-1", answer={"detections": []}))
    async with http:
        answer = await http.post("/v1/predict?model=detector&min_score=0.5", content=b"any file")
        assert answer.status_code == 415
        headers = {"Content-Type": "application/octet-stream"}
        answer = await http.post("/v1/predict?model=detector&min_score=0.5", content=b"any file", headers=headers)
    assert answer.headers["X-EdgeServe-Outcome"] == "hit"
    content = answer.json()
    assert set(content) == {"model", "location", "outcome", "task", "detections", "timing_ms"}
    assert (content["model"], content["task"], content["detections"]) == ("detector", "detection", [])
    ((_, _, work),) = pool.calls
    assert work.payload == RawInput(
        data=b"any file",
        content_type="application/octet-stream",
        options={"model": "detector", "min_score": "0.5"},
    )


@pytest.mark.parametrize(
    ("path", "content", "headers", "status", "sentence"),
    [
        ("/v1/predict", b"x", TEXT, 400, "query parameter model is missing"),
        ("/v1/predict?model=nobody", b"x", TEXT, 404, "nobody"),
        ("/v1/predict?modle=detector", b"x", TEXT, 400, "there is no option 'modle'; the options are model, top_k,"),
        ("/v1/predict?model=detector&topk=3", b"x", TEXT, 400, "there is no option 'topk'"),
        ("/v1/classify?model=images&min_score=1", b"x", {"Content-Type": "image/png"}, 400, "no option 'min_score'"),
        ("/v1/predict?model=detector", b"", TEXT, 400, "the body is empty"),
        ("/v1/predict?model=detector", b"x", {"Content-Type": "text/csv"}, 415, "audio/wav"),
        ("/v1/predict?model=detector&deadline_ms=soon", b"x", TEXT, 400, "deadline_ms"),
        ("/v1/predict?model=detector", b"x" * 4097, TEXT, 413, "4096"),
        ("/v1/classify?model=detector", b"x", {"Content-Type": "image/png"}, 400, "/v1/predict?model=detector"),
    ],
)
async def test_a_wrong_request_is_refused_in_one_sentence(
    path: str, content: bytes, headers: dict[str, str], status: int, sentence: str
) -> None:
    http, pool = client()
    async with http:
        answer = await http.post(path, content=content, headers=headers)
    assert answer.status_code == status
    assert sentence in answer.json()["error"]
    assert not pool.calls


async def test_vectors_of_texts_have_the_form_of_openai() -> None:
    http, pool = client(done("paris-1", answer=VECTORS), done("paris-1", answer=VECTORS))
    body = {"model": "embedder", "input": ["a", "b"]}
    async with http:
        plain = (await http.post("/v1/embeddings", json=body)).json()
        packed = (await http.post("/v1/embeddings", json={**body, "encoding_format": "base64"})).json()
    assert plain == {
        "object": "list",
        "data": [
            {"object": "embedding", "index": 0, "embedding": [0.6, 0.8]},
            {"object": "embedding", "index": 1, "embedding": [1.0, 0.0]},
        ],
        "model": "embedder",
        "usage": {"prompt_tokens": 7, "total_tokens": 7},
    }
    first = np.frombuffer(base64.b64decode(packed["data"][0]["embedding"]), "<f4")
    assert first.tolist() == np.float32([0.6, 0.8]).tolist()
    assert pool.calls[0][2].payload.data == b'["a","b"]'


@pytest.mark.parametrize(
    ("body", "status", "sentence"),
    [
        ({"input": "a"}, 400, "the field model is missing"),
        ({"model": "embedder"}, 400, "the field input must be a text"),
        ({"model": "embedder", "input": []}, 400, "not empty"),
        ({"model": "embedder", "input": [1, 2]}, 400, "holds tokens"),
        ({"model": "embedder", "input": [[1, 2]]}, 400, "holds tokens"),
        ({"model": "embedder", "input": ["a", None]}, 400, "a text or a list of texts"),
        ({"model": "embedder", "input": "a", "encoding_format": "int8"}, 400, "float, base64"),
        ({"model": "embedder", "input": "a", "dimensions": 3}, 400, "vectors of 2 dimensions, not 3"),
        ({"model": "embedder", "input": "a", "top_k": 3}, 400, "no field 'top_k'"),
        ({"model": "images", "input": "a"}, 400, "embeds images, not texts; ask /v1/predict?model=images"),
        ({"model": "detector", "input": "a"}, 400, "has the task 'detection', not texts"),
        ({"model": "nobody", "input": "a"}, 404, "nobody"),
        ([], 400, "the body is a JSON list"),
    ],
)
async def test_an_error_has_the_form_that_clients_of_openai_read(body: Any, status: int, sentence: str) -> None:
    http, _ = client(done("paris-1", answer=VECTORS))
    async with http:
        answer = await http.post("/v1/embeddings", json=body)
    assert answer.status_code == status
    error = answer.json()["error"]
    assert sentence in error["message"]
    assert error["type"] == "invalid_request_error"


async def test_an_unknown_option_of_embeddings_is_refused_where_clients_of_openai_look() -> None:
    http, pool = client()
    async with http:
        answer = await http.post("/v1/embeddings?deadline=5", json={"model": "embedder", "input": "a"})
    assert answer.status_code == 400
    assert "there is no option 'deadline'; the options are deadline_ms" in answer.json()["error"]["message"]
    assert not pool.calls


@pytest.mark.parametrize(
    ("path", "options"),
    [
        ("/v1/predict", {"model", *TASK_OPTIONS, *OPTIONS}),
        ("/v1/classify", {"model", "top_k", *OPTIONS}),
        ("/v1/embeddings", set(OPTIONS)),
    ],
)
async def test_the_description_names_every_option_that_is_taken(path: str, options: set[str]) -> None:
    http, _ = client()
    async with http:
        post = (await http.get("/openapi.json")).json()["paths"][path]["post"]
    assert {each["name"] for each in post["parameters"] if each["in"] == "query"} == options


async def test_the_description_has_the_body_of_every_request_that_takes_one() -> None:
    http, _ = client()
    async with http:
        paths = (await http.get("/openapi.json")).json()["paths"]
    infer = paths["/v2/models/{model}/infer"]["post"]
    bodies = {path: paths[path]["post"]["requestBody"]["content"] for path in ("/v1/predict", "/v1/classify")}
    assert {"image/jpeg", "text/plain", "audio/wav", "application/json"} <= set(bodies["/v1/predict"])
    assert set(bodies["/v1/classify"]) == {"image/jpeg", "image/png", "image/webp", "application/octet-stream"}
    schema = infer["requestBody"]["content"]["application/json"]["schema"]
    assert set(schema["properties"]) == {"id", "inputs", "outputs", "parameters"}
    assert set(schema["properties"]["inputs"]["items"]["required"]) == {"name", "datatype", "shape"}
    embeddings = paths["/v1/embeddings"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert embeddings["required"] == ["model", "input"]
    for path, methods in paths.items():
        named = [each["name"] for each in next(iter(methods.values())).get("parameters", ()) if each["in"] == "path"]
        assert all(f"{{{name}}}" in path for name in named)
        assert len(named) == path.count("{"), path


async def test_the_description_of_the_interface_names_both() -> None:
    http, _ = client()
    async with http:
        paths = (await http.get("/openapi.json")).json()["paths"]
    assert "min_score" in paths["/v1/predict"]["post"]["description"]
    assert "OpenAI" in paths["/v1/embeddings"]["post"]["description"]
