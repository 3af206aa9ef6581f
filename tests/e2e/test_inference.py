"""The same answers as torchvision, from every location, whatever the outcome was."""

from __future__ import annotations

import io
import itertools

import httpx
import numpy as np
import pytest
from deployment_support import LARGE, LOCATIONS, MEMORY, SEED, SMALL
from oip_client import infer_binary, infer_json, logits_of
from PIL import Image

from serve_app.config.units import parse_size

OUTCOMES = {"hit", "join", "load", "forward"}


@pytest.fixture(scope="module")
def batch() -> np.ndarray:
    return np.random.default_rng(SEED).standard_normal((1, 3, 224, 224)).astype(np.float32)


def expected_logits(module, batch: np.ndarray) -> np.ndarray:
    import torch

    with torch.inference_mode():
        return module(torch.from_numpy(batch.copy())).numpy()


@pytest.mark.parametrize("location", LOCATIONS)
def test_every_model_at_every_location_answers_as_torchvision_does(deployment, direct, batch, location) -> None:
    for model in SMALL:
        expected = expected_logits(direct(model), batch)
        for _ in range(2):
            response = infer_binary(deployment.location(location), model, batch)
            assert np.abs(logits_of(response) - expected).max() < 1e-3
            assert response.headers["X-EdgeServe-Outcome"] in OUTCOMES
            assert response.headers["X-EdgeServe-Model"] == model
            assert response.headers["X-EdgeServe-Location"] in LOCATIONS
            assert response.headers["X-EdgeServe-Form"].endswith("; precision=float32")


def test_json_and_binary_tensors_give_the_same_logits(deployment, batch) -> None:
    url = deployment.location("paris")
    by_json = logits_of(infer_json(url, "squeezenet1_1", batch))
    by_bytes = logits_of(infer_binary(url, "squeezenet1_1", batch))
    assert np.abs(by_json - by_bytes).max() < 1e-4


def test_a_batch_gives_one_row_of_logits_per_image(deployment, direct) -> None:
    batch = np.random.default_rng(1).standard_normal((3, 3, 224, 224)).astype(np.float32)
    logits = logits_of(infer_binary(deployment.location("tokyo"), "mobilenet_v3_small", batch))
    assert logits.shape == (3, 1000)
    assert np.abs(logits - expected_logits(direct("mobilenet_v3_small"), batch)).max() < 1e-3


def test_classify_ranks_the_labels_as_torchvisions_own_preprocessing_does(deployment, direct, photo) -> None:
    import torch
    from torchvision.models import ShuffleNet_V2_X1_0_Weights as Weights

    image = Weights.DEFAULT.transforms()(Image.open(io.BytesIO(photo)))
    with torch.inference_mode():
        probabilities = direct("shufflenet_v2_x1_0")(image[None]).softmax(-1)[0]
    best = torch.topk(probabilities, 3)
    response = httpx.post(
        f"{deployment.location('virginia')}/v1/classify?model=shufflenet_v2_x1_0&top_k=3",
        content=photo,
        headers={"Content-Type": "image/jpeg"},
        timeout=60,
    )
    answer = response.raise_for_status().json()
    assert [row["index"] for row in answer["predictions"]] == best.indices.tolist()
    assert [row["label"] for row in answer["predictions"]] == [
        Weights.DEFAULT.meta["categories"][index] for index in best.indices.tolist()
    ]
    assert [row["probability"] for row in answer["predictions"]] == pytest.approx(best.values.tolist(), abs=1e-4)
    assert answer["outcome"] == response.headers["X-EdgeServe-Outcome"]
    assert set(answer["timing_ms"]) >= {"queue", "load", "exec", "forward"}


def test_a_second_request_hits_and_says_how_long_each_part_took(deployment, batch) -> None:
    url = deployment.location("paris")
    infer_binary(url, "squeezenet1_1", batch, forward="never").raise_for_status()
    response = infer_binary(url, "squeezenet1_1", batch, forward="never")
    assert response.headers["X-EdgeServe-Outcome"] == "hit"
    assert response.headers["X-EdgeServe-Location"] == "paris"
    timings = dict(part.split(";dur=") for part in response.headers["Server-Timing"].split(", "))
    assert {"queue", "load", "exec", "forward"} <= set(timings)
    assert float(timings["exec"]) > 0
    assert float(timings["load"]) == 0
    assert response.headers["X-EdgeServe-Form"] == "onnxruntime; precision=float32"


def test_a_model_that_fits_only_elsewhere_is_forwarded_there(deployment, direct, batch) -> None:
    for _ in range(2):
        response = infer_binary(deployment.location("paris"), LARGE, batch)
        assert np.abs(logits_of(response) - expected_logits(direct(LARGE), batch)).max() < 1e-3
        assert response.headers["X-EdgeServe-Outcome"] == "forward"
        assert response.headers["X-EdgeServe-Location"] == "virginia"
    assert infer_binary(deployment.location("paris"), LARGE, batch, forward="never").status_code == 507


def test_the_gateway_serves_the_location_that_the_header_names(deployment, batch) -> None:
    for location in LOCATIONS:
        response = httpx.post(
            f"{deployment.url}/v2/models/squeezenet1_1/infer",
            json={
                "inputs": [
                    {"name": "input", "shape": [1, 3, 224, 224], "datatype": "FP32", "data": batch.ravel().tolist()}
                ],
                "parameters": {"forward": "never"},
            },
            headers={"X-Edge-Location": location},
            timeout=60,
        )
        assert response.raise_for_status().headers["X-EdgeServe-Location"] == location


def test_a_family_is_served_by_its_most_accurate_member_that_meets_the_request(deployment, photo) -> None:
    url = f"{deployment.location('paris')}/v1/classify?model=imagenet"
    headers = {"Content-Type": "image/jpeg"}
    accuracies = {
        model: httpx.get(f"{deployment.url}/v2/models/{model}", timeout=60).json()["parameters"]["accuracy"]
        for model in (*SMALL, LARGE)
    }
    fast = httpx.post(f"{url}&deadline_ms=20000", content=photo, headers=headers, timeout=60)
    assert fast.raise_for_status().json()["model"] in accuracies
    floor = max(accuracies.values())
    best = httpx.post(f"{url}&min_accuracy={floor}&deadline_ms=20000", content=photo, headers=headers, timeout=60)
    assert accuracies.get(best.raise_for_status().json()["model"], 1.0) >= floor


def test_metadata_names_tensors_family_accuracy_and_weights(deployment) -> None:
    content = httpx.get(f"{deployment.location('paris')}/v2/models/squeezenet1_1", timeout=60).json()
    assert content["inputs"] == [{"name": "input", "datatype": "FP32", "shape": [-1, 3, 224, 224]}]
    assert content["outputs"] == [{"name": "logits", "datatype": "FP32", "shape": [-1, 1000]}]
    assert content["parameters"]["family"] == "imagenet"
    assert content["parameters"]["accuracy"] == pytest.approx(0.58178)
    assert content["parameters"]["weights"]["actual"] == f"random:{SEED}"


def test_health_and_server_metadata_answer_at_every_prefix(deployment) -> None:
    prefixes = [deployment.url, *map(deployment.location, LOCATIONS)]
    for prefix, path in itertools.product(prefixes, ("/v2", "/v2/health/live", "/v2/health/ready")):
        assert httpx.get(prefix + path, timeout=60).status_code == 200, prefix + path
    assert httpx.get(f"{deployment.url}/v2/models/squeezenet1_1/versions/1/ready", timeout=60).json()["ready"] is True


def test_every_location_says_what_it_counts_and_what_the_kernel_says(deployment) -> None:
    status = deployment.status()
    for name in LOCATIONS:
        row = status[name]
        assert row["capacity_bytes"] == parse_size(MEMORY[name])
        assert row["used_bytes"] == sum(model["bytes"] for model in row["resident"])
        assert row["workspace_bytes"] > 0
        assert row["used_bytes"] + row["workspace_bytes"] <= row["capacity_bytes"]
        assert row["unaccounted_bytes"] >= 0
        assert row["base_bytes"] > 0
        assert row["rss_bytes"] > 0


def test_metrics_are_prometheus_text_with_our_names(deployment, photo) -> None:
    url = f"{deployment.location('paris')}/v1/classify?model=squeezenet1_1"
    httpx.post(url, content=photo, headers={"Content-Type": "image/jpeg"}, timeout=60).raise_for_status()
    wanted = {
        "ray_edgeserve_requests_total",
        "ray_edgeserve_loads_total",
        "ray_edgeserve_exec_seconds_bucket",
        "ray_edgeserve_cache_used_bytes",
        "ray_edgeserve_cache_capacity_bytes",
        "ray_edgeserve_worker_rss_bytes",
        "ray_edgeserve_worker_base_bytes",
        "ray_edgeserve_worker_workspace_bytes",
        "ray_edgeserve_worker_unaccounted_bytes",
    }
    found: set[str] = set()

    def all_found() -> bool:
        text = httpx.get(f"{deployment.url}/metrics", timeout=60).text
        found.update(name for name in wanted if name in text)
        return found == wanted

    _until(all_found)
    assert found == wanted


def _until(condition) -> None:
    """Wait for what the coordinator's next round brings; the bound only ends a test that would hang."""
    import time

    limit = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < limit, "the condition has not come true"
        time.sleep(0.1)
