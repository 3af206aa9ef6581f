"""One small network for every runtime, with the answers of the framework that it comes from."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import nn

from serve_app.core.catalog import ModelEntry, RuntimeName
from serve_app.core.contract import Axis
from serve_app.core.contract_declaration import TensorDeclaration
from serve_app.core.task import TaskSpec

WIDTH, HIDDEN = 512, 2048

Arrays = Mapping[str, NDArray[Any]]

LIMITS = (Axis(name="batch", most=4), Axis(name="steps", most=64))


class Network(nn.Module):
    """Two inputs that share their axes, one of them whole numbers, and two outputs; about 8 MB."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(64, WIDTH)
        self.first = nn.Linear(WIDTH, HIDDEN)
        self.second = nn.Linear(HIDDEN, WIDTH)

    def forward(self, features: torch.Tensor, kinds: torch.Tensor) -> dict[str, torch.Tensor]:
        hidden = torch.relu(self.first(features + self.table(kinds)))
        mixed = self.second(hidden)
        return {"mixed": mixed, "largest": mixed.argmax(-1)}


def network() -> Network:
    """A factory of the catalog: the same weights whenever they are not on the meta device."""
    state = torch.random.get_rng_state()
    torch.manual_seed(5)
    built = Network().eval()
    torch.random.set_rng_state(state)
    return built


def write_onnx(path: Path) -> Path:
    """Write the network as an ONNX graph, with the same names."""
    from onnx import TensorProto, helper, numpy_helper, save

    weights = {name.replace(".", "_"): value.detach().numpy() for name, value in network().state_dict().items()}
    nodes = [
        helper.make_node("Gather", ["table_weight", "kinds"], ["embedded"]),
        helper.make_node("Add", ["features", "embedded"], ["summed"]),
        helper.make_node("MatMul", ["summed", "first_weight"], ["projected"]),
        helper.make_node("Add", ["projected", "first_bias"], ["shifted"]),
        helper.make_node("Relu", ["shifted"], ["hidden"]),
        helper.make_node("MatMul", ["hidden", "second_weight"], ["back"]),
        helper.make_node("Add", ["back", "second_bias"], ["mixed"]),
        helper.make_node("ArgMax", ["mixed"], ["largest"], axis=-1, keepdims=0),
    ]
    graph = helper.make_graph(
        nodes,
        "network",
        [
            helper.make_tensor_value_info("features", TensorProto.FLOAT, ["batch", "steps", WIDTH]),
            helper.make_tensor_value_info("kinds", TensorProto.INT64, ["batch", "steps"]),
        ],
        [
            helper.make_tensor_value_info("mixed", TensorProto.FLOAT, ["batch", "steps", WIDTH]),
            helper.make_tensor_value_info("largest", TensorProto.INT64, ["batch", "steps"]),
        ],
        [
            numpy_helper.from_array(value.T.copy() if name in ("first_weight", "second_weight") else value, name)
            for name, value in weights.items()
        ],
    )
    save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8), path)
    return path


def onnx_entry(path: Path, **fields: Any) -> ModelEntry:
    return ModelEntry(model_id="network", builder=f"onnx:{path}", limits=LIMITS, **fields)


def inputs(batch: int = 2, steps: int = 3, seed: int = 0) -> dict[str, NDArray[Any]]:
    rng = np.random.default_rng(seed)
    return {
        "features": rng.standard_normal((batch, steps, WIDTH), dtype=np.float32),
        "kinds": rng.integers(0, 64, (batch, steps)),
    }


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """A catalog entry, and the answers of the framework that the model comes from."""

    entry: ModelEntry
    answer: Callable[[Arrays], Arrays]


def of_torch(folder: Path) -> Source:
    module = network()

    def answer(given: Arrays) -> Arrays:
        with torch.inference_mode():
            results = module(*(torch.from_numpy(given[name]) for name in ("features", "kinds")))
        return {name: tensor.numpy() for name, tensor in results.items()}

    declared = (
        TensorDeclaration(name="features", datatype="FP32", shape=("batch", "steps", WIDTH)),
        TensorDeclaration(name="kinds", datatype="INT64", shape=("batch", "steps")),
    )
    return Source(
        entry=ModelEntry(
            model_id="network", builder="runtime_models:network", inputs=declared, limits=LIMITS,
            task=TaskSpec(),
        ),
        answer=answer,
    )  # fmt: skip


def of_onnxruntime(folder: Path) -> Source:
    ort = pytest.importorskip("onnxruntime")
    path = write_onnx(folder / "network.onnx")
    session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return Source(
        entry=onnx_entry(path),
        answer=lambda given: dict(zip(("mixed", "largest"), session.run(["mixed", "largest"], given), strict=True)),
    )


def of_openvino(folder: Path) -> Source:
    ov = pytest.importorskip("openvino")
    path = write_onnx(folder / "network.onnx")
    compiled = ov.Core().compile_model(str(path), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})

    def answer(given: Arrays) -> Arrays:
        results = compiled.create_infer_request().infer(dict(given))
        return {name: np.array(results[name]) for name in ("mixed", "largest")}

    return Source(entry=onnx_entry(path, runtime="openvino"), answer=answer)


#: How the network comes to each runtime; a new one needs a line here.
SOURCES: Mapping[RuntimeName, Callable[[Path], Source]] = {
    "torch": of_torch,
    "onnxruntime": of_onnxruntime,
    "openvino": of_openvino,
}
