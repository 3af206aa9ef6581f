"""Tensors of the Open Inference Protocol: datatypes, shapes, and their numbers as JSON or as binary data."""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from itertools import chain
from typing import Any, Final

import numpy as np

from serve_app.core.contract import DATATYPES
from serve_app.errors import InvalidRequest
from serve_app.tasks.tensors import NUMPY_TYPES

MAX_RANK: Final = 32
_LENGTH: Final = struct.Struct("<I")
_MAX_ELEMENTS: Final = 2**62
_SHOWN_CHARACTERS: Final = 64

# On the wire binary data are little-endian, row-major and without padding.
DTYPES: Final[dict[str, np.dtype[Any]]] = {
    "BOOL": np.dtype(np.bool_),
    "UINT8": np.dtype("<u1"),
    "UINT16": np.dtype("<u2"),
    "UINT32": np.dtype("<u4"),
    "UINT64": np.dtype("<u8"),
    "INT8": np.dtype("<i1"),
    "INT16": np.dtype("<i2"),
    "INT32": np.dtype("<i4"),
    "INT64": np.dtype("<i8"),
    "FP16": np.dtype("<f2"),
    "FP32": np.dtype("<f4"),
    "FP64": np.dtype("<f8"),
}
_DATATYPES: Final = {(dtype.kind, dtype.itemsize): datatype for datatype, dtype in DTYPES.items()}


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class InputTensor:
    """A named input tensor; ``array`` has ``shape`` and may be a read-only, unaligned view of the request body."""

    name: str
    datatype: str
    shape: tuple[int, ...]
    array: np.ndarray[Any, Any]


def describe(value: object) -> str:
    """Describe a value from a request for an error message: on one short line, whatever its depth or length."""
    match value:
        case None:
            return "null"
        case bool():
            return "true" if value else "false"
        case str():
            return repr(value if len(value) <= _SHOWN_CHARACTERS else f"{value[:_SHOWN_CHARACTERS]}...")
        case int() | float():
            return str(value)
        case list():
            return f"a list of {len(value)}"
        case dict():
            return "an object"
        case _:
            return f"a {type(value).__name__}"


def checked_shape(shape: object, name: str) -> tuple[int, ...]:
    """Return the shape of the tensor ``name``: up to 32 positive whole numbers with a product below 2**62.

    None at all is the shape of a scalar.

    Raises:
        InvalidRequest: the shape is anything else.
    """
    if type(shape) is not list or any(type(dim) is not int for dim in shape):
        raise InvalidRequest(
            f"shape of tensor {describe(name)} must be a list of positive whole numbers, not {_show_shape(shape)}"
        )
    if len(shape) > MAX_RANK:
        raise InvalidRequest(f"shape of tensor {describe(name)} has {len(shape)} dimensions; at most {MAX_RANK} can be")
    if min(shape, default=1) < 1:
        raise InvalidRequest(f"shape of tensor {describe(name)} must hold positive numbers only, not {shape}")
    if math.prod(shape) > _MAX_ELEMENTS:
        raise InvalidRequest(f"shape of tensor {describe(name)} has more elements than any memory holds: {shape}")
    return tuple(shape)


def checked_datatype(datatype: object, name: str) -> np.dtype[Any]:
    """Return the little-endian numpy type of a protocol datatype; of BF16 float32, of BYTES Python objects.

    Raises:
        InvalidRequest: there is no such datatype.
    """
    if type(datatype) is not str or datatype not in DATATYPES:
        raise InvalidRequest(
            f"datatype of tensor {describe(name)} must be one of {', '.join(DATATYPES)}, not {describe(datatype)}"
        )
    return DTYPES.get(datatype, NUMPY_TYPES[datatype])


def datatype_of(array: np.ndarray[Any, Any]) -> str:
    """Return the protocol datatype of an array in any byte order.

    Raises:
        ValueError: the protocol has no datatype for it.
    """
    if array.dtype.kind in "OSU":
        return "BYTES"
    try:
        return _DATATYPES[array.dtype.kind, array.dtype.itemsize]
    except KeyError:
        raise ValueError(f"the Open Inference Protocol has no datatype for {array.dtype}") from None


def tensor_from_binary(name: str, datatype: str, shape: tuple[int, ...], raw: bytes | memoryview) -> InputTensor:
    """Make a tensor over raw little-endian bytes, without copying them.

    Raises:
        InvalidRequest: the datatype is unknown, or shape and datatype need another number of bytes.
    """
    dtype = checked_datatype(datatype, name)
    if datatype == "BYTES":
        texts = _texts_from_binary(name, shape, raw)
        return InputTensor(name=name, datatype=datatype, shape=shape, array=texts.reshape(shape))
    if datatype == "BF16":
        dtype = DTYPES["UINT16"]
    expected_bytes = math.prod(shape) * dtype.itemsize
    if len(raw) != expected_bytes:
        raise InvalidRequest(
            f"tensor {describe(name)} of shape {list(shape)} and datatype {datatype} takes {expected_bytes} bytes of"
            f" binary data, not {len(raw)}"
        )
    flat = np.frombuffer(raw, dtype=dtype)
    if dtype.kind == "b" and flat.view(np.uint8).max() > 1:
        raise InvalidRequest(f"binary data of BOOL tensor {describe(name)} must be bytes 0 or 1")
    if datatype == "BF16":
        # The upper half of a float32.
        flat = (flat.astype(np.uint32) << 16).view(np.float32)
    return InputTensor(name=name, datatype=datatype, shape=shape, array=flat.reshape(shape))


def _texts_from_binary(name: str, shape: tuple[int, ...], raw: bytes | memoryview) -> np.ndarray[Any, Any]:
    """Read the elements of a BYTES tensor: each is its length, as four bytes, and its bytes."""
    view, count = memoryview(raw), math.prod(shape)
    texts: list[bytes] = []
    at = 0
    while at + _LENGTH.size <= len(view) and len(texts) < count:
        (size,) = _LENGTH.unpack_from(view, at)
        at += _LENGTH.size
        if size > len(view) - at:
            raise InvalidRequest(
                f"element {len(texts)} of BYTES tensor {describe(name)} says that it has {size} bytes, but only"
                f" {len(view) - at} are left"
            )
        texts.append(bytes(view[at : at + size]))
        at += size
    if len(texts) != count or at != len(view):
        raise InvalidRequest(
            f"binary data of BYTES tensor {describe(name)} must be {count} elements for shape {list(shape)}, each with"
            f" its length before it, but there are {len(texts)} in {at} of {len(view)} bytes"
        )
    return _objects(texts)


def _objects(items: list[bytes]) -> np.ndarray[Any, Any]:
    # Assigned one by one, or numpy would make a matrix of equally long ones.
    array = np.empty(len(items), np.object_)
    array[:] = items
    return array


def tensor_from_json(name: str, datatype: str, shape: tuple[int, ...], data: object) -> InputTensor:
    """Make a tensor from parsed JSON: a flat row-major list of numbers, or lists nested exactly as ``shape`` says.

    Raises:
        InvalidRequest: the count, the nesting, or the type or range of a number is wrong.
    """
    dtype = checked_datatype(datatype, name)
    if type(data) is not list:
        raise InvalidRequest(f"data of tensor {describe(name)} must be a list of numbers, not {describe(data)}")
    flat = _unnest(data, shape, name)
    if len(flat) != math.prod(shape):
        raise InvalidRequest(
            f"data of tensor {describe(name)} must hold {math.prod(shape)} numbers for shape {list(shape)},"
            f" not {len(flat)}"
        )
    if datatype == "BYTES":
        _check_types(flat, {str}, "a string", name)
        array = _objects([text.encode() for text in flat])
    else:
        array = _floats(flat, dtype, name) if dtype.kind == "f" else _discrete(flat, dtype, name)
    return InputTensor(name=name, datatype=datatype, shape=shape, array=array.reshape(shape))


def _unnest(data: list[Any], shape: tuple[int, ...], name: str) -> list[Any]:
    # Level by level and never deeper than the shape: no recursion for hostile nesting to exhaust.
    if not data or type(data[0]) is not list:
        return data
    level: list[Any] = [data]
    for depth, dim in enumerate(shape):
        if set(map(type, level)) != {list} or set(map(len, level)) != {dim}:
            raise InvalidRequest(
                f"data of tensor {describe(name)} must be flat or nested as shape {list(shape)}; at depth {depth}"
                f" there must be lists of {dim} only"
            )
        level = list(chain.from_iterable(level))
    return level


def _floats(flat: list[Any], dtype: np.dtype[Any], name: str) -> np.ndarray[Any, Any]:
    _check_types(flat, {float, int}, "a number", name)
    with np.errstate(over="ignore"):
        array = np.array(flat, dtype=np.float64).astype(dtype)
    finite = np.isfinite(array)
    if not finite.all():
        first = int(np.argmin(finite))
        raise InvalidRequest(
            f"data of tensor {describe(name)} must be numbers within its datatype, but element {first} is"
            f" {describe(flat[first])}"
        )
    return array


def _discrete(flat: list[Any], dtype: np.dtype[Any], name: str) -> np.ndarray[Any, Any]:
    if dtype.kind == "b":
        _check_types(flat, {bool}, "true or false", name)
        return np.array(flat, dtype=dtype)
    _check_types(flat, {int}, "a whole number", name)
    limits = np.iinfo(dtype)
    for value in (min(flat), max(flat)):
        if not limits.min <= value <= limits.max:
            raise InvalidRequest(
                f"data of tensor {describe(name)} must lie in {limits.min}..{limits.max}, but element"
                f" {flat.index(value)} is {value}"
            )
    return np.array(flat, dtype=dtype)


def _check_types(flat: list[Any], allowed: set[type], expected: str, name: str) -> None:
    if set(map(type, flat)) <= allowed:
        return
    first = next(index for index, value in enumerate(flat) if type(value) not in allowed)
    raise InvalidRequest(
        f"each element of tensor {describe(name)} must be {expected}, but element {first} is {describe(flat[first])}"
    )


def _show_shape(shape: object) -> str:
    if type(shape) is list and shape and len(shape) <= MAX_RANK:
        return f"[{', '.join(map(describe, shape))}]"
    return describe(shape)
