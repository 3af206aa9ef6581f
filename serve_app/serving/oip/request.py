"""Inference requests of the Open Inference Protocol: strict parsing, and conversion to the inputs of a model."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any, Final, cast

import numpy as np
import orjson

from serve_app.core.catalog import PublishedModel
from serve_app.core.contract import BATCH, TensorSpec
from serve_app.errors import InvalidRequest
from serve_app.serving.oip.options import RequestOptions
from serve_app.serving.oip.tensors import (
    InputTensor,
    checked_datatype,
    checked_shape,
    describe,
    tensor_from_binary,
    tensor_from_json,
)
from serve_app.tasks.tensors import NUMPY_TYPES, Tensors

MAX_REQUEST_ID: Final = 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestedOutput:
    """One output that the client requests.

    Attributes:
        name: the output.
        binary: as raw bytes rather than as JSON.
        classification: number of best classes to return; 0 for the tensor itself.
    """

    name: str
    binary: bool
    classification: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class InferRequest:
    """A well-formed request; ``tensors_for`` and ``check_outputs`` check it against a model.

    Without ``outputs`` the client requests all outputs of the model, in binary if ``binary_output_default``.
    """

    request_id: str
    inputs: tuple[InputTensor, ...]
    outputs: tuple[RequestedOutput, ...]
    binary_output_default: bool
    options: RequestOptions


def parse_json_length(header: str | None) -> int | None:
    """Parse ``Inference-Header-Content-Length``; None without the header, when the body is JSON alone.

    Raises:
        InvalidRequest: it is not a whole number.
    """
    if header is None:
        return None
    if re.fullmatch(r"[0-9]{1,18}", header) is None:
        raise InvalidRequest(
            f"Inference-Header-Content-Length must be the number of bytes of the JSON part, not {describe(header)}"
        )
    return int(header)


def parse_infer(body: bytes | bytearray | memoryview, json_length: int | None) -> InferRequest:
    """Parse an inference request; binary tensors are views of ``body``, which must not change while they live.

    Args:
        body: the JSON part, followed by the binary data of the inputs in their order.
        json_length: bytes of the JSON part; None if the body is JSON alone.

    Raises:
        InvalidRequest: any part of the request is malformed.
    """
    view = memoryview(body)
    if not view:
        raise InvalidRequest("the request has no body; it must be a JSON object with inputs")
    if json_length is not None and not 0 < json_length <= len(view):
        raise InvalidRequest(
            f"Inference-Header-Content-Length must lie in 1..{len(view)}, the size of the body, not {json_length}"
        )
    document = _load_object(view[:json_length])
    parameters = _parameters(document, "the request")
    binary_default = _flag(parameters, "binary_data_output", default=False, owner="the request")
    return InferRequest(
        request_id=_request_id(document),
        inputs=_inputs(document, view[len(view) if json_length is None else json_length :]),
        outputs=_outputs(document, binary_default),
        binary_output_default=binary_default,
        options=RequestOptions.from_parameters(parameters),
    )


def tensors_for(request: InferRequest, model: PublishedModel, max_batch: int) -> Tensors:
    """Return the inputs of ``model`` as aligned, C-contiguous arrays in native byte order, by name.

    An array may be a read-only view of the request. Inputs that have a default may be missing.

    Raises:
        InvalidRequest: the model takes another name, datatype, shape or batch size, or a number is not finite.
    """
    if (mismatch := _mismatch(request, model)) is not None:
        raise InvalidRequest(mismatch)
    tensors: dict[str, np.ndarray[Any, Any]] = {}
    for tensor in request.inputs:
        spec = model.contract.input(tensor.name)
        assert spec is not None
        if BATCH in spec.axes and (rows := tensor.shape[spec.axes.index(BATCH)]) > max_batch:
            raise InvalidRequest(f"batch of input {tensor.name!r} must be 1..{max_batch}, not {rows}")
        array = np.require(tensor.array, NUMPY_TYPES[spec.datatype], ["C_CONTIGUOUS", "ALIGNED"])
        if array.dtype.kind == "f" and not _all_finite(array):
            raise InvalidRequest(f"input {tensor.name!r} must hold finite numbers only, but has NaN or Infinity")
        tensors[tensor.name] = array
    return tensors


def fits(request: InferRequest, model: PublishedModel) -> bool:
    """Return whether ``model`` takes inputs of these names, datatypes and shapes: chooses among members of a family."""
    return _mismatch(request, model) is None


def check_outputs(request: InferRequest, model: PublishedModel) -> None:
    """Make sure, before anything runs, that ``model`` has the outputs that the request names.

    Raises:
        InvalidRequest: there is no such output, or it cannot be ranked into classes.
    """
    specs = {spec.name: spec for spec in model.outputs}
    for output in request.outputs:
        spec = specs.get(output.name)
        if spec is None:
            raise InvalidRequest(
                f"model {model.model_id!r} has no output {describe(output.name)}; it has {_names(model.outputs)}"
            )
        if output.classification and len(spec.shape) != 2:
            raise InvalidRequest(f"output {output.name!r} has no classes to rank: its shape is {list(spec.shape)}")


def _load_object(header: memoryview) -> dict[str, Any]:
    try:
        document = orjson.loads(header)
    except orjson.JSONDecodeError as error:
        near = bytes(header[max(0, error.pos - 1) : error.pos + 4])
        hint = "; JSON has neither NaN nor Infinity" if b"NaN" in near or b"Inf" in near else ""
        raise InvalidRequest(
            f"the request is not valid JSON: {error.msg} at line {error.lineno}, column {error.colno}{hint}"
        ) from None
    if type(document) is not dict:
        raise InvalidRequest(f"the request must be a JSON object, not {describe(document)}")
    return document


def _request_id(document: dict[str, Any]) -> str:
    request_id = document.get("id", "")
    if type(request_id) is not str:
        raise InvalidRequest(f"id must be a string, not {describe(request_id)}")
    if len(request_id) > MAX_REQUEST_ID:
        raise InvalidRequest(f"id must have at most {MAX_REQUEST_ID} characters, not {len(request_id)}")
    return request_id


def _parameters(item: dict[str, Any], owner: str) -> dict[str, Any]:
    parameters = item.get("parameters", {})
    if type(parameters) is not dict:
        raise InvalidRequest(f"parameters of {owner} must be an object, not {describe(parameters)}")
    return parameters


def _flag(parameters: dict[str, Any], key: str, *, default: bool, owner: str) -> bool:
    value = parameters.get(key, default)
    if type(value) is not bool:
        raise InvalidRequest(f"{key} of {owner} must be true or false, not {describe(value)}")
    return value


def _named_objects(items: object, key: str) -> list[tuple[str, dict[str, Any], dict[str, Any]]]:
    """Return name, object and parameters of each entry of the list ``key`` of the request."""
    if type(items) is not list:
        raise InvalidRequest(f"{key} of the request must be a list of tensors, not {describe(items)}")
    entries: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {}
    for index, item in enumerate(items):
        if type(item) is not dict:
            raise InvalidRequest(f"{key}[{index}] must be an object, not {describe(item)}")
        name = item.get("name")
        if type(name) is not str or not name:
            raise InvalidRequest(f"name of {key}[{index}] must be a non-empty string, not {describe(name)}")
        if name in entries:
            raise InvalidRequest(f"{key} must have different names, but {describe(name)} is there twice")
        parameters = _parameters(item, f"tensor {describe(name)}")
        if "shared_memory_region" in parameters:
            raise InvalidRequest(f"shared_memory_region of tensor {describe(name)} is not supported; send the data")
        entries[name] = (name, item, parameters)
    return list(entries.values())


def _inputs(document: dict[str, Any], binary: memoryview) -> tuple[InputTensor, ...]:
    if "inputs" not in document:
        raise InvalidRequest("the request has no 'inputs'; it must have a list of tensors")
    entries = _named_objects(document["inputs"], "inputs")
    if not entries:
        raise InvalidRequest("inputs of the request must not be empty")
    tensors = []
    used = 0
    for name, item, parameters in entries:
        if "binary_data_size" in parameters:
            size = _binary_size(item, parameters["binary_data_size"], name, len(binary) - used)
            tensors.append(_input(name, item, binary[used : used + size]))
            used += size
        else:
            tensors.append(_input(name, item, None))
    if used != len(binary):
        raise InvalidRequest(
            f"{len(binary)} bytes follow the JSON part, but binary_data_size of the inputs add up to {used}"
        )
    return tuple(tensors)


def _input(name: str, item: dict[str, Any], raw: memoryview | None) -> InputTensor:
    shape = checked_shape(item.get("shape"), name)
    datatype = item.get("datatype")
    checked_datatype(datatype, name)
    if raw is not None:
        return tensor_from_binary(name, cast(str, datatype), shape, raw)
    if "data" not in item:
        raise InvalidRequest(f"tensor {describe(name)} must have either data or the parameter binary_data_size")
    return tensor_from_json(name, cast(str, datatype), shape, item["data"])


def _binary_size(item: dict[str, Any], size: object, name: str, left: int) -> int:
    if type(size) is not int or size < 0:
        raise InvalidRequest(
            f"binary_data_size of tensor {describe(name)} must be a number of bytes, not {describe(size)}"
        )
    if "data" in item:
        raise InvalidRequest(f"tensor {describe(name)} must have either data or binary_data_size, not both")
    if size > left:
        raise InvalidRequest(
            f"binary_data_size of tensor {describe(name)} is {size}, but only {left} bytes are left behind the JSON"
            " part, whose length Inference-Header-Content-Length gives"
        )
    return size


def _outputs(document: dict[str, Any], binary_default: bool) -> tuple[RequestedOutput, ...]:
    outputs = []
    for name, _, parameters in _named_objects(document.get("outputs", []), "outputs"):
        owner = f"output {describe(name)}"
        classes = parameters.get("classification", 0)
        if type(classes) is not int or ("classification" in parameters and classes < 1):
            raise InvalidRequest(f"classification of {owner} must be a positive whole number, not {describe(classes)}")
        binary = _flag(parameters, "binary_data", default=binary_default, owner=owner)
        outputs.append(RequestedOutput(name=name, binary=binary, classification=classes))
    return tuple(outputs)


def _mismatch(request: InferRequest, model: PublishedModel) -> str | None:
    """Return how the inputs of the request differ from those of the model; None if they do not."""
    given = {tensor.name for tensor in request.inputs}
    for tensor in request.inputs:
        spec = model.contract.input(tensor.name)
        if spec is None:
            return f"model {model.model_id!r} has no input {describe(tensor.name)}; it takes {_names(model.inputs)}"
        if tensor.datatype != spec.datatype:
            return (
                f"input {spec.name!r} of model {model.model_id!r} takes datatype {spec.datatype}, not {tensor.datatype}"
            )
    for spec in model.inputs:
        if spec.name not in given and spec.default is None:
            return f"input {spec.name!r} of model {model.model_id!r} is missing; it takes {_names(model.inputs)}"
    try:
        model.contract.sizes({tensor.name: tensor.shape for tensor in request.inputs})
    except InvalidRequest as error:
        return f"{error} (model {model.model_id!r})"
    return None


def _names(specs: tuple[TensorSpec, ...]) -> str:
    return ", ".join(repr(spec.name) for spec in specs)


def _all_finite(batch: np.ndarray[Any, Any]) -> bool:
    # NaN and Infinity survive a sum, so that one pass settles the common case; large finite numbers may overflow it.
    with np.errstate(over="ignore", invalid="ignore"):
        if math.isfinite(float(batch.sum())):
            return True
    return bool(np.isfinite(batch).all())
