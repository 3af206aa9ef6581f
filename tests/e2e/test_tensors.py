"""Models that are no image classifiers: several tensors of several types, in and out, over HTTP."""

from __future__ import annotations

import json
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import numpy as np
import pytest
import tagger_model
from deployment_support import TAGGER

pytestmark = [pytest.mark.ray, pytest.mark.slow]

TOKENS = np.random.default_rng(5).integers(0, tagger_model.VOCABULARY, (2, 7))
DATATYPES = {"INT64": np.int64, "FP32": np.float32}


def tensor(name: str, array: np.ndarray, *, binary: bool) -> tuple[dict[str, Any], bytes]:
    datatype = next(name for name, kind in DATATYPES.items() if array.dtype == kind)
    header: dict[str, Any] = {"name": name, "datatype": datatype, "shape": list(array.shape)}
    if not binary:
        return header | {"data": array.reshape(-1).tolist()}, b""
    return header | {"parameters": {"binary_data_size": array.nbytes}}, array.tobytes()


def ask(url: str, *, binary: bool = False, forward: str = "auto", **arrays: np.ndarray) -> httpx.Response:
    parts = [tensor(name, array, binary=binary) for name, array in arrays.items()]
    request = {
        "inputs": [header for header, _ in parts],
        "parameters": {"binary_data_output": binary, "forward": forward},
    }
    head = json.dumps(request).encode()
    headers = {"Content-Type": "application/json"}
    if binary:
        headers = {"Content-Type": "application/octet-stream", "Inference-Header-Content-Length": str(len(head))}
    body = head + b"".join(raw for _, raw in parts)
    return httpx.post(f"{url}/v2/models/{TAGGER}/infer", content=body, headers=headers, timeout=30)


def outputs(response: httpx.Response) -> dict[str, np.ndarray]:
    assert response.status_code == 200, response.text
    length = int(response.headers.get("Inference-Header-Content-Length", len(response.content)))
    content, rest = json.loads(response.content[:length]), response.content[length:]
    found = {}
    for output in content["outputs"]:
        kind = DATATYPES[output["datatype"]]
        if "data" in output:
            array = np.array(output["data"], kind)
        else:
            size = output["parameters"]["binary_data_size"]
            array, rest = np.frombuffer(rest[:size], kind), rest[size:]
        found[output["name"]] = array.reshape(output["shape"])
    assert not rest or "data" in content["outputs"][-1]
    return found


def check(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_allclose(found[name], array, atol=1e-5)


@pytest.fixture(params=[False, True], ids=["json", "binary"])
def binary(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


def unload(deployment: Any, location: str) -> None:
    """Have a location hold the model no more, whatever else it does just now; no guess brings it back."""
    deadline_s = time.monotonic() + 60
    while True:
        deployment.cli("unload", TAGGER, "--location", location, "--url", deployment.url)
        if TAGGER not in {model["model"] for model in deployment.status()[location]["resident"]}:
            return
        assert time.monotonic() < deadline_s, f"{location} still holds the model"


def test_every_outcome_answers_as_the_model_does(deployment, binary: bool) -> None:
    expected = tagger_model.answer(TOKENS)
    paris, tokyo = deployment.location("paris"), deployment.location("tokyo")
    for location in ("paris", "tokyo"):
        unload(deployment, location)
    with ThreadPoolExecutor(20) as clients:
        first = list(clients.map(lambda _: ask(paris, binary=binary, forward="never", tokens=TOKENS), range(20)))
    outcomes = [response.headers["X-EdgeServe-Outcome"] for response in first]
    assert outcomes.count("load") == 1, "twenty first requests make one load"
    assert set(outcomes) <= {"load", "join", "hit"}
    forwarded = ask(tokyo, binary=binary, forward="prefer", tokens=TOKENS)
    for response in (*first, forwarded):
        check(outputs(response), expected)


def test_a_client_carries_the_state_from_answer_to_request(deployment, binary: bool) -> None:
    url = deployment.location("paris")
    first = outputs(ask(url, binary=binary, tokens=TOKENS))
    gain = np.array(2.0, np.float32)
    second = outputs(ask(url, binary=binary, tokens=TOKENS, state=first["next_state"], gain=gain))
    check(second, tagger_model.answer(TOKENS, first["next_state"], 2.0))


def test_any_size_within_the_limits_is_answered(deployment) -> None:
    for shape in ((1, 1), (4, 64), (3, 20)):
        tokens = np.random.default_rng(sum(shape)).integers(0, tagger_model.VOCABULARY, shape)
        check(outputs(ask(deployment.location("paris"), tokens=tokens)), tagger_model.answer(tokens))


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"tokens": TOKENS.astype(np.float32)}, "'tokens' of model 'tagger' takes datatype INT64, not FP32"),
        ({"tokens": TOKENS[0]}, "'tokens' takes shape [-1, -1] (-1 is free), not [7]"),
        ({"tokens": np.zeros((1, 65), np.int64)}, "'sequence' of input 'tokens' must lie in 1..64, not 65"),
        ({"words": TOKENS}, "has no input 'words'; it takes 'tokens', 'state', 'gain'"),
        ({"gain": np.array(1.0, np.float32)}, "'tokens' of model 'tagger' is missing"),
        (
            {"tokens": TOKENS, "state": np.zeros((1, 3, tagger_model.WIDTH), np.float32)},
            "'batch' of input 'state' must be 2 as in other inputs, not 3",
        ),
    ],
)
def test_what_the_model_does_not_take_is_400_and_names_the_tensor(deployment, arrays, message: str) -> None:
    response = ask(deployment.location("paris"), **arrays)
    assert response.status_code == 400
    assert message in response.json()["error"]


def test_metadata_tell_a_client_all_that_it_needs(deployment) -> None:
    content = httpx.get(f"{deployment.url}/v2/models/{TAGGER}", timeout=30).json()
    assert content["platform"] == "onnxruntime_onnx"
    assert content["inputs"] == [
        {"name": "tokens", "datatype": "INT64", "shape": [-1, -1]},
        {"name": "state", "datatype": "FP32", "shape": [1, -1, tagger_model.WIDTH]},
        {"name": "gain", "datatype": "FP32", "shape": []},
    ]
    parameters = content["parameters"]
    assert parameters["axes"] == {"batch": [1, 4], "sequence": [1, 64]}
    assert (parameters["stateful"], parameters["optional"]) == ({"state": "next_state"}, ["state", "gain"])


def test_a_model_that_is_no_classifier_does_not_classify(deployment, photo: bytes) -> None:
    headers = {"Content-Type": "image/jpeg"}
    response = httpx.post(f"{deployment.url}/v1/classify?model={TAGGER}", content=photo, headers=headers, timeout=30)
    assert response.status_code == 400
    assert "does not classify images" in response.json()["error"]
