"""The codec of the Open Inference Protocol: what goes in comes out, and what is malformed is named."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import orjson
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from serve_app.core.catalog import ModelProfile, PublishedModel
from serve_app.core.contract import Axis, Contract, TensorSpec
from serve_app.core.task import ImageInput, TaskSpec
from serve_app.core.vocabulary import Outcome
from serve_app.errors import EdgeServeError, InvalidRequest, NotFound
from serve_app.serving import oip
from serve_app.serving.api.inference import outcome_headers
from serve_app.serving.oip.tensors import DTYPES
from serve_app.serving.router.request import InferenceResponse

Json = dict[str, Any]
Array = np.ndarray[Any, Any]
FEW = settings(max_examples=150, deadline=None)


def published(
    *,
    inputs: tuple[TensorSpec, ...] = (TensorSpec(name="input", datatype="FP32", shape=(-1, 2, 3)),),
    outputs: tuple[TensorSpec, ...] = (TensorSpec(name="output", datatype="FP32", shape=(-1, 4)),),
    weights_actual: str = "pretrained",
) -> PublishedModel:
    return PublishedModel(
        model_id="resnet18",
        builder="torchvision:resnet18",
        family="imagenet",
        weights_requested="pretrained",
        weights_actual=weights_actual,
        dtype="float32",
        pinned=False,
        runtime="torch",
        contract=Contract(
            inputs=inputs,
            outputs=outputs,
            axes=tuple(
                Axis(name=name, most=8) for name in dict.fromkeys(axis for spec in inputs for axis in spec.axes) if name
            ),
        ),
        task=TaskSpec(kind="image-classification", image=ImageInput(), labels=("cat", "dog", "axolotl", "tench")),
        row_by_row=True,
        weights_bytes=10,
        workspace_bytes=2,
        profile=ModelProfile(model_id="resnet18", size_bytes=12, load_s=0.1, exec_s=0.01, accuracy=0.7),
    )


def _free_axes(specs: tuple[TensorSpec, ...]) -> list[str]:
    return [name for name in dict.fromkeys(axis for spec in specs for axis in spec.axes) if name]


def batch_for(request: oip.InferRequest, model: PublishedModel, max_batch: int) -> Array:
    """The only input of a model."""
    (batch,) = oip.tensors_for(request, model, max_batch).values()
    return batch


# A reference client, written from the specification.


def client_body(
    arrays: dict[str, Array], *, binary: bool, nested: bool = False, **top: object
) -> tuple[bytes, int | None]:
    inputs: list[Json] = []
    tail = b""
    for name, array in arrays.items():
        tensor: Json = {"name": name, "datatype": oip.datatype_of(array), "shape": list(array.shape)}
        if binary:
            raw = _raw(array)
            tensor["parameters"] = {"binary_data_size": len(raw)}
            tail += raw
        else:
            numbers = array.tolist() if nested else array.reshape(-1).tolist()
            tensor["data"] = [text.decode() for text in array.flat] if array.dtype.hasobject else numbers
        inputs.append(tensor)
    head = json.dumps({"inputs": inputs, **top}).encode()
    return head + tail, len(head) if binary else None


def _raw(array: Array) -> bytes:
    if array.dtype.hasobject:
        return b"".join(struct.pack("<I", len(text)) + text for text in array.flat)
    return array.astype(array.dtype.newbyteorder("<")).tobytes()


def client_result(response: oip.EncodedResponse) -> tuple[Json, dict[str, Array]]:
    length = len(response.body) if response.json_length is None else response.json_length
    document = json.loads(response.body[:length])
    offset = length
    arrays = {}
    for output in document["outputs"]:
        dtype = DTYPES[output["datatype"]]
        if "data" in output:
            flat = np.array(output["data"], dtype=dtype)
        else:
            size = output["parameters"]["binary_data_size"]
            flat = np.frombuffer(response.body[offset : offset + size], dtype=dtype)
            offset += size
        arrays[output["name"]] = flat.reshape(output["shape"])
    assert offset == len(response.body)
    return document, arrays


def request_json(**changes: object) -> Json:
    document: Json = {"inputs": [tensor_json()]}
    document.update(changes)
    return document


def tensor_json(**changes: object) -> Json:
    tensor: Json = {"name": "input", "datatype": "FP32", "shape": [1, 2, 3], "data": [1, 2, 3, 4, 5, 6]}
    tensor.update(changes)
    return {key: value for key, value in tensor.items() if value is not ...}


def binary_tensor(size: object = 24, **changes: object) -> Json:
    return tensor_json(data=..., parameters={"binary_data_size": size}, **changes)


def parse(document: object, tail: bytes = b"", *, binary: bool = False) -> oip.InferRequest:
    head = orjson.dumps(document)
    return oip.parse_infer(head + tail, len(head) if binary or tail else None)


def parsed_batch(array: Array, name: str = "input", *, binary: bool = True) -> oip.InferRequest:
    return oip.parse_infer(*client_body({name: array}, binary=binary))


def refusal(act: Callable[[], object]) -> str:
    with pytest.raises(InvalidRequest) as caught:
        act()
    message = caught.value.message
    assert caught.value.status == 400
    assert "\n" not in message
    assert "Traceback" not in message
    assert not message.endswith((".", " "))
    assert len(message) < 500
    return message


# Requests that are malformed.

NOT_JSON: list[tuple[bytes, str]] = [
    (b"", "no body"),
    (b"   ", "not valid JSON"),
    (b"hello", "not valid JSON"),
    (b'{"inputs": [', "not valid JSON"),
    (b"\xff\xfe", "not valid JSON"),
    (b'{"id": "\\ud800"}', "not valid JSON"),
    (b'{"inputs": [{"name": "input", "data": [NaN]}]}', "neither NaN nor Infinity"),
    (b'{"inputs": [{"name": "input", "data": [1, Infinity]}]}', "neither NaN nor Infinity"),
    (b'{"inputs": [{"name": "input", "data": [-Infinity]}]}', "neither NaN nor Infinity"),
    (b'{"x": 1e999}', "not valid JSON"),
    (b"[" * 100_000, "not valid JSON"),
    (b'{"inputs":' * 50_000, "not valid JSON"),
    (b"null", "JSON object, not null"),
    (b"[1, 2]", "JSON object, not a list of 2"),
    (b"[" * 900 + b"]" * 900, "JSON object, not a list of 1"),
    (b'"inputs"', "JSON object, not 'inputs'"),
    (b"7", "JSON object, not 7"),
]


@pytest.mark.parametrize(("body", "culprit"), NOT_JSON, ids=[str(i) for i in range(len(NOT_JSON))])
def test_a_body_that_is_no_json_object_is_refused(body: bytes, culprit: str) -> None:
    assert culprit in refusal(lambda: oip.parse_infer(body, None))


MALFORMED: dict[str, tuple[Json, list[str]]] = {
    "inputs missing": ({"id": "a"}, ["inputs"]),
    "inputs null": (request_json(inputs=None), ["inputs", "null"]),
    "inputs object": (request_json(inputs={}), ["inputs", "an object"]),
    "inputs empty": (request_json(inputs=[]), ["inputs", "empty"]),
    "input no object": (request_json(inputs=[3]), ["inputs[0]", "object", "3"]),
    "input second no object": (request_json(inputs=[tensor_json(), None]), ["inputs[1]", "null"]),
    "name missing": (request_json(inputs=[tensor_json(name=...)]), ["name of inputs[0]"]),
    "name number": (request_json(inputs=[tensor_json(name=4)]), ["name of inputs[0]", "4"]),
    "name empty": (request_json(inputs=[tensor_json(name="")]), ["name of inputs[0]"]),
    "name twice": (request_json(inputs=[tensor_json(), tensor_json()]), ["'input'", "twice"]),
    "id number": (request_json(id=5), ["id", "string", "5"]),
    "id null": (request_json(id=None), ["id", "null"]),
    "id object": (request_json(id={}), ["id", "an object"]),
    "id bool": (request_json(id=True), ["id", "true"]),
    "id too long": (request_json(id="x" * 2000), ["id", "1024", "2000"]),
    "parameters list": (request_json(parameters=[]), ["parameters of the request", "object"]),
    "parameters null": (request_json(parameters=None), ["parameters of the request", "null"]),
    "tensor parameters": (request_json(inputs=[tensor_json(parameters=1)]), ["parameters", "'input'"]),
    "shared memory": (
        request_json(inputs=[tensor_json(data=..., parameters={"shared_memory_region": "r"})]),
        ["shared_memory_region", "'input'"],
    ),
    "binary_data_output": (request_json(parameters={"binary_data_output": 1}), ["binary_data_output", "true or false"]),
    "datatype missing": (request_json(inputs=[tensor_json(datatype=...)]), ["datatype", "'input'", "FP32"]),
    "datatype unknown": (request_json(inputs=[tensor_json(datatype="FP33")]), ["datatype", "'input'", "'FP33'"]),
    "datatype number": (request_json(inputs=[tensor_json(datatype=32)]), ["datatype", "'input'", "32"]),
    "datatype list": (request_json(inputs=[tensor_json(datatype=["FP32"])]), ["datatype", "'input'"]),
    "datatype lower": (request_json(inputs=[tensor_json(datatype="fp32")]), ["datatype", "'fp32'"]),
    "BYTES": (request_json(inputs=[tensor_json(datatype="BYTES", data=["a"])]), ["'input'", "must hold 6"]),
    "BYTES of numbers": (request_json(inputs=[tensor_json(datatype="BYTES")]), ["'input'", "a string"]),
    "shape missing": (request_json(inputs=[tensor_json(shape=...)]), ["shape", "'input'", "null"]),
    "shape number": (request_json(inputs=[tensor_json(shape=6)]), ["shape", "'input'", "6"]),
    "shape of a scalar": (request_json(inputs=[tensor_json(shape=[])]), ["'input'", "must hold 1 numbers", "not 6"]),
    "shape zero": (request_json(inputs=[tensor_json(shape=[0, 6])]), ["shape", "'input'", "[0, 6]"]),
    "shape negative": (request_json(inputs=[tensor_json(shape=[-1, 6])]), ["shape", "'input'", "[-1, 6]"]),
    "shape float": (request_json(inputs=[tensor_json(shape=[1.0, 6])]), ["shape", "'input'", "[1.0, 6]"]),
    "shape bool": (request_json(inputs=[tensor_json(shape=[True, 6])]), ["shape", "'input'", "[true, 6]"]),
    "shape string": (request_json(inputs=[tensor_json(shape=["6"])]), ["shape", "'input'", "['6']"]),
    "shape nested": (request_json(inputs=[tensor_json(shape=[[6]])]), ["shape", "'input'"]),
    "shape null": (request_json(inputs=[tensor_json(shape=[None])]), ["shape", "'input'", "[null]"]),
    "shape huge": (request_json(inputs=[tensor_json(shape=[2**62])]), ["'input'", str(2**62)]),
    "shape overflow": (request_json(inputs=[tensor_json(shape=[2**62, 4])]), ["shape", "'input'", "more elements"]),
    "shape wraps to 0": (request_json(inputs=[tensor_json(shape=[2**32, 2**32])]), ["shape", "'input'"]),
    "shape too many": (request_json(inputs=[tensor_json(shape=[2] * 100_000)]), ["shape", "'input'", "100000"]),
    "data missing": (request_json(inputs=[tensor_json(data=...)]), ["'input'", "data"]),
    "data null": (request_json(inputs=[tensor_json(data=None)]), ["data", "'input'", "null"]),
    "data number": (request_json(inputs=[tensor_json(data=6)]), ["data", "'input'", "6"]),
    "data object": (request_json(inputs=[tensor_json(data={})]), ["data", "'input'", "an object"]),
    "data empty": (request_json(inputs=[tensor_json(data=[])]), ["data", "'input'", "6", "not 0"]),
    "data short": (request_json(inputs=[tensor_json(data=[1] * 5)]), ["data", "'input'", "6", "not 5"]),
    "data long": (request_json(inputs=[tensor_json(data=[1] * 7)]), ["data", "'input'", "6", "not 7"]),
    "data string": (request_json(inputs=[tensor_json(data=[1, 2, 3, 4, 5, "6"])]), ["'input'", "element 5", "'6'"]),
    "data bool": (request_json(inputs=[tensor_json(data=[1, 2, True, 4, 5, 6])]), ["'input'", "element 2", "true"]),
    "data holds null": (request_json(inputs=[tensor_json(data=[None] * 6)]), ["'input'", "element 0", "null"]),
    "data object in": (request_json(inputs=[tensor_json(data=[1, 2, 3, 4, 5, {}])]), ["'input'", "element 5"]),
    "data late list": (
        request_json(inputs=[tensor_json(data=[1, 2, 3, 4, 5, [6]])]),
        ["'input'", "element 5", "a list"],
    ),
    "data over FP32": (
        request_json(inputs=[tensor_json(data=[1, 2, 3, 4, 5, 1e39])]),
        ["'input'", "element 5", "1e+39"],
    ),
    "data over FP16": (
        request_json(inputs=[tensor_json(datatype="FP16", data=[1, 2, 3, 4, 70000, 1])]),
        ["'input'", "element 4", "70000"],
    ),
    "ragged": (request_json(inputs=[tensor_json(data=[[[1, 2, 3], [4, 5]]])]), ["'input'", "nested", "[1, 2, 3]"]),
    "ragged to scalar": (request_json(inputs=[tensor_json(data=[[[1, 2, 3], 4]])]), ["'input'", "nested"]),
    "nested otherwise": (request_json(inputs=[tensor_json(data=[[1, 2], [3, 4], [5, 6]])]), ["'input'", "nested"]),
    "nested too deep": (request_json(inputs=[tensor_json(data=[[[[1], [2], [3]], [[4], [5], [6]]]])]), ["'input'"]),
    "int from float": (request_json(inputs=[tensor_json(datatype="INT32", data=[1.0] * 6)]), ["'input'", "whole"]),
    "int from bool": (request_json(inputs=[tensor_json(datatype="INT32", data=[True] * 6)]), ["'input'", "true"]),
    "UINT8 negative": (
        request_json(inputs=[tensor_json(datatype="UINT8", data=[0, 0, 0, 0, 0, -1])]),
        ["'input'", "-1"],
    ),
    "UINT8 large": (
        request_json(inputs=[tensor_json(datatype="UINT8", data=[0, 0, 0, 0, 0, 256])]),
        ["'input'", "0..255", "element 5", "256"],
    ),
    "INT64 large": (request_json(inputs=[tensor_json(datatype="INT64", data=[2**63] * 6)]), ["'input'", str(2**63)]),
    "BOOL from int": (request_json(inputs=[tensor_json(datatype="BOOL", data=[1] * 6)]), ["'input'", "true or false"]),
    "binary without header": (request_json(inputs=[binary_tensor()]), ["'input'", "Inference-Header-Content-Length"]),
    "binary size string": (request_json(inputs=[binary_tensor("24")]), ["binary_data_size", "'input'", "'24'"]),
    "binary size float": (request_json(inputs=[binary_tensor(24.0)]), ["binary_data_size", "'input'", "24.0"]),
    "binary size bool": (request_json(inputs=[binary_tensor(True)]), ["binary_data_size", "'input'", "true"]),
    "binary size null": (request_json(inputs=[binary_tensor(None)]), ["binary_data_size", "'input'", "null"]),
    "binary size negative": (request_json(inputs=[binary_tensor(-24)]), ["binary_data_size", "'input'", "-24"]),
    "binary and data": (
        request_json(inputs=[tensor_json(parameters={"binary_data_size": 24})]),
        ["'input'", "data", "binary_data_size", "not both"],
    ),
    "outputs object": (request_json(outputs={}), ["outputs", "an object"]),
    "outputs null": (request_json(outputs=None), ["outputs", "null"]),
    "output string": (request_json(outputs=["output"]), ["outputs[0]", "'output'"]),
    "output no name": (request_json(outputs=[{}]), ["name of outputs[0]"]),
    "output twice": (request_json(outputs=[{"name": "o"}, {"name": "o"}]), ["outputs", "'o'", "twice"]),
    "output parameters": (request_json(outputs=[{"name": "o", "parameters": []}]), ["parameters", "'o'"]),
    "output binary_data": (
        request_json(outputs=[{"name": "o", "parameters": {"binary_data": "yes"}}]),
        ["binary_data", "'o'", "'yes'"],
    ),
    "output classes zero": (
        request_json(outputs=[{"name": "o", "parameters": {"classification": 0}}]),
        ["classification", "'o'", "0"],
    ),
    "output classes string": (
        request_json(outputs=[{"name": "o", "parameters": {"classification": "5"}}]),
        ["classification", "'o'", "'5'"],
    ),
    "output classes bool": (
        request_json(outputs=[{"name": "o", "parameters": {"classification": True}}]),
        ["classification", "'o'", "true"],
    ),
    "output shared memory": (
        request_json(outputs=[{"name": "o", "parameters": {"shared_memory_region": "r"}}]),
        ["shared_memory_region", "'o'"],
    ),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_a_malformed_request_is_refused_with_the_culprit_named(case: str) -> None:
    document, culprits = MALFORMED[case]
    message = refusal(lambda: parse(document))
    for culprit in culprits:
        assert culprit in message


@pytest.mark.parametrize("key", ["name", "datatype", "shape", "data", "parameters"])
def test_nesting_just_short_of_the_parsers_limit_is_refused(key: str) -> None:
    body = orjson.dumps(request_json(inputs=[tensor_json(**{key: "DEEP"})]))
    body = body.replace(b'"DEEP"', b"[" * 1000 + b"]" * 1000)
    assert key in refusal(lambda: oip.parse_infer(body, None))


def test_a_long_or_odd_name_is_shown_short_and_on_one_line() -> None:
    message = refusal(lambda: parse(request_json(inputs=[tensor_json(name="line\nbreak" * 10_000, shape=[7])])))
    assert "line\\nbreak" in message


BINARY_MALFORMED: dict[str, tuple[list[Json], int, list[str]]] = {
    "size not that of the shape": ([binary_tensor(20)], 20, ["'input'", "24 bytes", "not 20"]),
    "size over the body": ([binary_tensor(24)], 23, ["binary_data_size", "'input'", "24", "23"]),
    "second over the body": ([binary_tensor(), binary_tensor(name="b")], 40, ["binary_data_size", "'b'", "16"]),
    "bytes left over": ([binary_tensor(24)], 25, ["25 bytes", "add up to 24"]),
    "bytes behind JSON only": ([tensor_json()], 3, ["3 bytes", "add up to 0"]),
    "size zero": ([binary_tensor(0)], 24, ["'input'", "24 bytes", "not 0"]),
    "size huge": ([binary_tensor(2**63)], 24, ["binary_data_size", "'input'", str(2**63)]),
    "shape huge": ([binary_tensor(24, shape=[2**60])], 24, ["'input'", "not 24"]),
    "BYTES": ([binary_tensor(23, datatype="BYTES")], 23, ["BYTES", "'input'", "6 elements"]),
    "BF16": ([binary_tensor(24, datatype="BF16")], 24, ["BF16", "'input'", "takes 12 bytes"]),
}


@pytest.mark.parametrize("case", BINARY_MALFORMED)
def test_binary_data_that_do_not_add_up_are_refused(case: str) -> None:
    tensors, tail_bytes, culprits = BINARY_MALFORMED[case]
    message = refusal(lambda: parse(request_json(inputs=tensors), bytes(tail_bytes), binary=True))
    for culprit in culprits:
        assert culprit in message


def test_binary_booleans_other_than_0_and_1_are_refused() -> None:
    tensor = binary_tensor(6, datatype="BOOL")
    assert parse(request_json(inputs=[tensor]), bytes([0, 1, 0, 1, 1, 0])).inputs[0].array.sum() == 3
    assert "'input'" in refusal(lambda: parse(request_json(inputs=[tensor]), bytes([0, 1, 2, 0, 0, 0])))


@pytest.mark.parametrize("json_length", [-1, 0, 10_000, 2**70])
def test_a_json_length_beyond_the_body_is_refused(json_length: int) -> None:
    body = orjson.dumps(request_json())
    message = refusal(lambda: oip.parse_infer(body, json_length))
    assert "Inference-Header-Content-Length" in message
    assert str(len(body)) in message


@pytest.mark.parametrize("header", ["", "abc", "-1", "1.0", "1e3", " 12", "٣", "9" * 5000, "0x10", "12,12"])
def test_a_json_length_header_that_is_no_whole_number_is_refused(header: str) -> None:
    assert "Inference-Header-Content-Length" in refusal(lambda: oip.parse_json_length(header))


def test_the_json_length_header_may_be_absent() -> None:
    assert oip.parse_json_length(None) is None
    assert oip.parse_json_length("123") == 123


# Options.

BAD_OPTIONS: dict[str, list[Any]] = {
    "deadline_ms": ["fast", "", True, None, -1, -0.5, math.nan, math.inf, [], {}, "nan"],
    "min_accuracy": ["high", False, None, -0.1, 1.01, math.nan, -math.inf, [0.5]],
    "forward": ["always", "", "AUTO", True, None, 1, ["auto"], {}],
    "priority": ["urgent", True, None, -1, 1.0, 2**31, math.nan, []],
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in BAD_OPTIONS.items() for value in values])
def test_a_bad_option_is_refused_by_its_name(name: str, value: object) -> None:
    assert name in refusal(lambda: oip.RequestOptions.from_parameters({name: value}))


BAD_QUERIES: list[tuple[str, str]] = [
    *(("deadline_ms", text) for text in ("", "fast", "-1", "nan", "inf", "1e999", "1_0", " 5", "true", "٣", "0x10")),
    *(("min_accuracy", text) for text in ("", "1.5", "-0.1", "NaN", "0,5")),
    *(("forward", text) for text in ("", "always", "1")),
    *(("priority", text) for text in ("", "1.0", "1e2", "-3", "9" * 30, "9" * 5000)),
]


@pytest.mark.parametrize(("name", "text"), BAD_QUERIES)
def test_a_bad_option_in_a_query_is_refused_by_its_name(name: str, text: str) -> None:
    assert name in refusal(lambda: oip.RequestOptions.from_query({name: text}))


def test_parameters_and_query_give_the_same_options() -> None:
    wanted = oip.RequestOptions(deadline_ms=250, min_accuracy=0.75, forward="never", priority=3)
    document = {"deadline_ms": 250, "min_accuracy": 0.75, "forward": "never", "priority": 3}
    query = {"deadline_ms": "250", "min_accuracy": "0.75", "forward": "never", "priority": "3"}
    assert parse(request_json(parameters=document)).options == wanted
    assert oip.RequestOptions.from_query(query) == wanted


def test_options_default_and_unknown_ones_are_ignored() -> None:
    assert parse(request_json(parameters={"sequence_id": 4, "timeout": None})).options == oip.RequestOptions()
    assert oip.RequestOptions.from_query({"model": "resnet18", "top_k": "5"}) == oip.RequestOptions()


@FEW
@given(
    deadline_ms=st.floats(0, 1e9),
    min_accuracy=st.floats(0, 1),
    forward=st.sampled_from(["auto", "never"]),
    priority=st.integers(0, 2**31 - 1),
)
def test_any_valid_option_reads_alike_from_a_query(**options: Any) -> None:
    query = {name: str(value) for name, value in options.items()}
    assert oip.RequestOptions.from_query(query) == oip.RequestOptions.from_parameters(options)


# Requests that are right.


def test_a_request_is_parsed_whole() -> None:
    request = parse(
        request_json(
            id="r1",
            parameters={"binary_data_output": True, "deadline_ms": 20.5},
            outputs=[
                {"name": "a"},
                {"name": "b", "parameters": {"binary_data": False}},
                {"name": "c", "parameters": {"classification": 3}},
            ],
        )
    )
    assert request.request_id == "r1"
    assert request.binary_output_default
    assert request.options == oip.RequestOptions(deadline_ms=20.5)
    assert request.outputs == (
        oip.RequestedOutput(name="a", binary=True),
        oip.RequestedOutput(name="b", binary=False),
        oip.RequestedOutput(name="c", binary=True, classification=3),
    )
    (tensor,) = request.inputs
    assert (tensor.name, tensor.datatype, tensor.shape) == ("input", "FP32", (1, 2, 3))
    assert tensor.array.tolist() == [[[1, 2, 3], [4, 5, 6]]]


def test_a_minimal_request_gets_the_defaults() -> None:
    request = parse(request_json())
    assert (request.request_id, request.outputs, request.binary_output_default) == ("", (), False)


def test_binary_tensors_are_views_of_the_body() -> None:
    body, json_length = client_body({"input": np.ones((1, 2, 3), np.float32)}, binary=True)
    (tensor,) = oip.parse_infer(memoryview(body), json_length).inputs
    assert np.shares_memory(tensor.array, np.frombuffer(body, np.uint8))


def test_json_and_binary_tensors_mix_in_one_request() -> None:
    inputs = [binary_tensor(8, name="a", shape=[2]), tensor_json(name="b"), binary_tensor(4, name="c", shape=[1])]
    tail = np.array([1, 2, 3], "<f4").tobytes()
    a, b, c = parse(request_json(inputs=inputs), tail).inputs
    assert a.array.tolist() == [1, 2]
    assert b.array.sum() == 21
    assert c.array.tolist() == [3]


@st.composite
def arrays(draw: st.DrawFn, datatypes: tuple[str, ...] = tuple(DTYPES)) -> Array:
    dtype = DTYPES[draw(st.sampled_from(datatypes))]
    shape = draw(st.lists(st.integers(1, 4), min_size=1, max_size=4))
    count = math.prod(shape)
    if dtype.kind == "f":
        width = dtype.itemsize * 8
        elements: st.SearchStrategy[Any] = st.floats(width=width, allow_nan=False, allow_infinity=False)  # type: ignore[arg-type]
    elif dtype.kind == "b":
        elements = st.booleans()
    else:
        elements = st.integers(int(np.iinfo(dtype).min), int(np.iinfo(dtype).max))
    return np.array(draw(st.lists(elements, min_size=count, max_size=count)), dtype=dtype).reshape(shape)


@FEW
@given(
    tensors=st.dictionaries(st.text(min_size=1, max_size=8), arrays(), min_size=1, max_size=3),
    form=st.sampled_from(["flat", "nested", "binary"]),
)
def test_any_tensor_arrives_as_it_was_sent(tensors: dict[str, Array], form: str) -> None:
    body, json_length = client_body(tensors, binary=form == "binary", nested=form == "nested")
    request = oip.parse_infer(body, json_length)
    assert [tensor.name for tensor in request.inputs] == list(tensors)
    for tensor in request.inputs:
        sent = tensors[tensor.name]
        assert tensor.shape == tensor.array.shape == sent.shape
        assert tensor.array.dtype == sent.dtype
        assert tensor.array.tobytes() == sent.tobytes()


@FEW
@given(
    outputs=st.dictionaries(st.text(min_size=1, max_size=8), arrays(), min_size=1, max_size=3),
    binary=st.booleans(),
    request_id=st.text(max_size=8),
)
def test_any_result_reads_back_as_it_was_computed(outputs: dict[str, Array], binary: bool, request_id: str) -> None:
    request = parse(request_json(id=request_id, parameters={"binary_data_output": binary}))
    response = oip.encode_infer(request, model_name="m", outputs=outputs)
    document, got = client_result(response)
    assert (response.json_length is not None) == binary
    assert document.get("id", "") == request_id
    assert list(got) == list(outputs)
    for name, array in outputs.items():
        assert got[name].shape == array.shape
        assert got[name].dtype == array.dtype
        assert got[name].tobytes() == array.tobytes()


# Fuzz.


def outcome(act: Callable[[], object]) -> None:
    error: EdgeServeError | None = None
    try:
        act()
    except EdgeServeError as caught:
        error = caught
    assert error is None or (error.status == 400 and "\n" not in error.message)


@FEW
@given(body=st.binary(max_size=200), json_length=st.none() | st.integers(-5, 205))
@example(body=b"\x00", json_length=1)
def test_arbitrary_bytes_are_never_worse_than_a_bad_request(body: bytes, json_length: int | None) -> None:
    outcome(lambda: oip.parse_infer(body, json_length))


def handle(body: bytes, json_length: int | None) -> None:
    model = published()
    request = oip.parse_infer(body, json_length)
    oip.fits(request, model)
    oip.check_outputs(request, model)
    batch = batch_for(request, model, 8)
    logits = np.zeros((len(batch), 4), np.float32)
    oip.encode_infer(request, model_name="m", outputs={"output": logits}, labels=model.labels)


@FEW
@given(data=st.data(), binary=st.booleans())
def test_a_damaged_body_is_never_worse_than_a_bad_request(data: st.DataObject, binary: bool) -> None:
    array = np.arange(6, dtype=np.float32).reshape(1, 2, 3)
    outputs = [{"name": "output", "parameters": {"classification": 2, "binary_data": True}}]
    body, json_length = client_body({"input": array}, binary=binary, id="x", outputs=outputs)
    damaged = bytearray(body)
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(damaged) - 1))
        damaged[at : at + data.draw(st.integers(0, 3))] = data.draw(st.binary(max_size=3))
    outcome(lambda: handle(bytes(damaged), json_length))


anything = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=12,
)


@FEW
@given(data=st.data())
def test_any_value_in_any_place_is_never_worse_than_a_bad_request(data: st.DataObject) -> None:
    document = request_json(
        id="x", parameters={"deadline_ms": 5, "forward": "auto"}, outputs=[{"name": "output", "parameters": {}}]
    )
    value = data.draw(anything)
    place = data.draw(
        st.sampled_from(
            [
                (document, "id"),
                (document, "inputs"),
                (document, "outputs"),
                (document, "parameters"),
                (document["inputs"], 0),
                *((document["inputs"][0], key) for key in ("name", "datatype", "shape", "data", "parameters")),
                (document["inputs"][0]["shape"], 1),
                (document["inputs"][0]["data"], 5),
                (document["outputs"], 0),
                *((document["outputs"][0]["parameters"], key) for key in ("binary_data", "classification")),
                *((document["parameters"], key) for key in ("deadline_ms", "min_accuracy", "forward", "priority")),
            ]
        )
    )
    place[0][place[1]] = value
    outcome(lambda: handle(orjson.dumps(document), None))


# Requests and models.


@pytest.mark.parametrize("binary", [True, False])
@pytest.mark.parametrize("name", ["input", "inputs", "inputsss"])
def test_a_batch_is_contiguous_aligned_native_float32(binary: bool, name: str) -> None:
    model = published(inputs=(TensorSpec(name=name, datatype="FP32", shape=(-1, 2, 3)),))
    array = np.arange(12, dtype=np.float32).reshape(2, 2, 3)
    batch = batch_for(parsed_batch(array, name, binary=binary), model, 2)
    assert batch.dtype == np.float32
    assert batch.dtype.isnative
    assert batch.flags.c_contiguous
    assert batch.flags.aligned
    assert np.array_equal(batch, array)


ZEROS = np.zeros((1, 2, 3), np.float32)

MISFITS: dict[str, tuple[dict[str, Array], list[str]]] = {
    "name": ({"image": ZEROS}, ["'image'", "'input'", "'resnet18'"]),
    "one too many": ({"input": ZEROS, "mask": ZEROS}, ["'mask'", "'input'"]),
    "datatype": ({"input": ZEROS.astype(np.float64)}, ["'input'", "FP32", "not FP64"]),
    "rank": ({"input": np.zeros((2, 3), np.float32)}, ["'input'", "[-1, 2, 3]", "not [2, 3]"]),
    "dimension": ({"input": np.zeros((1, 2, 4), np.float32)}, ["'input'", "[-1, 2, 3]", "not [1, 2, 4]"]),
}


@pytest.mark.parametrize("case", MISFITS)
def test_inputs_that_the_model_does_not_take_are_refused_and_do_not_fit(case: str) -> None:
    tensors, culprits = MISFITS[case]
    request = oip.parse_infer(*client_body(tensors, binary=True))
    assert not oip.fits(request, published())
    message = refusal(lambda: batch_for(request, published(), 8))
    for culprit in culprits:
        assert culprit in message


def test_a_request_fits_the_member_of_its_shape() -> None:
    large = published(inputs=(TensorSpec(name="input", datatype="FP32", shape=(-1, 4, 6)),))
    request = parsed_batch(np.zeros((3, 4, 6), np.float32))
    assert [oip.fits(request, model) for model in (published(), large)] == [False, True]


def test_a_batch_over_the_limit_is_refused() -> None:
    request = parsed_batch(np.zeros((5, 2, 3), np.float32))
    assert batch_for(request, published(), 5).shape == (5, 2, 3)
    message = refusal(lambda: batch_for(request, published(), 4))
    assert "'input'" in message
    assert "1..4, not 5" in message


def test_a_model_without_batch_dimension_has_no_batch_limit() -> None:
    model = published(inputs=(TensorSpec(name="input", datatype="FP32", shape=(5, 2)),))
    assert batch_for(parsed_batch(np.zeros((5, 2), np.float32)), model, 1).shape == (5, 2)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_numbers_that_are_not_finite_are_refused(bad: float) -> None:
    array = np.zeros((2, 2, 3), np.float32)
    array[1, 1, 1] = bad
    assert "'input'" in refusal(lambda: batch_for(parsed_batch(array), published(), 8))


def test_infinities_that_cancel_are_refused() -> None:
    array = np.array([[[math.inf, -math.inf, 0], [0, 0, 0]]], np.float32)
    assert "finite" in refusal(lambda: batch_for(parsed_batch(array), published(), 8))


def test_large_finite_numbers_whose_sum_overflows_are_taken() -> None:
    array = np.full((1, 2, 3), np.finfo(np.float32).max, np.float32)
    assert np.array_equal(batch_for(parsed_batch(array), published(), 8), array)


STATEFUL = published(
    inputs=(
        TensorSpec(name="input", datatype="FP32", shape=(-1, 2)),
        TensorSpec(name="state", datatype="FP32", shape=(2, -1, 3), axes=("", "batch", ""), default=0.0),
        TensorSpec(name="rate", datatype="INT64", shape=(), default=16000.0),
        TensorSpec(name="text", datatype="BYTES", shape=(-1, -1), axes=("batch", "words")),
    )
)


def test_a_model_gets_each_of_its_inputs_by_name_whatever_their_order() -> None:
    sent = {
        "text": np.array([[b"a", b"bc"], [b"", b"d"]], object),
        "input": np.ones((2, 2), np.float32),
        "rate": np.array(8000, np.int64),
    }
    for binary in (True, False):
        tensors = oip.tensors_for(oip.parse_infer(*client_body(sent, binary=binary)), STATEFUL, 8)
        assert tensors.keys() == sent.keys(), "what has a default may be left out"
        for name, array in sent.items():
            assert np.array_equal(tensors[name], array)
            assert tensors[name].dtype == array.dtype


@pytest.mark.parametrize(
    ("left_out", "changed", "culprits"),
    [
        ("text", {}, ["'text'", "missing"]),
        ("", {"text": np.array([[b"a"]], object)}, ["'batch'", "'text'", "must be 2", "not 1"]),
        ("", {"state": np.zeros((2, 3, 3), np.float32)}, ["'batch'", "'state'", "must be 2", "not 3"]),
        ("", {"text": np.full((2, 9), b"a", object)}, ["'words'", "'text'", "1..8", "not 9"]),
        ("", {"rate": np.zeros((1,), np.int64)}, ["'rate'", "[]", "not [1]"]),
    ],
)
def test_inputs_that_contradict_each_other_or_the_limits_are_refused(
    left_out: str, changed: dict[str, Array], culprits: list[str]
) -> None:
    sent = {"input": np.ones((2, 2), np.float32), "text": np.full((2, 1), b"a", object)} | changed
    sent.pop(left_out, None)
    message = refusal(lambda: oip.tensors_for(oip.parse_infer(*client_body(sent, binary=True)), STATEFUL, 8))
    for culprit in culprits:
        assert culprit in message


def test_bfloat16_arrives_as_the_same_numbers() -> None:
    numbers = np.array([1.0, -2.5, 0.15625], np.float32)
    raw = (numbers.view(np.uint32) >> 16).astype("<u2").tobytes()
    assert oip.tensor_from_binary("x", "BF16", (3,), raw).array.tolist() == numbers.tolist()


@pytest.mark.parametrize(
    ("raw", "culprits"),
    [
        (b"\x05\x00\x00\x00ab", ["element 0", "5 bytes", "2 are left"]),
        (b"\x01\x00\x00\x00a", ["2 elements", "there are 1"]),
        (b"\x00\x00\x00\x00" * 3, ["2 elements", "8 of 12 bytes"]),
    ],
)
def test_texts_whose_lengths_do_not_add_up_are_refused(raw: bytes, culprits: list[str]) -> None:
    message = refusal(lambda: oip.tensor_from_binary("x", "BYTES", (2,), raw))
    for culprit in culprits:
        assert culprit in message


def test_texts_come_out_as_bytes_tensors() -> None:
    texts = np.array(["a", "zürich"], object)
    request = parse(request_json(parameters={"binary_data_output": True}))
    encoded = oip.encode_infer(request, model_name="m", outputs={"label": texts})
    header, tail = json.loads(encoded.body[: encoded.json_length]), encoded.body[encoded.json_length :]
    assert header["outputs"][0]["datatype"] == "BYTES"
    assert tail == b"\x01\x00\x00\x00a\x07\x00\x00\x00z\xc3\xbcrich"


def test_an_output_that_the_model_lacks_is_refused_before_and_after_inference() -> None:
    request = parse(request_json(outputs=[{"name": "logits"}]))
    for message in (
        refusal(lambda: oip.check_outputs(request, published())),
        refusal(lambda: oip.encode_infer(request, model_name="m", outputs={"output": np.zeros((1, 4), np.float32)})),
    ):
        assert "'logits'" in message
        assert "'output'" in message


def test_outputs_that_the_model_has_are_accepted() -> None:
    oip.check_outputs(parse(request_json()), published())
    oip.check_outputs(
        parse(request_json(outputs=[{"name": "output", "parameters": {"classification": 3}}])), published()
    )


def test_classes_of_an_output_without_classes_are_refused() -> None:
    model = published(outputs=(TensorSpec(name="mask", datatype="FP32", shape=(-1, 8, 8)),))
    request = parse(request_json(outputs=[{"name": "mask", "parameters": {"classification": 3}}]))
    assert "'mask'" in refusal(lambda: oip.check_outputs(request, model))


# Responses.


def test_a_response_says_what_answered() -> None:
    logits = np.array([[0.1, 2, -3, 1e-30]], np.float32)
    response = oip.encode_infer(
        parse(request_json(id="r1")), model_name="resnet18", outputs={"output": logits}, parameters={"outcome": "hit"}
    )
    document = json.loads(response.body)
    data = document["outputs"][0].pop("data")
    assert document == {
        "model_name": "resnet18",
        "model_version": "1",
        "id": "r1",
        "parameters": {"outcome": "hit"},
        "outputs": [{"name": "output", "datatype": "FP32", "shape": [1, 4]}],
    }
    assert np.array_equal(np.array(data, np.float32), logits[0])
    assert response.headers == {"Content-Type": "application/json"}


def test_a_binary_response_carries_its_header_length() -> None:
    response = oip.encode_infer(
        parse(request_json(parameters={"binary_data_output": True})), model_name="m", outputs={"output": ZEROS}
    )
    assert response.headers == {
        "Content-Type": "application/octet-stream",
        "Inference-Header-Content-Length": str(len(response.body) - ZEROS.nbytes),
    }


def test_outputs_come_in_the_order_and_form_asked_for() -> None:
    request = parse(request_json(outputs=[{"name": "b", "parameters": {"binary_data": True}}, {"name": "a"}]))
    computed: dict[str, Array] = {
        "a": np.array([1.5], np.float32),
        "b": np.array([7], np.int64),
        "c": np.array([0], np.int8),
    }
    document, got = client_result(oip.encode_infer(request, model_name="m", outputs=computed))
    assert [("data" in output) for output in document["outputs"]] == [False, True]
    assert {name: array.tolist() for name, array in got.items()} == {"b": [7], "a": [1.5]}


@pytest.mark.parametrize("binary", [True, False])
def test_foreign_byte_order_and_strides_do_not_change_the_numbers(binary: bool) -> None:
    array = np.arange(12, dtype=">f4").reshape(3, 4).T
    request = parse(request_json(parameters={"binary_data_output": binary}))
    _, got = client_result(oip.encode_infer(request, model_name="m", outputs={"output": array}))
    assert np.array_equal(got["output"], array)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_result_that_json_cannot_carry_is_refused_but_binary_carries_it(bad: float) -> None:
    outputs: dict[str, Array] = {"output": np.array([[1, bad]], np.float32)}
    message = refusal(lambda: oip.encode_infer(parse(request_json()), model_name="m", outputs=outputs))
    assert "'output'" in message
    assert "binary_data" in message
    request = parse(request_json(parameters={"binary_data_output": True}))
    _, got = client_result(oip.encode_infer(request, model_name="m", outputs=outputs))
    assert np.array_equal(got["output"], outputs["output"], equal_nan=True)


def test_classes_are_ranked_and_named_per_row() -> None:
    request = parse(request_json(outputs=[{"name": "output", "parameters": {"classification": 2}}]))
    logits = np.array([[0.25, 4, -1, 2], [9, 0, 0, 0]], np.float32)
    response = oip.encode_infer(request, model_name="m", outputs={"output": logits}, labels=("cat", "dog"))
    (output,) = json.loads(response.body)["outputs"]
    assert (output["datatype"], output["shape"]) == ("BYTES", [2, 2])
    assert output["data"] == ["4.000000:1:dog", "2.000000:3", "9.000000:0:cat", "0.000000:1:dog"]


def test_binary_classes_are_length_prefixed_and_never_more_than_there_are() -> None:
    parameters = {"classification": 99, "binary_data": True}
    request = parse(request_json(outputs=[{"name": "output", "parameters": parameters}]))
    response = oip.encode_infer(request, model_name="m", outputs={"output": np.array([[1, 3]], np.float32)})
    assert response.json_length is not None
    (output,) = json.loads(response.body[: response.json_length])["outputs"]
    assert output["shape"] == [1, 2]
    texts = [b"3.000000:1", b"1.000000:0"]
    tail = b"".join(struct.pack("<I", len(text)) + text for text in texts)
    assert response.body[response.json_length :] == tail
    assert output["parameters"] == {"binary_data_size": len(tail)}


def test_an_array_without_protocol_datatype_is_an_error_in_the_caller() -> None:
    with pytest.raises(ValueError, match="complex64"):
        oip.datatype_of(np.zeros(1, np.complex64))


# Metadata.


@pytest.mark.parametrize("version", [None, "", "1"])
def test_the_single_version_exists(version: str | None) -> None:
    oip.check_version(version)


@pytest.mark.parametrize("version", ["2", "01", "latest", "1\n"])
def test_other_versions_are_not_found(version: str) -> None:
    with pytest.raises(NotFound) as caught:
        oip.check_version(version)
    assert repr(version) in caught.value.message


def test_metadata_describe_the_model() -> None:
    metadata = oip.model_metadata(published())
    assert orjson.loads(orjson.dumps(metadata)) == {
        "name": "resnet18",
        "versions": ["1"],
        "platform": "pytorch_eager",
        "inputs": [{"name": "input", "datatype": "FP32", "shape": [-1, 2, 3]}],
        "outputs": [{"name": "output", "datatype": "FP32", "shape": [-1, 4]}],
        "parameters": {
            "family": "imagenet",
            "accuracy": 0.7,
            "weights": {"requested": "pretrained", "actual": "pretrained"},
            "size_bytes": 12,
            "workspace_bytes": 2,
            "runtime": "torch",
            "form": "mapped",
            "precision": "float32",
            "task": "image-classification",
            "labels_count": 4,
            "axes": {"batch": [1, 8]},
            "values": {},
            "stateful": {},
            "optional": [],
        },
    }


def test_metadata_and_header_name_the_library_and_the_precision() -> None:
    model = replace(published(), runtime="openvino", dtype="bfloat16")
    parameters = oip.model_metadata(model)["parameters"]
    assert (parameters["form"], parameters["precision"]) == ("openvino", "bfloat16")
    response = InferenceResponse(
        model=published(), form=model.form, location="paris", outcome=Outcome.HIT, outputs={}, answer=None, queue_s=0,
        load_s=0, decode_s=0, exec_s=0, forward_s=0,
    )  # fmt: skip
    assert outcome_headers(response)["X-EdgeServe-Form"] == "openvino; precision=bfloat16"
    assert outcome_headers(replace(response, form="mapped"))["X-EdgeServe-Form"] == "mapped; precision=float32"


def test_metadata_warn_of_fallback_weights() -> None:
    weights = oip.model_metadata(published(weights_actual="random:0"))["parameters"]["weights"]
    assert weights["actual"] == "random:0"
    assert "'random:0'" in weights["warning"]
    assert "'pretrained'" in weights["warning"]


def test_server_metadata_name_the_extensions() -> None:
    metadata = oip.server_metadata("edgeserve", "0.1.0")
    assert metadata == {"name": "edgeserve", "version": "0.1.0", "extensions": ["binary_tensor_data", "classification"]}
