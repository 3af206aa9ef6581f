"""Responses of the Open Inference Protocol: results of inference in JSON and binary, and metadata."""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import orjson

from serve_app.core.catalog import PublishedModel
from serve_app.core.contract import TensorSpec
from serve_app.core.precision import parts_of_form
from serve_app.errors import InvalidRequest, NotFound
from serve_app.serving.oip.request import InferRequest, RequestedOutput
from serve_app.serving.oip.tensors import DTYPES, datatype_of, describe

VERSION: Final = "1"
#: The names of platforms in metadata, by runtime.
PLATFORMS: Final = {"torch": "pytorch_eager", "onnxruntime": "onnxruntime_onnx", "openvino": "openvino_ir"}
JSON_LENGTH_HEADER: Final = "Inference-Header-Content-Length"
EXTENSIONS: Final = ("binary_tensor_data", "classification")


@dataclass(frozen=True, slots=True, kw_only=True)
class EncodedResponse:
    """A response body; ``json_length`` is the size of its JSON part in bytes, None if the body is JSON alone."""

    body: bytes
    json_length: int | None

    @property
    def headers(self) -> dict[str, str]:
        """The HTTP headers that describe the body."""
        if self.json_length is None:
            return {"Content-Type": "application/json"}
        return {"Content-Type": "application/octet-stream", JSON_LENGTH_HEADER: str(self.json_length)}


def check_version(version: str | None, versions: Sequence[str] = (VERSION,)) -> None:
    """Make sure that the version in a request exists; None and the empty string mean any version.

    Raises:
        NotFound: it is none of ``versions``.
    """
    if version and version not in versions:
        raise NotFound(f"there is no version {describe(version)}; there is {', '.join(map(repr, versions))}")


def encode_infer(
    request: InferRequest,
    *,
    model_name: str,
    outputs: Mapping[str, np.ndarray[Any, Any]],
    version: str = VERSION,
    parameters: Mapping[str, str | float | bool] | None = None,
    labels: Sequence[str] = (),
) -> EncodedResponse:
    """Encode the outputs that ``request`` names: each in JSON or binary, as a tensor or as its best classes.

    Numbers in JSON are flat, row-major, and as short as reads back to the same float.

    Raises:
        InvalidRequest: a requested output does not exist, or its JSON would need NaN or Infinity. Finite but extreme
            inputs cause these, hence a client error; binary data carry them unchanged.
    """
    wanted = request.outputs or tuple(
        RequestedOutput(name=name, binary=request.binary_output_default) for name in outputs
    )
    described: list[dict[str, Any]] = []
    chunks: list[bytes] = []
    for output in wanted:
        if output.name not in outputs:
            raise InvalidRequest(
                f"there is no output {describe(output.name)}; there is {', '.join(map(repr, outputs))}"
            )
        header, binary = _encode_output(output, outputs[output.name], labels)
        described.append(header)
        if output.binary:
            chunks.append(binary)
    document: dict[str, Any] = {"model_name": model_name, "model_version": version}
    if request.request_id:
        document["id"] = request.request_id
    if parameters:
        document["parameters"] = dict(parameters)
    document["outputs"] = described
    head = orjson.dumps(document, option=orjson.OPT_SERIALIZE_NUMPY)
    if not chunks:
        return EncodedResponse(body=head, json_length=None)
    return EncodedResponse(body=b"".join((head, *chunks)), json_length=len(head))


def model_metadata(model: PublishedModel, versions: Sequence[str] = (VERSION,)) -> dict[str, Any]:
    """Return the metadata of a model by the protocol; what the protocol does not define is under ``parameters``."""
    weights: dict[str, Any] = {"requested": model.weights_requested, "actual": model.weights_actual}
    if model.fallback:
        weights["warning"] = (
            f"this model runs on {model.weights_actual!r} weights, because {model.weights_requested!r} could not be"
            " had: its answers mean nothing until it is published again"
        )
    return {
        "name": model.name,
        "versions": list(versions),
        "platform": PLATFORMS[model.runtime],
        "inputs": [_tensor_metadata(spec) for spec in model.inputs],
        "outputs": [_tensor_metadata(spec) for spec in model.outputs],
        "parameters": {
            "family": model.family,
            "accuracy": model.profile.accuracy,
            "weights": weights,
            "size_bytes": model.profile.size_bytes,
            "workspace_bytes": model.workspace_bytes,
            "runtime": model.runtime,
            "form": parts_of_form(model.form)[0],
            "precision": model.dtype,
            "task": model.task.kind,
            "labels_count": len(model.labels),
            "axes": {axis.name: [axis.least, axis.most] for axis in model.contract.axes},
            "values": {
                spec.name: [spec.values.least, spec.values.most] for spec in model.inputs if spec.values is not None
            },
            "stateful": {spec.name: spec.returned_by for spec in model.inputs if spec.returned_by},
            "optional": [spec.name for spec in model.inputs if spec.default is not None],
        },
    }


def server_metadata(name: str, version: str, extensions: Sequence[str] = EXTENSIONS) -> dict[str, Any]:
    """Return the metadata of the server: its name, its version, and the protocol extensions that it implements."""
    return {"name": name, "version": version, "extensions": list(extensions)}


def _encode_output(
    output: RequestedOutput, array: np.ndarray[Any, Any], labels: Sequence[str]
) -> tuple[dict[str, Any], bytes]:
    """Return the JSON description of one output, and its bytes if the client requested binary data."""
    if output.classification:
        return _encode_classes(output, array, labels)
    datatype = datatype_of(array)
    header: dict[str, Any] = {"name": output.name, "datatype": datatype, "shape": array.shape}
    if datatype == "BYTES":
        return _encode_texts(header, [_as_text(item) for item in array.flat], binary=output.binary)
    if output.binary:
        binary = array.astype(DTYPES[datatype], copy=False).tobytes()
        header["parameters"] = {"binary_data_size": len(binary)}
        return header, binary
    _check_finite(output.name, array)
    # orjson takes C-contiguous arrays in native byte order only.
    header["data"] = np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("=")).reshape(-1)
    return header, b""


def _encode_classes(
    output: RequestedOutput, array: np.ndarray[Any, Any], labels: Sequence[str]
) -> tuple[dict[str, Any], bytes]:
    """Encode the best classes of each row as strings ``value:index[:label]``, best first."""
    _check_finite(output.name, array)
    rows = array.reshape(len(array), -1)
    best = np.argsort(-rows.astype(np.float64), axis=1, kind="stable")[:, : output.classification]
    texts = [
        f"{rows[row, index]:f}:{index}" + (f":{labels[index]}" if index < len(labels) else "")
        for row in range(len(best))
        for index in best[row].tolist()
    ]
    return _encode_texts({"name": output.name, "datatype": "BYTES", "shape": best.shape}, texts, binary=output.binary)


def _encode_texts(header: dict[str, Any], texts: Sequence[str], *, binary: bool) -> tuple[dict[str, Any], bytes]:
    """Complete the description of a BYTES tensor: each element is its length, as four bytes, and its bytes."""
    if not binary:
        header["data"] = texts
        return header, b""
    encoded = [text.encode() for text in texts]
    content = b"".join(struct.pack("<I", len(text)) + text for text in encoded)
    header["parameters"] = {"binary_data_size": len(content)}
    return header, content


def _as_text(item: object) -> str:
    return item.decode("utf-8", "replace") if isinstance(item, bytes) else str(item)


def _check_finite(name: str, array: np.ndarray[Any, Any]) -> None:
    if not np.isfinite(array).all():
        raise InvalidRequest(
            f"output {name!r} came out as NaN or Infinity, which JSON cannot carry; send smaller numbers, or ask for"
            " binary_data"
        )


def _tensor_metadata(spec: TensorSpec) -> dict[str, Any]:
    return {"name": spec.name, "datatype": spec.datatype, "shape": list(spec.shape)}
