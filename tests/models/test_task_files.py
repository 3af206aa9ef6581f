"""Publishing keeps the files of a task with its model, and refuses a task that does not fit."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from task_support import tensor

from serve_app.core.catalog import ModelEntry
from serve_app.core.contract import Axis, Contract
from serve_app.core.task import ImageInput, TaskSpec
from serve_app.errors import StoreError
from serve_app.models.publishing.publish_catalog import publish
from serve_app.models.publishing.task_files import found_activation, require_task_fits
from serve_app.store.model_store import ModelStore

TOKENS = (tensor("input_ids", "INT64", -1, -1, axes=("batch", "tokens")),)
IMAGE = (tensor("x", "FP32", -1, 3, 32, 32),)


def refusal(kind: str, inputs: Any, **fields: Any) -> str:
    axes = dict.fromkeys(axis for spec in inputs for axis in spec.axes if axis)
    contract = Contract(
        inputs=inputs, outputs=(tensor("y", "FP32", -1),), axes=tuple(Axis(name=name, most=64) for name in axes)
    )
    task = TaskSpec(kind=kind, **fields)
    entry = ModelEntry(model_id="m", builder="onnx:m.onnx", task=task)
    try:
        require_task_fits(entry, task, contract)
    except StoreError as error:
        return error.message
    return ""


@pytest.mark.parametrize(
    ("kind", "inputs", "fields", "sentence"),
    [
        ("embedding", TOKENS, {}, "needs a tokenizer; add tokenizer: file:PATH/tokenizer.json"),
        ("embedding", IMAGE, {}, "needs an input named input_ids, or one of BYTES, or an image"),
        ("text-classification", (*TOKENS, tensor("when", "FP32", 1)), {"tokenizer": "t"}, "does not know 'when'"),
        ("image-classification", IMAGE, {}, "must know how an image is scaled; add image: {crop_px"),
        ("detection", TOKENS, {"image": ImageInput()}, "needs a first input [batch, channels, height, width]"),
        ("image-classification", IMAGE, {"image": ImageInput(crop_px=30)}, "crop_px 30 of task"),
        ("segmentation", IMAGE, {"image": ImageInput(mean=(0,), std=(1,))}, "a mean and a std for each channel, not 1"),
        ("segmentation", IMAGE, {"image": ImageInput(fit="native")}, "native needs free axes"),
        ("bytes-classification", IMAGE, {}, "needs one input [batch, 2 x bytes]"),
    ],
)
def test_a_task_that_does_not_fit_is_refused_with_what_it_needs(
    kind: str, inputs: Any, fields: dict[str, Any], sentence: str
) -> None:
    message = refusal(kind, inputs, **fields)
    assert message.startswith(f"onnx:m.onnx takes {inputs[0].name} ")
    assert sentence in message


def test_tasks_that_fit_are_accepted() -> None:
    assert not refusal("embedding", TOKENS, tokenizer="t")
    assert not refusal("text-classification", (tensor("text", "BYTES", -1, 1),))
    assert not refusal("detection", IMAGE, image=ImageInput(crop_px=32, fit="letterbox"))
    assert not refusal("tensors", IMAGE)


def test_a_model_that_gives_probabilities_needs_no_softmax() -> None:
    noise = np.random.default_rng(0).standard_normal((2, 5)).astype(np.float32)
    shares = np.exp(noise) / np.exp(noise).sum(axis=1, keepdims=True)
    assert found_activation({"label": np.array([0, 1]), "probabilities": shares}) == "none"
    assert found_activation({"logits": noise}) == "softmax"
    assert found_activation({"logit": noise[:, :1]}) == "sigmoid"


@pytest.mark.slow
def test_a_tokenizer_is_a_file_of_the_model_and_stays_as_long_as_it(tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    tokenizers = pytest.importorskip("tokenizers")
    write_embedder(onnx, tmp_path / "embedder.onnx")
    words = tokenizers.models.WordLevel({"[UNK]": 0, "cat": 1}, unk_token="[UNK]")
    tokenizers.Tokenizer(words).save(str(tmp_path / "tokenizer.json"))
    entry = ModelEntry(
        model_id="embedder",
        builder=f"onnx:{tmp_path / 'embedder.onnx'}",
        limits=(Axis(name="batch", most=2), Axis(name="tokens", most=8)),
        task=TaskSpec(kind="embedding", tokenizer=f"file:{tmp_path / 'tokenizer.json'}"),
    )
    store = ModelStore(tmp_path / "store")
    assert not publish(store, [entry]).failures
    (model,) = store.catalog([entry]).models
    assert model.task.tokenizer is not None
    kept = store.blob_path(model.task.tokenizer)
    assert kept.read_bytes() == (tmp_path / "tokenizer.json").read_bytes()
    store.sweep()
    assert kept.is_file()
    kept.unlink()
    assert publish(store, [entry]).published == ("embedder",)
    assert kept.is_file()

    (tmp_path / "tokenizer.json").write_text("{}")
    (failure,) = publish(store, [dataclasses.replace(entry, model_id="other")]).failures
    assert "is not a tokenizer.json" in failure.message


def write_embedder(onnx: Any, path: Path) -> None:
    helper, kinds = onnx.helper, onnx.TensorProto
    table = np.random.default_rng(0).standard_normal((2, 4)).astype(np.float32)
    graph = helper.make_graph(
        [helper.make_node("Gather", ["table", "input_ids"], ["hidden"])],
        "embedder",
        [helper.make_tensor_value_info("input_ids", kinds.INT64, ["batch", "tokens"])],
        [helper.make_tensor_value_info("hidden", kinds.FLOAT, ["batch", "tokens", 4])],
        [onnx.numpy_helper.from_array(table, "table")],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8), path)
