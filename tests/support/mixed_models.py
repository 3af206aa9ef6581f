"""A small network for each task, as each runtime takes it, with what the original framework answers by itself."""

from __future__ import annotations

import base64
import io
import json
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import embedder_model
import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from task_support import encoded, wav
from torch import nn

Arrays = Mapping[str, NDArray[Any]]

RUNTIMES = ("torch", "onnxruntime", "openvino")

SIDE, WINDOW, CONTEXT, RATE = 16, 160, 32, 8000
TEXT = "a cat sleeps a dog"
_TOKENS = {
    "input_ids": np.array([[embedder_model.WORDS.index(word) for word in TEXT.split()]]),
    "attention_mask": np.ones((1, 5), np.int64),
}
_PIXELS = np.random.default_rng(1).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
_SOUND = np.random.default_rng(2).integers(-3000, 3000, 4 * WINDOW) / 2**15
_PICTURE = {"pixels": (_PIXELS.transpose(2, 0, 1)[None] / 255).astype(np.float32)}
_IMAGE = {"resize_px": SIDE, "crop_px": SIDE, "mean": [0, 0, 0], "std": [1, 1, 1]}


class Body(nn.Module):
    def __init__(self, outputs: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, outputs)
        )

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return self.layers(pixels)


class Classifies(Body):
    def forward(self, pixels: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"scores": self.layers(pixels)}


class Detects(Body):
    """Five candidates of two classes, as YOLO gives them."""

    def forward(self, pixels: torch.Tensor) -> dict[str, torch.Tensor]:
        table = torch.sigmoid(self.layers(pixels)).reshape(1, 6, 5)
        return {"table": torch.cat([table[:, :4] * SIDE, table[:, 4:]], dim=1)}


class Segments(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, pixels: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"masks": self.layer(pixels - 0.5)}


class Reads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(len(embedder_model.WORDS), 6)
        self.head = nn.Linear(6, 3)

    def hidden(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        masked = self.table(input_ids) * attention_mask.float().unsqueeze(-1)
        return masked + masked.sum(1, keepdim=True)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"scores": self.head(self.hidden(input_ids, attention_mask).mean(1))}


class Embeds(Reads):
    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"hidden": self.head(self.hidden(input_ids, attention_mask))}


class Listens(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = nn.Linear(CONTEXT + WINDOW, 8), nn.Linear(8, 1)

    def forward(self, sound: torch.Tensor, state: torch.Tensor) -> dict[str, torch.Tensor]:
        following = torch.tanh(self.layer(sound) * 20 + state)
        return {"speech": torch.sigmoid(self.head(following)), "next_state": following}


class Computes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, features: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"scores": self.layer(features)}


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """How a task is asked, and what its answer is by the outputs of the original network.

    Attributes:
        entry: of the catalog, but for the builder.
        inputs: examples for the network.
        sent, content_type, options: of the request.
        expected: the answer, from a function that runs the original network.
        given: the same part of the answer of a deployment.
    """

    build: Callable[[], nn.Module]
    entry: dict[str, Any]
    inputs: Arrays
    sent: bytes
    content_type: str
    expected: Callable[[Callable[[Arrays], Arrays]], Any]
    given: Callable[[dict[str, Any]], Any]
    options: Mapping[str, str]
    free: Mapping[str, Mapping[int, str]]


def _task(
    build: Callable[[], nn.Module],
    kind: str,
    inputs: Arrays,
    sent: bytes,
    content_type: str,
    expected: Callable[[Callable[[Arrays], Arrays]], Any],
    given: Callable[[dict[str, Any]], Any],
    options: Mapping[str, str] | None = None,
    free: Mapping[str, Mapping[int, str]] | None = None,
    declared: Mapping[str, Any] | None = None,
    **settings: Any,
) -> Task:
    entry = {"task": {"kind": kind, **settings}, **(declared or {})}
    return Task(
        build=build, entry=entry, inputs=inputs, sent=sent, content_type=content_type, expected=expected, given=given,
        options=options or {}, free=free or {},
    )  # fmt: skip


def _probabilities(run: Callable[[Arrays], Arrays], inputs: Arrays) -> NDArray[Any]:
    scores = run(inputs)["scores"][0].astype(np.float64)
    return np.exp(scores) / np.exp(scores).sum()


def _by_class(answer: dict[str, Any]) -> list[float]:
    return [each["probability"] for each in sorted(answer["predictions"], key=lambda each: each["index"])]


def _vector(run: Callable[[Arrays], Arrays]) -> NDArray[Any]:
    mean = run(_TOKENS)["hidden"][0].mean(axis=0)
    return mean / np.linalg.norm(mean)


def _boxes(run: Callable[[Arrays], Arrays]) -> list[list[float]]:
    rows = []
    for x, y, width, height, *scores in run(_PICTURE)["table"][0].T:
        box = [x - width / 2, y - height / 2, x + width / 2, y + height / 2]
        rows.append([max(scores), float(np.argmax(scores)), *np.round(np.clip(box, 0, SIDE), 2)])
    return sorted(rows, reverse=True)


def _given_boxes(answer: dict[str, Any]) -> list[list[float]]:
    return [[each["score"], each["index"], *each["box"]] for each in answer["detections"]]


def _mask(answer: dict[str, Any]) -> NDArray[Any]:
    return np.array(Image.open(io.BytesIO(base64.b64decode(answer["mask"]["data"]))))


def _speech(run: Callable[[Arrays], Arrays]) -> list[float]:
    samples, state, found = np.concatenate([np.zeros(CONTEXT), _SOUND]), np.zeros((1, 8), np.float32), []
    for start in range(0, len(_SOUND), WINDOW):
        outputs = run({"sound": samples[None, start : start + CONTEXT + WINDOW].astype(np.float32), "state": state})
        state = outputs["next_state"]
        found.append(float(outputs["speech"][0, 0]))
    return found


_FEATURES = {"features": np.array([[0.5, -1.0, 2.0, 0.25]], np.float32)}
_PNG = encoded(Image.fromarray(_PIXELS))
_TOKENIZER = {"tokenizer": "file:tokenizer.json"}
_TEXT_AXES = {name: {0: "batch", 1: "tokens"} for name in _TOKENS}
_TEXT_LIMITS = {
    "inputs": [{"name": name, "shape": ["batch", "tokens"]} for name in _TOKENS],
    "limits": {"batch": 2, "tokens": 12},
}

TASKS: dict[str, Task] = {
    "tensors": _task(
        Computes, "tensors", _FEATURES, json.dumps({"features": _FEATURES["features"].tolist()}).encode(),
        "application/json", lambda run: run(_FEATURES)["scores"], lambda answer: answer["outputs"]["scores"],
    ),
    "image-classification": _task(
        lambda: Classifies(4), "image-classification", _PICTURE, _PNG, "image/png",
        lambda run: _probabilities(run, _PICTURE), _by_class, free={"pixels": {0: "batch"}},
        declared={"limits": {"batch": 2}}, labels=list("abcd"), image=_IMAGE,
    ),
    "text-classification": _task(
        Reads, "text-classification", _TOKENS, TEXT.encode(), "text/plain",
        lambda run: _probabilities(run, _TOKENS), _by_class, free=_TEXT_AXES, declared=_TEXT_LIMITS,
        labels=list("abc"), **_TOKENIZER,
    ),
    "embedding": _task(
        Embeds, "embedding", _TOKENS, TEXT.encode(), "text/plain",
        _vector, lambda answer: answer["embeddings"][0], free=_TEXT_AXES, declared=_TEXT_LIMITS, **_TOKENIZER,
    ),
    "detection": _task(
        lambda: Detects(30), "detection", _PICTURE, _PNG, "image/png",
        _boxes, _given_boxes, {"min_score": "0", "max_overlap": "1"}, labels=["a", "b"],
        image={**_IMAGE, "fit": "stretch"},
    ),
    "segmentation": _task(
        Segments, "segmentation", _PICTURE, _PNG, "image/png",
        lambda run: run(_PICTURE)["masks"][0].argmax(0), _mask, labels=["a", "b", "c"],
        image={**_IMAGE, "fit": "stretch"},
    ),
    "voice-activity": _task(
        Listens, "voice-activity", {"sound": np.zeros((1, CONTEXT + WINDOW), np.float32),
        "state": np.zeros((1, 8), np.float32)}, wav(_SOUND[:, None], RATE), "audio/wav",
        _speech, lambda answer: answer["probability"]["windows"], sample_rate=RATE, context=CONTEXT,
        declared={"inputs": [{"name": "state", "default": 0, "returned_by": "next_state"}]},
    ),
}  # fmt: skip


def network(task: str) -> nn.Module:
    """The network of a task; the same weights whenever it is made."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return TASKS[task].build().eval()


class _InOrder(nn.Module):
    """Gives the outputs as a tuple, as ONNX takes them."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(self.inner(*inputs).values())


def write(folder: Path, task: str, runtime: str) -> dict[str, Any]:
    """Write a network as a runtime takes it; return its entry of the catalog."""
    made, module = TASKS[task], network(task)
    inputs = {name: torch.from_numpy(array) for name, array in made.inputs.items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if runtime == "torch":
            axes = {"batch": torch.export.Dim("batch", max=2), "tokens": torch.export.Dim("tokens", max=12)}
            shapes = {name: {at: axes[axis] for at, axis in made.free.get(name, {}).items()} for name in inputs}
            examples = tuple(torch.cat([each, each]) if made.free else each for each in inputs.values())
            program = torch.export.export(module, examples, dynamic_shapes=shapes if made.free else None)
            torch.export.save(program, folder / f"{task}.pt2")
            return {"builder": f"export:{task}.pt2", **made.entry}
        path = folder / f"{task}.onnx"
        if not path.exists():
            torch.onnx.export(
                _InOrder(module), tuple(inputs.values()), str(path), dynamo=False, input_names=list(inputs),
                output_names=list(module(*inputs.values())), dynamic_axes={k: dict(v) for k, v in made.free.items()},
            )  # fmt: skip
    return {"builder": f"onnx:{task}.onnx", "runtime": runtime, **made.entry}


def original(folder: Path, task: str, runtime: str) -> Callable[[Arrays], Arrays]:
    """Return a function that runs a network in the framework that it comes from, without EdgeServe."""
    path, module = folder / f"{task}.onnx", network(task)
    names = list(module(*(torch.from_numpy(array) for array in TASKS[task].inputs.values())))
    if runtime == "torch":

        def run(given: Arrays) -> Arrays:
            with torch.inference_mode():
                found = module(*(torch.from_numpy(array) for array in given.values()))
            return {name: tensor.numpy() for name, tensor in found.items()}

        return run
    if runtime == "onnxruntime":
        import onnxruntime

        session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        return lambda given: dict(zip(names, session.run(names, dict(given)), strict=True))
    import openvino

    compiled = openvino.Core().compile_model(str(path), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})

    def infer(given: Arrays) -> Arrays:
        results = compiled.create_infer_request().infer(dict(given))
        return {name: np.array(results[name]) for name in names}

    return infer


def write_slow(path: Path) -> None:
    """Write an ONNX model of so many nodes that it loads slowly."""
    from onnx import TensorProto, helper, numpy_helper, save

    count = 6000
    nodes = [
        helper.make_node("MatMul" if turn % 2 else "Relu", [f"x{turn}", *(["w"] if turn % 2 else [])], [f"x{turn + 1}"])
        for turn in range(count)
    ]
    weights = numpy_helper.from_array(np.eye(4, dtype=np.float32), "w")
    sides = [helper.make_tensor_value_info(f"x{at}", TensorProto.FLOAT, [1, 4]) for at in (0, count)]
    graph = helper.make_graph(nodes, "slow", sides[:1], sides[1:], [weights])
    save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8), path)
