"""A minimal Open Inference Protocol client, written from the protocol and not from our server."""

from __future__ import annotations

import json
from typing import Any

import httpx
import numpy as np


def json_request(batch: np.ndarray, **parameters: Any) -> dict[str, Any]:
    tensor = {"name": "input", "shape": list(batch.shape), "datatype": "FP32", "data": batch.ravel().tolist()}
    return {"inputs": [tensor], **({"parameters": parameters} if parameters else {})}


def infer_json(url: str, model: str, batch: np.ndarray, **parameters: Any) -> httpx.Response:
    return httpx.post(f"{url}/v2/models/{model}/infer", json=json_request(batch, **parameters), timeout=60)


def infer_binary(url: str, model: str, batch: np.ndarray, **parameters: Any) -> httpx.Response:
    body, headers = binary_request(batch, **parameters)
    return httpx.post(f"{url}/v2/models/{model}/infer", content=body, headers=headers, timeout=60)


def binary_request(batch: np.ndarray, **parameters: Any) -> tuple[bytes, dict[str, str]]:
    data = batch.astype("<f4").tobytes()
    tensor = {
        "name": "input",
        "shape": list(batch.shape),
        "datatype": "FP32",
        "parameters": {"binary_data_size": len(data)},
    }
    head = json.dumps({"inputs": [tensor], "parameters": {"binary_data_output": True, **parameters}}).encode()
    headers = {"Inference-Header-Content-Length": str(len(head)), "Content-Type": "application/octet-stream"}
    return head + data, headers


def logits_of(response: httpx.Response) -> np.ndarray:
    response.raise_for_status()
    length = response.headers.get("Inference-Header-Content-Length")
    content = json.loads(response.content[: int(length)]) if length else response.json()
    (output,) = content["outputs"]
    if length:
        return np.frombuffer(response.content[int(length) :], "<f4").reshape(output["shape"])
    return np.array(output["data"], np.float32).reshape(output["shape"])
