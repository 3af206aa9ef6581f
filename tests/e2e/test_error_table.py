"""Every bad input gets its status and one sentence that says what is wrong."""

from __future__ import annotations

import io
import json
import struct

import httpx
import numpy as np
import pytest
from deployment_support import PINNED, TOO_LARGE, encoded
from oip_client import binary_request, json_request
from PIL import Image

JPEG = {"Content-Type": "image/jpeg"}
MODEL = "squeezenet1_1"
GOOD = np.zeros((1, 3, 224, 224), np.float32)


def check(response: httpx.Response, status: int, *words: str) -> None:
    assert response.status_code == status, response.text
    content = response.json()
    assert set(content) == {"error"}
    message = content["error"]
    assert "\n" not in message
    assert "Traceback" not in message
    for word in words:
        assert word in message


def infer(deployment, content, headers=None, model=MODEL, path="infer") -> httpx.Response:
    body = content if isinstance(content, bytes) else json.dumps(content).encode()
    url = f"{deployment.location('paris')}/v2/models/{model}/{path}"
    return httpx.post(url, content=body, headers=headers or {"Content-Type": "application/json"}, timeout=60)


def classify(deployment, body: bytes, query: str = f"model={MODEL}", headers=JPEG) -> httpx.Response:
    url = f"{deployment.location('paris')}/v1/classify?{query}"
    return httpx.post(url, content=body, headers=headers, timeout=60)


def changed(**fields) -> dict:
    request = json_request(GOOD)
    request["inputs"][0].update(fields)
    return request


def without(field: str) -> dict:
    request = json_request(GOOD)
    del request["inputs"][0][field]
    return request


BAD_BODIES = {
    "empty": b"",
    "not json": b"{",
    "not an object": b"[]",
    "no inputs": {},
    "inputs empty": {"inputs": []},
    "inputs not a list": {"inputs": 3},
    "two inputs": {"inputs": json_request(GOOD)["inputs"] * 2},
    "wrong name": changed(name="nobody"),
    "no name": without("name"),
    "wrong dtype": changed(datatype="INT64"),
    "unknown dtype": changed(datatype="FP99"),
    "no shape": without("shape"),
    "negative shape": changed(shape=[-1, 3, 224, 224]),
    "huge shape": changed(shape=[2**62, 3, 224, 224]),
    "wrong rank": changed(shape=[3, 224, 224]),
    "wrong size": changed(shape=[1, 3, 224, 225]),
    "batch too large": changed(shape=[5, 3, 224, 224], data=[0] * (5 * GOOD.size)),
    "batch of none": changed(shape=[0, 3, 224, 224], data=[]),
    "data too short": changed(data=[0.0]),
    "data not numbers": changed(data=["x"] * GOOD.size),
    "no data": without("data"),
    "not a number": json.dumps(json_request(GOOD)).encode().replace(b"0.0", b"NaN", 1),
    "infinite": json.dumps(json_request(GOOD)).encode().replace(b"0.0", b"1e999", 1),
    "unknown output": {**json_request(GOOD), "outputs": [{"name": "nobody"}]},
    "negative deadline": json_request(GOOD, deadline_ms=-1),
    "deadline as text": json_request(GOOD, deadline_ms="soon"),
    "accuracy above one": json_request(GOOD, min_accuracy=7),
    "accuracy out of reach": json_request(GOOD, min_accuracy=0.999),
    "unknown forward": json_request(GOOD, forward="maybe"),
}


@pytest.mark.parametrize("body", BAD_BODIES.values(), ids=BAD_BODIES.keys())
def test_a_malformed_inference_request_is_400(deployment, body) -> None:
    check(infer(deployment, body), 400)


def test_a_binary_tensor_that_is_cut_short_is_400(deployment) -> None:
    body, headers = binary_request(GOOD)
    check(infer(deployment, body[:-4], headers), 400)
    check(infer(deployment, body, {**headers, "Inference-Header-Content-Length": "9999999"}), 400)
    check(infer(deployment, body, {**headers, "Inference-Header-Content-Length": "-1"}), 400)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_binary_tensor_with_a_number_that_is_not_finite_is_400(deployment, value) -> None:
    tensor = GOOD.copy()
    tensor[0, 1, 2, 3] = value
    check(infer(deployment, *binary_request(tensor)), 400, "finite")


def _bomb() -> bytes:
    """A PNG of a few bytes that claims 60,000 x 60,000 pixels."""
    small = encoded(Image.new("RGB", (1, 1)), "PNG")
    return small.replace(struct.pack(">II", 1, 1), struct.pack(">II", 60_000, 60_000), 1)


def _gif() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, "GIF")
    return buffer.getvalue()


def test_a_bad_image_is_400(deployment, photo) -> None:
    for body in (b"", b"not an image", photo[:100], photo[: len(photo) // 2], _gif(), _bomb()):
        check(classify(deployment, body), 400)
    check(classify(deployment, encoded(Image.new("RGB", (2000, 1001)), "PNG")), 400, "2000000")


@pytest.mark.parametrize(
    "query",
    [
        "top_k=5",
        f"model={MODEL}&top_k=0",
        f"model={MODEL}&top_k=" + "9" * 5000,
        f"model={MODEL}&top_k=x",
        f"model={MODEL}&deadline_ms=x",
    ],
)
def test_a_bad_query_parameter_is_400(deployment, photo, query) -> None:
    check(classify(deployment, photo, query), 400)


def test_what_does_not_exist_is_404(deployment, photo) -> None:
    check(infer(deployment, json_request(GOOD), model="nobody"), 404, "nobody")
    check(infer(deployment, json_request(GOOD), path="versions/2/infer"), 404, "version")
    check(classify(deployment, photo, "model=nobody"), 404, "nobody")
    check(httpx.get(f"{deployment.url}/v2/models/nobody", timeout=60), 404, "nobody")
    check(httpx.get(f"{deployment.url}/nobody/v2", timeout=60), 404)
    gateway = httpx.post(
        f"{deployment.url}/v1/classify?model={MODEL}",
        content=photo,
        headers={**JPEG, "X-Edge-Location": "atlantis"},
        timeout=60,
    )
    check(gateway, 404, "atlantis", "paris")
    check(classify(deployment, photo, headers={**JPEG, "X-Edge-Location": "tokyo"}), 404, "paris", "tokyo")


def test_a_method_that_a_path_does_not_take_is_405(deployment) -> None:
    check(httpx.get(f"{deployment.location('paris')}/v1/classify", timeout=60), 405)


def test_unloading_a_pinned_model_is_409(deployment) -> None:
    url = f"{deployment.location('paris')}/v2/repository/models/{PINNED}"
    httpx.post(f"{url}/load", timeout=60).raise_for_status()
    check(httpx.post(f"{url}/unload", timeout=60), 409, "pinned")


def test_unloading_a_model_that_is_not_loaded_is_404(deployment) -> None:
    url = f"{deployment.location('paris')}/v2/repository/models/{TOO_LARGE}/unload"
    check(httpx.post(url, timeout=60), 404)


def test_a_body_over_the_limit_is_413(deployment) -> None:
    large = b"x" * (6 * 2**20 + 1)
    check(classify(deployment, large), 413, "limit")
    chunked = httpx.post(
        f"{deployment.location('paris')}/v1/classify?model={MODEL}",
        content=(large[start : start + 65536] for start in range(0, len(large), 65536)),
        headers=JPEG,
        timeout=60,
    )
    check(chunked, 413, "limit")


def test_an_unexpected_content_type_is_415(deployment, photo) -> None:
    check(classify(deployment, photo, headers={"Content-Type": "text/plain"}), 415, "image/jpeg")
    check(classify(deployment, photo, headers={"Content-Type": "application/x-www-form-urlencoded"}), 415)
    check(infer(deployment, json_request(GOOD), {"Content-Type": "image/jpeg"}), 415, "application/json")
    check(classify(deployment, photo, headers={**JPEG, "Content-Encoding": "gzip"}), 415, "gzip")


def test_a_deadline_that_cannot_be_met_is_504(deployment, photo) -> None:
    check(infer(deployment, json_request(GOOD, deadline_ms=0.01)), 504, "deadline")
    check(classify(deployment, photo, "model=imagenet&deadline_ms=0.01"), 504)


def test_a_model_that_can_never_fit_is_507(deployment, photo) -> None:
    check(classify(deployment, photo, f"model={TOO_LARGE}"), 507, TOO_LARGE, "memory")
    url = f"{deployment.location('paris')}/v2/repository/models/{TOO_LARGE}/load"
    check(httpx.post(url, timeout=60), 507, TOO_LARGE)


def test_the_location_serves_on_after_all_of_that(deployment, photo) -> None:
    assert classify(deployment, photo).status_code == 200
