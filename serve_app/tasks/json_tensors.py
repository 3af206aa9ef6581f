"""Task ``tensors``: JSON in and out, for models of numbers such as those of a table.

The body is an object of nested lists by the names of the inputs, or the list alone if the model has one input. The
axis of the batch may be left out.
"""

from __future__ import annotations

import json
from typing import Any

import numpy as np
from numpy.typing import NDArray

from serve_app.core.contract import BATCH, TensorSpec
from serve_app.errors import InvalidRequest
from serve_app.tasks.base import RawInput, Solution, TaskModel
from serve_app.tasks.classes import label_of
from serve_app.tasks.tensors import NUMPY_TYPES


def solve(raw: RawInput, model: TaskModel) -> Solution:
    """The task; an output of whole numbers, one a row, is answered with labels as well if the model has them."""
    given = _read(raw.data, model)
    inputs = {spec.name: _array(given[spec.name], spec) for spec in model.contract.inputs if spec.name in given}
    outputs = yield inputs
    answer: dict[str, Any] = {"outputs": {spec.name: _plain(outputs[spec.name]) for spec in model.contract.outputs}}
    classes = next((outputs[spec.name] for spec in model.contract.outputs if spec.datatype.startswith("INT")), None)
    if model.task.labels and classes is not None and classes.ndim == 1:
        answer["labels"] = [label_of(int(index), model.task.labels) for index in classes]
    return answer


def _read(data: bytes, model: TaskModel) -> dict[str, Any]:
    """Return what the body says for each input."""
    names = [spec.name for spec in model.contract.inputs]
    example = "{" + ", ".join(f'"{name}": [...]' for name in names) + "}"
    try:
        content = json.loads(data, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise InvalidRequest(f"the body is not JSON ({error}); send {example}") from error
    if isinstance(content, list) and len(names) == 1:
        content = {names[0]: content}
    if not isinstance(content, dict):
        raise InvalidRequest(f"the body is a JSON {type(content).__name__}; send {example}")
    unknown = next((name for name in content if name not in names), None)
    if unknown is not None:
        raise InvalidRequest(f"the model has no input {unknown[:64]!r}; its inputs are {', '.join(names)}")
    for spec in model.contract.inputs:
        if spec.name not in content and spec.default is None:
            raise InvalidRequest(f"input {spec.name!r} is missing; send {example}")
    return content


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is no number of JSON")


def _array(value: Any, spec: TensorSpec) -> NDArray[Any]:
    """Return nested lists as an array of the type of an input."""
    dtype = NUMPY_TYPES[spec.datatype]
    wanted = f"{spec.datatype} of shape {list(spec.shape)}"
    try:
        # As objects texts stay as they are; numpy's own would each take the memory of the longest.
        array = np.array(value, np.object_ if dtype.hasobject else None)
    except ValueError as error:
        raise InvalidRequest(f"input {spec.name!r} takes {wanted}; the lists given have different lengths") from error
    if dtype.hasobject:
        flat = [_text(item, spec, wanted) for item in array.flat]
        array = np.array([*flat, None], np.object_)[:-1].reshape(array.shape)
    else:
        array = _numbers(array, spec, wanted)
    if array.ndim == len(spec.shape) - 1 and spec.axes[:1] == (BATCH,):
        array = array[None]
    return array


def _text(item: Any, spec: TensorSpec, wanted: str) -> bytes:
    if isinstance(item, list):
        raise InvalidRequest(f"input {spec.name!r} takes {wanted}; the lists given have different lengths")
    if not isinstance(item, str):
        raise InvalidRequest(f"input {spec.name!r} takes {wanted}; send strings")
    try:
        return item.encode()
    except UnicodeEncodeError as error:
        raise InvalidRequest(f"input {spec.name!r} takes {wanted}; half of a surrogate pair is no character") from error


def _numbers(array: NDArray[Any], spec: TensorSpec, wanted: str) -> NDArray[Any]:
    dtype = NUMPY_TYPES[spec.datatype]
    if array.dtype.kind not in "iufb" or (array.dtype.kind == "b") != (dtype.kind == "b"):
        raise InvalidRequest(f"input {spec.name!r} takes {wanted}; what was given is not all of that type")
    if dtype.kind in "iu":
        limits = np.iinfo(dtype)
        if array.dtype.kind == "f" or (array.size and not limits.min <= array.min() <= array.max() <= limits.max):
            raise InvalidRequest(f"input {spec.name!r} takes {wanted}; send whole numbers in its range")
        return array.astype(dtype)
    with np.errstate(over="ignore"):
        converted = array.astype(dtype)
    if converted.dtype.kind == "f" and not np.isfinite(converted).all():
        raise InvalidRequest(f"input {spec.name!r} takes {wanted}; a number is too large for it")
    return converted


def _plain(array: NDArray[Any]) -> Any:
    """Return an array as nested lists that JSON can carry; numbers that are not finite become null."""
    if array.dtype.hasobject or array.dtype.kind in "SU":
        texts = [item.decode("utf-8", "replace") if isinstance(item, bytes) else str(item) for item in array.flat]
        return np.array([*texts, None], np.object_)[:-1].reshape(array.shape).tolist()
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        return np.where(np.isfinite(array), array.astype(np.object_), np.array(None)).tolist()
    return array.tolist()
