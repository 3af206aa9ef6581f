"""What ONNX files hold: every datatype, texts, weights in a file of their own, and outputs that are no tensors."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import runtime_models
from model_support import offline
from runtime_models import inputs

from serve_app.core.catalog import ModelEntry, RuntimeName
from serve_app.core.contract import Axis
from serve_app.core.contract_declaration import TensorDeclaration
from serve_app.errors import InvalidRequest
from serve_app.models.loader import ModelLoader
from serve_app.models.publishing.publish_catalog import publish
from serve_app.store.model_store import ModelStore
from serve_app.tasks.tensors import NUMPY_TYPES, Tensors

pytestmark = pytest.mark.slow

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

#: The type in ONNX of each datatype; numpy has none for BF16.
TYPES = {
    "BOOL": onnx.TensorProto.BOOL,
    **{each: getattr(onnx.TensorProto, each) for each in NUMPY_TYPES if "INT" in each},
    "FP16": onnx.TensorProto.FLOAT16,
    "FP32": onnx.TensorProto.FLOAT,
    "FP64": onnx.TensorProto.DOUBLE,
    "BYTES": onnx.TensorProto.STRING,
}  # fmt: skip


def save(path: Path, nodes: list[Any], given: list[Any], returned: list[Any], **fields: Any) -> Path:
    graph = onnx.helper.make_graph(nodes, "graph", given, returned)
    opsets = [onnx.helper.make_opsetid("", 17), onnx.helper.make_opsetid("ai.onnx.ml", 3)]
    onnx.save(onnx.helper.make_model(graph, opset_imports=opsets, ir_version=8), path, **fields)
    return path


def value(name: str, kind: int, *shape: int | str) -> Any:
    return onnx.helper.make_tensor_value_info(name, kind, shape)


def doubled(path: Path, datatypes: list[str]) -> Path:
    """Write a graph with one input and one output of each datatype: its rows, twice."""
    return save(
        path,
        [onnx.helper.make_node("Concat", [each, each], [f"{each}_twice"], axis=1) for each in datatypes],
        [value(each, TYPES[each], "batch", 3) for each in datatypes],
        [value(f"{each}_twice", TYPES[each], "batch", 6) for each in datatypes],
    )


def extremes(datatype: str, runtime: RuntimeName) -> Any:
    # OpenVINO computes in 32 bits at most.
    narrower = {"INT64": "INT32", "UINT32": "UINT16", "UINT64": "UINT16", "FP64": "FP32"}
    computed = NUMPY_TYPES[narrower.get(datatype, datatype) if runtime == "openvino" else datatype]
    dtype = NUMPY_TYPES[datatype]
    if dtype.hasobject:
        return np.array([["é", "", "x" * 300], ["1", "2", "3"]], dtype)
    if dtype.kind == "b":
        return np.array([[True, False, True], [False, False, True]])
    limits = np.iinfo(computed) if dtype.kind in "iu" else np.finfo(computed)
    return np.array([[limits.min, limits.max, 1], [0, 2, 3]], dtype)


def answers(store: ModelStore, given: Tensors, model_id: str = "m") -> Tensors:
    model = ModelLoader(store).load(model_id)
    try:
        return model.run(given)
    finally:
        model.unload()


@pytest.mark.parametrize(
    ("runtime", "datatypes"),
    [("onnxruntime", list(TYPES)), ("openvino", [each for each in TYPES if each != "BYTES"])],
)
def test_tensors_of_every_datatype_go_in_and_come_out(
    tmp_path: Path, runtime: RuntimeName, datatypes: list[str]
) -> None:
    if runtime == "openvino":
        pytest.importorskip("openvino")
    path, store = doubled(tmp_path / "m.onnx", datatypes), ModelStore(tmp_path / "store")
    report = publish(store, [ModelEntry(model_id="m", builder=f"onnx:{path}", runtime=runtime)], reachable=offline)
    assert not report.failures, report.failures[0].message
    contract = store.manifest("m").model.contract
    assert [spec.datatype for spec in contract.inputs] == datatypes
    assert [spec.datatype for spec in contract.outputs] == datatypes
    given = {each: extremes(each, runtime) for each in datatypes}
    found = answers(store, given)
    for each in datatypes:
        expected = np.concatenate([given[each]] * 2, axis=1)
        if each == "BYTES":
            expected = np.array([text.encode() for text in expected.flat], np.object_).reshape(expected.shape)
        assert found[f"{each}_twice"].dtype == NUMPY_TYPES[each]
        assert np.array_equal(found[f"{each}_twice"], expected), each


@pytest.mark.parametrize(("datatype", "number"), [("INT64", 2**31), ("INT64", -(2**31) - 1), ("UINT64", 2**40)])
def test_openvino_refuses_whole_numbers_that_it_would_cut_off(tmp_path: Path, datatype: str, number: int) -> None:
    pytest.importorskip("openvino")
    path, store = doubled(tmp_path / "m.onnx", [datatype]), ModelStore(tmp_path / "store")
    entry = ModelEntry(model_id="m", builder=f"onnx:{path}", runtime="openvino")
    assert not publish(store, [entry], reachable=offline).failures
    given = np.array([[0, number, 1]], NUMPY_TYPES[datatype])
    expected = f"input '{datatype}' takes numbers in -2147483648..2147483647, .* not {number}$"
    with pytest.raises(InvalidRequest, match=expected):
        answers(store, {datatype: given})


def test_openvino_refuses_texts_and_names_the_tensor(tmp_path: Path) -> None:
    pytest.importorskip("openvino")
    entry = ModelEntry(model_id="m", builder=f"onnx:{doubled(tmp_path / 'm.onnx', ['BYTES'])}", runtime="openvino")
    (failure,) = publish(ModelStore(tmp_path / "store"), [entry], reachable=offline).failures
    assert failure.message.endswith("openvino has no texts, as in 'BYTES'; write runtime: onnxruntime")


def sequence(path: Path) -> Path:
    tensor = onnx.helper.make_tensor_type_proto(onnx.TensorProto.FLOAT, ["batch", 3])
    several = onnx.helper.make_sequence_type_proto(tensor)
    return save(
        path,
        [
            onnx.helper.make_node("SequenceConstruct", ["x", "x"], ["probabilities"]),
            onnx.helper.make_node("ArgMax", ["x"], ["label"], axis=1, keepdims=0),
        ],
        [value("x", onnx.TensorProto.FLOAT, "batch", 3)],
        [value("label", onnx.TensorProto.INT64, "batch"), onnx.helper.make_value_info("probabilities", several)],
    )


def maps(path: Path) -> Path:
    """Write what skl2onnx writes of a classifier unless it is told otherwise."""
    tensor = onnx.helper.make_tensor_type_proto(onnx.TensorProto.FLOAT, [])
    several = onnx.helper.make_sequence_type_proto(onnx.helper.make_map_type_proto(onnx.TensorProto.INT64, tensor))
    return save(
        path,
        [
            onnx.helper.make_node(
                "ZipMap", ["x"], ["probabilities"], domain="ai.onnx.ml", classlabels_int64s=[0, 1, 2]
            ),
            onnx.helper.make_node("ArgMax", ["x"], ["label"], axis=1, keepdims=0),
        ],
        [value("x", onnx.TensorProto.FLOAT, "batch", 3)],
        [value("label", onnx.TensorProto.INT64, "batch"), onnx.helper.make_value_info("probabilities", several)],
    )


@pytest.mark.parametrize("write", [sequence, maps])
def test_outputs_that_are_no_tensors_are_refused_with_the_cure_and_can_be_left_out(
    tmp_path: Path, write: Callable[[Path], Path]
) -> None:
    path, store = write(tmp_path / "m.onnx"), ModelStore(tmp_path / "store")
    entry = ModelEntry(model_id="m", builder=f"onnx:{path}")
    (failure,) = publish(store, [entry], reachable=offline).failures
    assert "output 'probabilities' is a seq(" in failure.message
    assert "(scikit-learn: options={'zipmap': False}), or name the outputs that you want" in failure.message
    entry = ModelEntry(model_id="m", builder=f"onnx:{path}", outputs=(TensorDeclaration(name="label"),))
    assert not publish(store, [entry], reachable=offline).failures
    found = answers(store, {"x": np.array([[0, 3, 1]], np.float32)})
    assert {name: array.tolist() for name, array in found.items()} == {"label": [1]}


@pytest.fixture
def external(tmp_path: Path) -> Path:
    """The network as a graph whose weights lie in ``weights.data`` beside it."""
    model = onnx.load(runtime_models.write_onnx(tmp_path / "whole.onnx"))
    onnx.save(
        model, tmp_path / "network.onnx", save_as_external_data=True, location="weights.data", size_threshold=1024
    )
    assert (tmp_path / "network.onnx").stat().st_size < 10_000 < (tmp_path / "weights.data").stat().st_size
    return tmp_path / "network.onnx"


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_weights_in_a_file_of_their_own_are_published_and_served_without_that_file(
    external: Path, runtime: RuntimeName
) -> None:
    if runtime == "openvino":
        pytest.importorskip("openvino")
    store, given = ModelStore(external.parent / "store"), inputs()
    source = runtime_models.of_onnxruntime(external.parent)
    entry = runtime_models.onnx_entry(external, runtime=runtime)
    report = publish(store, [entry], reachable=offline)
    assert not report.failures, report.failures[0].message
    external.with_name("weights.data").unlink()
    found, expected = answers(store, given, "network"), source.answer(given)
    np.testing.assert_allclose(found["mixed"], expected["mixed"], atol=1e-5 * np.abs(expected["mixed"]).max())
    assert np.array_equal(found["largest"], expected["largest"])


def test_a_changed_file_of_weights_is_published_again(external: Path) -> None:
    store, entry, given = ModelStore(external.parent / "store"), runtime_models.onnx_entry(external), inputs()
    assert publish(store, [entry], reachable=offline).published == ("network",)
    assert publish(store, [entry], reachable=offline).skipped == ("network",)
    before = answers(store, given, "network")["mixed"]
    data = external.with_name("weights.data")
    data.write_bytes((np.frombuffer(data.read_bytes(), np.float32) / 2).tobytes())
    assert publish(store, [entry], reachable=offline).published == ("network",)
    assert not np.allclose(answers(store, given, "network")["mixed"], before, rtol=0.1)


def test_a_missing_file_of_weights_is_a_sentence_about_it(external: Path) -> None:
    external.with_name("weights.data").unlink()
    store = ModelStore(external.parent / "store")
    (failure,) = publish(store, [runtime_models.onnx_entry(external)], reachable=offline).failures
    assert "weights.data" in failure.message
    assert failure.message.endswith("name an ONNX file, with its external data beside it")


def test_free_axes_of_a_graph_keep_their_limits(tmp_path: Path) -> None:
    path = save(
        tmp_path / "m.onnx",
        [onnx.helper.make_node("Neg", ["x"], ["y"])],
        [value("x", onnx.TensorProto.DOUBLE, "batch", "width")],
        [value("y", onnx.TensorProto.DOUBLE, "batch", "width")],
    )
    entry = ModelEntry(model_id="m", builder=f"onnx:{path}", limits=(Axis(name="width", most=5),))
    store = ModelStore(tmp_path / "store")
    assert not publish(store, [entry], reachable=offline).failures
    assert np.array_equal(answers(store, {"x": np.array([[1.5, -2]])})["y"], [[-1.5, 2]])


def test_a_table_counts_whole_however_few_rows_one_execution_reads(tmp_path: Path) -> None:
    rows, width = 4096, 1024
    table = np.random.default_rng(0).standard_normal((rows, width)).astype(np.float32)
    path = tmp_path / "table.onnx"
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("Gather", ["table", "ids"], ["found"])],
        "graph",
        [value("ids", TYPES["INT64"], "batch", "sequence")],
        [value("found", TYPES["FP32"], "batch", "sequence", width)],
        [onnx.numpy_helper.from_array(table, "table")],
    )
    opset = onnx.helper.make_opsetid("", 17)
    onnx.save(onnx.helper.make_model(graph, opset_imports=[opset], ir_version=8), path)
    limits = (Axis(name="batch", most=1), Axis(name="sequence", most=16))
    store = ModelStore(tmp_path / "store")
    report = publish(store, [ModelEntry(model_id="m", builder=f"onnx:{path}", limits=limits)], reachable=offline)
    assert not report.failures, report.failures
    assert store.manifest("m").model.profile.size_bytes == pytest.approx(table.nbytes, rel=0.1)
