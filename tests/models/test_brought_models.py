"""Models as people bring them: served with the answers of the framework that they come from, or refused with a cure."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import brought_models
import numpy as np
import pytest
import torch
from model_support import offline
from packaged_models import packaged, served, session
from task_support import answer, encoded

from serve_app.core.catalog import ModelEntry
from serve_app.core.contract import Axis
from serve_app.core.contract_declaration import TensorDeclaration
from serve_app.core.task import ImageInput, TaskSpec
from serve_app.models.builders.registry import build
from serve_app.models.publishing.publish_catalog import publish
from serve_app.models.torchvision_compat import import_torchvision
from serve_app.store.model_store import ModelStore
from serve_app.tasks.tensors import Tensors

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning"),
]

FEATURES = (TensorDeclaration(name="features", datatype="FP32", shape=("batch", 20)),)


def side(name: str, most: int, multiple: int = 32) -> Axis:
    return Axis(name=name, least=32, most=most, multiple=multiple)


def factory(name: str, **fields: Any) -> ModelEntry:
    return ModelEntry(
        **{"model_id": name, "builder": f"brought_models:{name}", "weights": "random:1", "task": TaskSpec()} | fields
    )


def refusal(folder: Path, entry: ModelEntry) -> str:
    (failure,) = publish(ModelStore(folder), [entry], reachable=offline).failures
    assert "\n" not in failure.message
    return failure.message


def page() -> np.ndarray:
    """A photograph of printed text, gray, of 191 x 384 pixels."""
    image: np.ndarray = pytest.importorskip("skimage.data").page()
    return image


def test_pp_ocr_finds_text_where_onnxruntime_does(tmp_path: Path) -> None:
    from PIL import Image

    path = packaged("rapidocr_onnxruntime", "models/ch_PP-OCRv4_det_infer.onnx")
    entry = ModelEntry(
        model_id="text_areas",
        builder=f"onnx:{path}",
        inputs=(TensorDeclaration(name="x", shape=("batch", 3, "height", "width")),),
        limits=(Axis(name="batch", most=1), side("height", 384), side("width", 384)),
        task=TaskSpec(
            kind="segmentation",
            labels=("background", "text"),
            activation="none",
            image=ImageInput(crop_px=384, mean=(0.5,) * 3, std=(0.5,) * 3, fit="native"),
        ),
    )
    given: list[np.ndarray] = []
    gave: list[np.ndarray] = []
    with served(tmp_path, entry) as (model, run):

        def watched(inputs: Tensors) -> dict[str, np.ndarray]:
            outputs = run(inputs)
            given.append(inputs["x"])
            gave.extend(outputs.values())
            return outputs

        found = answer(encoded(Image.fromarray(page())), model, watched)
    (expected,) = session(path).run(None, {"x": given[0]})
    assert np.abs(gave[0] - expected).max() < 1e-4
    # Five lines of a paragraph below a headline; the lowest part is code.
    share = next(each["share"] for each in found["classes"] if each["label"] == "text")
    assert 0.15 < share < 0.6
    assert share == pytest.approx(float((expected > 0.5).mean()), abs=0.02)


@pytest.mark.parametrize(
    ("top", "text"),
    [
        (46, "Let us first determine markers of the coins and the"),
        (14, "Region-basedsegmentation"),
    ],
)
def test_pp_ocr_reads_what_is_printed(tmp_path: Path, top: int, text: str) -> None:
    from PIL import Image

    path = packaged("rapidocr_onnxruntime", "models/ch_PP-OCRv4_rec_infer.onnx")
    entry = ModelEntry(
        model_id="reader",
        builder=f"onnx:{path}",
        inputs=(TensorDeclaration(name="x", shape=("batch", 3, 48, "width")),),
        limits=(Axis(name="batch", most=1), Axis(name="width", least=320, most=928, multiple=8)),
    )
    line = Image.fromarray(page()[top : top + 20]).convert("RGB").resize((920, 48), Image.Resampling.BILINEAR)
    image = (np.asarray(line, np.float32) / 127.5 - 1).transpose(2, 0, 1)
    bare = session(path)
    (expected,) = bare.run(None, {"x": image[None]})
    with served(tmp_path, entry) as (model, run):
        (scores,) = run({"x": image[None]}).values()
        found = answer(json.dumps({"x": image[None].tolist()}).encode(), model, run)
    assert np.abs(scores - expected).max() < 1e-4
    assert np.abs(np.array(found["outputs"][model.contract.outputs[0].name]) - expected).max() < 1e-4
    letters = ["", *bare.get_modelmeta().custom_metadata_map["character"].splitlines(), " "]
    best = scores[0].argmax(axis=-1).tolist()
    assert "".join(letters[each] for each, last in zip(best, [0, *best], strict=False) if each != last) == text


def test_nudenet_finds_what_onnxruntime_does(tmp_path: Path) -> None:
    from PIL import Image

    data = pytest.importorskip("skimage.data")
    path = packaged("nudenet", "320n.onnx")
    entry = ModelEntry(
        model_id="people",
        builder=f"onnx:{path}",
        limits=(Axis(name="batch", most=1), side("height", 320), side("width", 320)),
        task=TaskSpec(kind="detection", image=ImageInput(crop_px=320, mean=(0,) * 3, std=(1,) * 3, fit="letterbox")),
    )
    photograph = Image.fromarray(data.astronaut())
    shrunk = np.asarray(photograph.resize((320, 320), Image.Resampling.BILINEAR), np.float32) / 255
    bare = session(path)
    image = shrunk.transpose(2, 0, 1)[None]
    (expected,) = bare.run(None, {bare.get_inputs()[0].name: image})
    with served(tmp_path, entry) as (model, run):
        (rows,) = run({model.contract.inputs[0].name: image}).values()
        (face,) = answer(encoded(photograph), model, run)["detections"]
    assert np.abs(rows - expected).max() < 1e-4 * np.abs(expected).max()
    x, y, width, height = expected[0, :4, expected[0, 4:].max(axis=0).argmax()]
    best = np.array([x - width / 2, y - height / 2, x + width / 2, y + height / 2]) * 512 / 320
    assert face["index"] == int(expected[0, 4:].max(axis=1).argmax())
    assert face["score"] == pytest.approx(float(expected[0, 4:].max()), abs=1e-3)
    assert face["box"] == pytest.approx(best.tolist(), abs=1)


@pytest.mark.parametrize("name", ["lora_on_vit", "merged_lora_on_vit"])
def test_adapters_of_peft_answer_as_peft_does(tmp_path: Path, name: str) -> None:
    import_torchvision()
    pytest.importorskip("transformers")
    pytest.importorskip("peft")
    entry = factory(
        name,
        inputs=(TensorDeclaration(name="pixel_values", datatype="FP32", shape=("batch", 3, 64, 64)),),
        limits=(Axis(name="batch", most=4),),
    )
    bare = build(entry, "random:1")
    images = np.random.default_rng(0).standard_normal((2, 3, 64, 64), dtype=np.float32)
    with torch.inference_mode():
        expected = bare(torch.from_numpy(images)).logits.numpy()
    with served(tmp_path, entry) as (_, run):
        found = run({"pixel_values": images})["logits"]
    assert np.abs(found - expected).max() < 1e-4 * np.abs(expected).max()


def test_each_fine_tune_of_a_backbone_answers_for_itself(tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors.torch")
    common = brought_models.backbone().eval()
    images = np.random.default_rng(0).standard_normal((1, 3, 64, 64), dtype=np.float32)
    preset = ImageInput(resize_px=64, crop_px=64)
    entries, expected = [], {}
    for seed in (1, 2, 3):
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            common.classifier[3].reset_parameters()
        file = tmp_path / f"tune_{seed}.safetensors"
        safetensors.save_file(common.state_dict(), file)
        with torch.inference_mode():
            expected[f"tune_{seed}"] = common(torch.from_numpy(images)).numpy()
        entries.append(factory("backbone", model_id=f"tune_{seed}", weights=f"file:{file}", task=None, input=preset))
    for entry in entries:
        with served(tmp_path / "store", entry) as (model, run):
            found = run({"input": images})["logits"]
        assert model.task.kind == "image-classification"
        wanted = expected[entry.model_id]
        assert np.abs(found - wanted).max() < 1e-4 * np.abs(wanted).max()
    assert np.abs(expected["tune_1"] - expected["tune_2"]).max() > 0.01


def test_boosted_trees_answer_as_xgboost_does(tmp_path: Path) -> None:
    xgboost = pytest.importorskip("xgboost")
    onnxmltools = pytest.importorskip("onnxmltools")
    types = pytest.importorskip("onnxmltools.convert.common.data_types")
    measures, species = pytest.importorskip("sklearn.datasets").load_iris(return_X_y=True)
    measures = measures.astype(np.float32)
    trees = xgboost.XGBClassifier(n_estimators=20, max_depth=3, n_jobs=1).fit(measures, species)
    inputs = [("features", types.FloatTensorType([None, 4]))]
    graph = onnxmltools.convert_xgboost(trees, initial_types=inputs, target_opset=15)
    path = tmp_path / "trees.onnx"
    path.write_bytes(graph.SerializeToString())
    entry = ModelEntry(model_id="trees", builder=f"onnx:{path}", limits=(Axis(name="batch", most=150),))
    with served(tmp_path / "store", entry) as (model, run):
        found = answer(json.dumps({"features": measures.tolist()}).encode(), model, run)["outputs"]
    assert found["label"] == trees.predict(measures).tolist()
    assert np.abs(np.array(found["probabilities"]) - trees.predict_proba(measures)).max() < 1e-5


def test_weights_of_torchao_are_refused_with_a_cure(tmp_path: Path) -> None:
    import_torchvision()
    pytest.importorskip("torchao")
    message = refusal(tmp_path, factory("weights_of_torchao", inputs=FEATURES))
    assert "cannot be mapped from a file" in message
    assert "use the module before it was quantized with dtype: bfloat16" in message


@pytest.fixture(scope="module")
def aoti_package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if shutil.which("g++") is None and shutil.which("clang++") is None:
        pytest.skip("there is no compiler of C++")
    path = tmp_path_factory.mktemp("aoti") / "model.pt2"
    # In a process of its own: it imports setuptools, which must come before distutils, and other tests import that.
    program = """
import sys
import brought_models, torch
program = torch.export.export(brought_models.Layers().eval(), (torch.zeros(1, 20),))
torch._inductor.aoti_compile_and_package(program, package_path=sys.argv[1])
"""
    folders = os.pathsep.join([str(Path(brought_models.__file__).parent), *sys.path])
    command = [sys.executable, "-c", program, str(path)]
    subprocess.run(command, env=os.environ | {"PYTHONPATH": folders}, check=True, capture_output=True)
    return path


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("opened_package", "returned a AOTICompiledModel, not a torch.nn.Module; it can never be unloaded"),
        ("AroundPackage", "a package of AOTInductor, which can never be unloaded"),
        ("AroundLoader", "a package of AOTInductor, which can never be unloaded"),
        ("HidesPackage", "MB while it is not loaded"),
    ],
)
def test_package_of_aotinductor_is_refused_with_a_cure(
    tmp_path: Path, aoti_package: Path, monkeypatch: pytest.MonkeyPatch, name: str, sentence: str
) -> None:
    monkeypatch.setenv(brought_models.AOTI_PACKAGE, str(aoti_package))
    inputs = (TensorDeclaration(name="features", datatype="FP32", shape=(1, 20)),)
    message = refusal(tmp_path, factory(name, inputs=inputs))
    assert sentence in message
    assert "export" in message


def test_file_of_aotinductor_is_refused_as_an_exported_program(tmp_path: Path, aoti_package: Path) -> None:
    entry = ModelEntry(model_id="package", builder=f"export:{aoti_package}")
    assert "a package of AOTInductor, which can never be unloaded; save the exported program" in refusal(
        tmp_path, entry
    )


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("module_of_an_exported_program", "use builder: export:model.pt2"),
        ("crashes", "crashes its process (SIGSEGV)"),
        ("CrashesWhenCalled", "crashes its process (SIGSEGV)"),
        ("ends_its_process", "raises SystemExit: no license; call it by hand, and correct it"),
    ],
)
def test_factory_that_cannot_be_used_is_refused_with_a_cure(tmp_path: Path, name: str, sentence: str) -> None:
    assert sentence in refusal(tmp_path, factory(name, inputs=FEATURES))
