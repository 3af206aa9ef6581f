"""A small ONNX model with several inputs and outputs of several types, and what it answers, in numpy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

VOCABULARY, WIDTH, CLASSES = 50, 8, 5
ENTRY: dict[str, Any] = {
    "inputs": [
        {"name": "state", "shape": [1, "batch", WIDTH], "default": 0, "returned_by": "next_state"},
        {"name": "gain", "default": 1},
    ],
    "limits": {"batch": 4, "sequence": 64},
}
_WEIGHTS = np.random.default_rng(3)
_TABLE = _WEIGHTS.standard_normal((VOCABULARY, WIDTH), dtype=np.float32)
_HEAD = _WEIGHTS.standard_normal((WIDTH, CLASSES), dtype=np.float32)


def write(path: Path) -> None:
    """Write the model: tokens INT64 (batch, sequence), a state that clients carry, and a scalar."""
    from onnx import TensorProto, helper, numpy_helper, save

    nodes = [
        helper.make_node("Gather", ["table", "tokens"], ["embedded"]),
        helper.make_node("ReduceMean", ["embedded"], ["pooled"], axes=[1], keepdims=0),
        helper.make_node("Mul", ["pooled", "gain"], ["scaled"]),
        helper.make_node("Add", ["scaled", "state"], ["next_state"]),
        helper.make_node("Squeeze", ["next_state", "first"], ["hidden"]),
        helper.make_node("MatMul", ["hidden", "head"], ["scores"]),
        helper.make_node("ArgMax", ["scores"], ["best"], axis=1, keepdims=0),
    ]
    batch, sequence = "batch", "sequence"
    graph = helper.make_graph(
        nodes,
        "tagger",
        [
            helper.make_tensor_value_info("tokens", TensorProto.INT64, [batch, sequence]),
            helper.make_tensor_value_info("state", TensorProto.FLOAT, [1, batch, WIDTH]),
            helper.make_tensor_value_info("gain", TensorProto.FLOAT, []),
        ],
        [
            helper.make_tensor_value_info("scores", TensorProto.FLOAT, [batch, CLASSES]),
            helper.make_tensor_value_info("best", TensorProto.INT64, [batch]),
            helper.make_tensor_value_info("next_state", TensorProto.FLOAT, [1, batch, WIDTH]),
        ],
        [
            numpy_helper.from_array(_TABLE, "table"),
            numpy_helper.from_array(_HEAD, "head"),
            numpy_helper.from_array(np.array([0], np.int64), "first"),
        ],
    )
    save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8), path)


def answer(tokens: np.ndarray, state: np.ndarray | None = None, gain: float = 1.0) -> dict[str, np.ndarray]:
    """Return the outputs of the model."""
    pooled = _TABLE[tokens].mean(axis=1, dtype=np.float32)
    next_state = pooled * np.float32(gain) + (np.zeros((1, len(tokens), WIDTH), np.float32) if state is None else state)
    scores = next_state[0] @ _HEAD
    return {"scores": scores, "best": scores.argmax(axis=1), "next_state": next_state}
