"""Graphs of ONNX are executed on the very inputs that were sent, and say what they cannot take."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from serve_app.core.catalog import ModelEntry
from serve_app.core.contract import Axis
from serve_app.errors import InvalidRequest
from serve_app.models.loader import ModelLoader
from serve_app.models.publishing.publish_catalog import publish
from serve_app.store.model_store import ModelStore

onnx = pytest.importorskip("onnx")


def loaded(folder: Path, kind: str, operator: str, shape: Sequence[Any], limits: dict[str, int]) -> Any:
    """Publish and load a graph of one operator on one input ``x``, beside a table of ten rows."""
    table = onnx.numpy_helper.from_array(np.arange(10, dtype=np.float32), "table")
    is_gather = operator == "Gather"
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node(operator, ["table", "x"] if is_gather else ["x"], ["y"])],
        "graph",
        [onnx.helper.make_tensor_value_info("x", getattr(onnx.TensorProto, kind), shape)],
        [onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT if is_gather else onnx.TensorProto.STRING, shape)],
        [table] if is_gather else [],
    )
    path = folder / "model.onnx"
    onnx.save(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 13)], ir_version=8), path)
    store = ModelStore(folder / "store")
    axes = tuple(Axis(name=name, most=most) for name, most in limits.items())
    report = publish(store, [ModelEntry(model_id="m", builder=f"onnx:{path}", limits=axes)])
    assert not report.failures, report.failures
    return ModelLoader(store).load("m")


def test_texts_reach_a_graph_as_they_are(tmp_path: Path) -> None:
    model = loaded(tmp_path, "STRING", "Identity", ["batch", "words"], {"words": 4})
    given = np.array([["a cat".encode(), "é\0".encode()]], np.object_)
    assert model.run({"x": given})["y"].tolist() == [["a cat", "é\0"]]
    with pytest.raises(InvalidRequest, match="input 'x' takes text in UTF-8"):
        model.run({"x": np.array([[b"\xff"]], np.object_)})


def test_an_index_beyond_a_table_is_an_error_of_the_request(tmp_path: Path) -> None:
    model = loaded(tmp_path, "INT64", "Gather", ["batch", "n"], {"n": 4})
    assert model.run({"x": np.array([[9, 0, 3]])})["y"].tolist() == [[9, 0, 3]]
    with pytest.raises(InvalidRequest, match="model 'm' cannot take these inputs: indices element out of data bounds"):
        model.run({"x": np.array([[10]])})


@pytest.mark.parametrize(
    ("shape", "limits"), [(["n", 3], {}), (["N", "n"], {}), (["batch", "n"], {"n": 4}), (["rows", "n"], {"rows": 2, "n": 4})]
)
def test_n_is_a_batch_only_where_no_other_axis_is(tmp_path: Path, shape: Sequence[Any], limits: dict[str, int]) -> None:
    loaded(tmp_path, "INT64", "Gather", shape, limits)
