"""Modules of any kind answer as the bare module does, or are refused with a sentence that says what to do."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import pytest
import torch
from model_support import offline
from numpy.typing import NDArray

from serve_app.core.catalog import ModelEntry, PublishedModel
from serve_app.core.contract import Axis
from serve_app.core.contract_declaration import TensorDeclaration
from serve_app.core.task import ImageInput, TaskSpec
from serve_app.models.builders.registry import build
from serve_app.models.loader import ModelLoader
from serve_app.models.publishing.publish_catalog import publish
from serve_app.store.model_store import ModelStore
from serve_app.tasks.tensors import complete, probe

pytestmark = pytest.mark.slow

TENSORS = TaskSpec()


def takes(name: str, datatype: str, shape: tuple[int | str, ...], **fields: Any) -> TensorDeclaration:
    return TensorDeclaration(name=name, datatype=datatype, shape=shape, **fields)


FEATURES = (takes("features", "FP32", ("batch", 20)),)


def entry(factory: str, **fields: Any) -> ModelEntry:
    return ModelEntry(
        **{"model_id": "model", "builder": f"any_models:{factory}", "weights": "random:1", "task": TENSORS} | fields
    )


def published(store: ModelStore, wanted: ModelEntry) -> PublishedModel:
    report = publish(store, [wanted], reachable=offline)
    assert not report.failures, report.failures
    return store.manifest(wanted.model_id).model


def refusal(store: ModelStore, wanted: ModelEntry) -> str:
    (failure,) = publish(store, [wanted], reachable=offline).failures
    assert "\n" not in failure.message
    assert not store.has(wanted.model_id)
    return failure.message


def served(store: ModelStore, inputs: dict[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
    model = ModelLoader(store).load("model")
    try:
        return model.run(complete(inputs, store.manifest("model").model.contract)[0])
    finally:
        model.unload()


def require_equal(actual: NDArray[Any], expected: torch.Tensor) -> None:
    largest = float(expected.abs().max())
    assert actual.shape == tuple(expected.shape)
    assert np.allclose(actual, expected.numpy(), rtol=0, atol=1e-4 * largest)


UNET = entry(
    "UNet",
    inputs=(takes("scan", "FP32", ("batch", 1, "h", "w")),),
    limits=(Axis(name="h", least=32, most=96, multiple=4), Axis(name="w", least=32, most=96, multiple=4)),
)

RANKER = entry(
    "Ranker",
    inputs=(
        takes("mask", "BOOL", ("batch", "n"), default=1.0),
        takes("items", "INT64", ("batch", "n")),
        takes("temperature", "FP32", (), default=1.0),
    ),
    limits=(Axis(name="n", most=50),),
)

RECURRENT = entry(
    "Recurrent",
    inputs=(
        takes("frames", "FP32", ("batch", "time", 4)),
        takes("state", "FP32", (1, "batch", 6), default=0.0, returned_by="output_1"),
    ),
    limits=(Axis(name="time", most=16), Axis(name="batch", most=4)),
)


@pytest.mark.parametrize("rows", [1, 5])
def test_features_are_served(store: ModelStore, rows: int) -> None:
    model = published(store, entry("Tabular", inputs=FEATURES))
    features = np.random.default_rng(0).standard_normal((rows, 20), dtype=np.float32)
    with torch.inference_mode():
        expected = build(entry("Tabular"), "random:1")(torch.from_numpy(features))
    require_equal(served(store, {"features": features})["output"], expected)
    assert [(spec.name, spec.shape) for spec in model.outputs] == [("output", (-1, 3))]


@pytest.mark.parametrize("example", ["tabular_example", "tabular_example_as_tuple"])
def test_example_says_what_a_model_takes(store: ModelStore, example: str) -> None:
    model = published(store, entry("Tabular", example=f"any_models:{example}"))
    (spec,) = model.inputs
    assert (spec.name, spec.datatype, spec.shape, spec.axes) == ("features", "FP32", (-1, 20), ("batch", ""))


@pytest.mark.slow
@pytest.mark.parametrize(("height", "width"), [(32, 32), (64, 96)])
def test_image_of_any_size_within_the_limits_is_served(store: ModelStore, height: int, width: int) -> None:
    model = published(store, UNET)
    scan = np.random.default_rng(0).standard_normal((2, 1, height, width), dtype=np.float32)
    with torch.inference_mode():
        expected = build(UNET, "random:1")(torch.from_numpy(scan))["mask"]
    require_equal(served(store, {"scan": scan})["mask"], expected)
    (mask,) = model.outputs
    assert mask.axes == ("batch", "", "h", "w")
    small, large = model.cost((1, 32, 32)), model.cost((4, 96, 96))
    assert small.workspace_bytes < large.workspace_bytes


def test_integers_scalars_and_dataclasses_are_served(store: ModelStore) -> None:
    model = published(store, RANKER)
    items = np.arange(12).reshape(3, 4)
    bare = build(RANKER, "random:1")
    with torch.inference_mode():
        expected = bare(torch.from_numpy(items), torch.tensor(0.5), torch.ones(3, 4, dtype=torch.bool))
    answers = served(store, {"items": items, "temperature": np.array(0.5, np.float32)})
    require_equal(answers["scores"], expected.scores)
    assert np.array_equal(answers["best"], expected.best.numpy())
    assert [(spec.name, spec.datatype) for spec in model.outputs] == [("scores", "FP32"), ("best", "INT64")]


def test_state_goes_out_and_comes_back_in(store: ModelStore) -> None:
    published(store, RECURRENT)
    frames = np.random.default_rng(0).standard_normal((2, 6, 4), dtype=np.float32)
    bare = build(RECURRENT, "random:1")
    with torch.inference_mode():
        whole, state = bare(torch.from_numpy(frames), torch.zeros(1, 2, 6))
    first = served(store, {"frames": frames[:, :2]})
    second = served(store, {"frames": frames[:, 2:], "state": first["output_1"]})
    require_equal(second["output_0"], whole)
    require_equal(second["output_1"], state)


@pytest.mark.parametrize("datatype", ["BOOL", "UINT8", "UINT16", "UINT32", "UINT64", "INT8", "INT16", "INT32", "INT64",
                                      "FP16", "BF16", "FP32", "FP64"])  # fmt: skip
def test_every_datatype_of_numbers_is_taken(store: ModelStore, datatype: str) -> None:
    model = published(store, entry("Takes", inputs=(takes("value", datatype, (2, "batch")),)))
    value = probe(model.contract, (3,))["value"]
    answers = served(store, {"value": value})
    assert answers["output"].dtype == np.float64
    assert np.array_equal(answers["output"], value.astype(np.float64) * 2)


def test_what_declares_its_inputs_takes_tensors_only_unless_it_names_a_task(store: ModelStore) -> None:
    assert published(store, entry("Tabular", task=None, inputs=FEATURES)).task == TENSORS
    assert published(store, entry("Tabular", task=None, example="any_models:tabular_example")).task == TENSORS


def test_texts_are_refused(store: ModelStore) -> None:
    message = refusal(store, entry("Takes", inputs=(takes("value", "BYTES", ("batch",)),)))
    assert "'value'" in message
    assert "BYTES" in message


def test_image_encoder_is_an_embedder(store: ModelStore) -> None:
    preset = ImageInput(resize_px=40, crop_px=32)
    model = published(store, entry("Encoder", task=TaskSpec(kind="embedding", image=preset)))
    assert model.task.kind == "embedding"
    assert model.outputs[0].shape == (-1, 16)


def test_convolution_that_pads_in_its_own_way_is_folded(store: ModelStore) -> None:
    wanted = entry("Padded", task=None, input=ImageInput(resize_px=32, crop_px=32))
    published(store, wanted)
    execution = store.manifest("model").execution
    assert execution.channels_last
    assert [(pair.conv, pair.norm) for pair in execution.folded] == [("conv", "norm")]


def test_module_in_bfloat16_is_served_as_it_is(store: ModelStore) -> None:
    published(store, entry("brain", inputs=FEATURES, dtype="bfloat16"))
    features = np.random.default_rng(0).standard_normal((2, 20), dtype=np.float32)
    bare = build(entry("brain"), "random:1")
    with torch.inference_mode():
        expected = bare(torch.from_numpy(features).bfloat16()).float()
    assert np.array_equal(served(store, {"features": features})["output"], expected.numpy())


def test_module_in_float64_answers_in_float64(store: ModelStore) -> None:
    published(store, entry("double", inputs=(takes("features", "FP64", ("batch", 20)),)))
    features = np.random.default_rng(0).standard_normal((2, 20))
    with torch.inference_mode():
        expected = build(entry("double"), "random:1")(torch.from_numpy(features))
    require_equal(served(store, {"features": features})["output"], expected)


@pytest.mark.parametrize(
    ("factory", "cure"),
    [
        ("brain", "use dtype: bfloat16"),
        ("half", "use dtype: bfloat16 and return module.bfloat16()"),
        ("CountsInABuffer", "take state as an input and return it (returned_by)"),
        ("CountsInAnAttribute", "does not answer the same input equally twice: it keeps state"),
        ("DrawsNumbers", "or draws random numbers"),
        ("TwoTypes", "fails when all its weights are float32 (RuntimeError: "),
        ("scripted", "use builder: export:model.pt2"),
        ("exported", "use builder: export:model.pt2"),
        ("quantized", "quantize its ONNX export"),
        ("Hides", "holds 24.0 MB while it is not loaded"),
        ("Collects", "MB when it is unloaded, every time"),
        ("Copies", "MB while it is not loaded"),
        ("wrapped", "use builder: onnx:FILE"),
        ("compiled_in_place", "return the module before torch.compile"),
        pytest.param("compiled", "return the module before torch.compile", marks=pytest.mark.slow),
    ],
)
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
def test_what_cannot_be_counted_is_refused_with_a_cure(store: ModelStore, factory: str, cure: str) -> None:
    assert cure in refusal(store, entry(factory, inputs=FEATURES))


def test_free_axis_without_a_limit_is_refused(store: ModelStore) -> None:
    message = refusal(store, entry("UNet", inputs=UNET.inputs))
    assert "axis 'h' of input 'scan' is free and has no limit" in message
    assert "add limits: {h: LARGEST, w: LARGEST}" in message


def test_model_that_nothing_is_known_of_is_refused(store: ModelStore) -> None:
    message = refusal(store, entry("Tabular"))
    assert "does not say what it takes" in message
    assert "add inputs" in message
    assert "example" in message


def test_example_that_is_none_is_refused(store: ModelStore) -> None:
    assert "has a str for input 'features'" in refusal(store, entry("Tabular", example="any_models:text_example"))
    assert "cannot be made" in refusal(store, entry("Tabular", example="any_models:missing"))


def test_crash_in_another_process_is_a_refusal(store: ModelStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGESERVE_TEST_PROCESS", str(os.getpid()))
    message = refusal(store, entry("CrashesApart", inputs=FEATURES))
    assert "crashes its process (SIGSEGV)" in message


def test_trace_that_crashes_leaves_the_batch_norms(store: ModelStore, caplog: pytest.LogCaptureFixture) -> None:
    classes = TaskSpec(kind="image-classification", image=ImageInput(resize_px=32, crop_px=32))
    published(store, entry("CrashesWhenTraced", task=classes))
    assert store.manifest("model").execution.folded == ()
    assert "keeps its batch norms: the trace of any_models:CrashesWhenTraced crashes its process" in caplog.text


@pytest.mark.slow
@pytest.mark.parametrize("name", ["lraspp_mobilenet_v3_large", "ssdlite320_mobilenet_v3_large"])
def test_segmenters_and_detectors_of_torchvision_are_served(store: ModelStore, name: str) -> None:
    wanted = ModelEntry(model_id="model", builder=f"torchvision:{name}", weights="random:1")
    model = published(store, wanted)
    image = probe(model.contract, tuple(axis.least for axis in model.contract.axes), seed=3)["input"]
    with torch.inference_mode():
        bare = build(wanted, "random:1")(torch.from_numpy(image))
    expected = bare[0] if isinstance(bare, list) else bare
    answers = served(store, {"input": image})
    assert answers.keys() == expected.keys()
    for key, tensor in expected.items():
        require_equal(answers[key], tensor)
    assert model.task.kind == ("detection" if name.startswith("ssd") else "segmentation")
    assert len(model.task.labels) in (21, 91)


@pytest.mark.slow
@pytest.mark.parametrize("frames", [8, 12])
def test_video_is_served(store: ModelStore, frames: int) -> None:
    wanted = ModelEntry(
        model_id="model",
        builder="torchvision:r3d_18",
        weights="random:1",
        inputs=(takes("clip", "FP32", (1, 3, "frames", 32, 32)),),
        limits=(Axis(name="frames", least=8, most=16),),
    )
    published(store, wanted)
    clip = np.random.default_rng(0).standard_normal((1, 3, frames, 32, 32), dtype=np.float32)
    with torch.inference_mode():
        expected = build(wanted, "random:1")(torch.from_numpy(clip))
    require_equal(served(store, {"clip": clip})["output"], expected)
