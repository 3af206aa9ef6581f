"""A small embedder of texts: an ONNX model of tokens, its tokenizer, and what they answer, in numpy."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

WORDS = ("[UNK]", "[PAD]", "a", "cat", "dog", "sleeps", "runs")
WIDTH, TOKENS, BATCH = 6, 12, 3
ENTRY: dict[str, Any] = {
    "limits": {"batch": BATCH, "tokens": TOKENS},
    "task": {"kind": "embedding", "tokenizer": "file:tokenizer.json"},
}
_TABLE = np.random.default_rng(4).standard_normal((len(WORDS), WIDTH), dtype=np.float32)


def write(folder: Path) -> None:
    """Write ``embedder.onnx``, whose vector of a token depends on all that the mask leaves, and ``tokenizer.json``."""
    from onnx import TensorProto, helper, numpy_helper, save

    nodes = [
        helper.make_node("Gather", ["table", "input_ids"], ["embedded"]),
        helper.make_node("Cast", ["attention_mask"], ["weights"], to=TensorProto.FLOAT),
        helper.make_node("Unsqueeze", ["weights", "last"], ["column"]),
        helper.make_node("Mul", ["embedded", "column"], ["masked"]),
        helper.make_node("ReduceSum", ["masked", "first"], ["total"], keepdims=1),
        helper.make_node("Add", ["embedded", "total"], ["hidden"]),
    ]
    sides = ["batch", "tokens"]
    graph = helper.make_graph(
        nodes,
        "embedder",
        [helper.make_tensor_value_info(name, TensorProto.INT64, sides) for name in ("input_ids", "attention_mask")],
        [helper.make_tensor_value_info("hidden", TensorProto.FLOAT, [*sides, WIDTH])],
        [
            numpy_helper.from_array(_TABLE, "table"),
            numpy_helper.from_array(np.array([1], np.int64), "first"),
            numpy_helper.from_array(np.array([2], np.int64), "last"),
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    save(model, folder / "embedder.onnx")
    vocabulary = {word: index for index, word in enumerate(WORDS)}
    content = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [],
        "normalizer": None,
        "pre_tokenizer": {"type": "Whitespace"},
        "post_processor": None,
        "decoder": None,
        "model": {"type": "WordLevel", "vocab": vocabulary, "unk_token": "[UNK]"},
    }
    (folder / "tokenizer.json").write_text(json.dumps(content))


def vector(text: str) -> np.ndarray:
    """Return the normalized vector of a text of ``WORDS``."""
    embedded = _TABLE[[WORDS.index(word) for word in text.split()]]
    mean = (embedded + embedded.sum(axis=0)).mean(axis=0)
    return mean / np.linalg.norm(mean)
