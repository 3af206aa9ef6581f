"""Named tensors as they travel from a client to a runtime and back: numpy arrays by name."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from serve_app.core.contract import Contract, ValueRange
from serve_app.errors import InvalidRequest

#: By name, each of the shape and the datatype of its ``TensorSpec``. BYTES are arrays of Python ``bytes``.
Tensors = Mapping[str, NDArray[Any]]

#: The numpy type of each datatype of the protocol, in native byte order. numpy has no bfloat16: its numbers are FP32.
NUMPY_TYPES: Final[dict[str, np.dtype[Any]]] = {
    "BOOL": np.dtype(np.bool_),
    "UINT8": np.dtype(np.uint8),
    "UINT16": np.dtype(np.uint16),
    "UINT32": np.dtype(np.uint32),
    "UINT64": np.dtype(np.uint64),
    "INT8": np.dtype(np.int8),
    "INT16": np.dtype(np.int16),
    "INT32": np.dtype(np.int32),
    "INT64": np.dtype(np.int64),
    "FP16": np.dtype(np.float16),
    "BF16": np.dtype(np.float32),
    "FP32": np.dtype(np.float32),
    "FP64": np.dtype(np.float64),
    "BYTES": np.dtype(np.object_),
}


def total_bytes(tensors: Tensors) -> int:
    """Return the bytes of all tensors together."""
    total = 0
    for array in tensors.values():
        total += sum(map(len, array.flat)) if array.dtype.hasobject else array.nbytes
    return total


def complete(tensors: Tensors, contract: Contract) -> tuple[Tensors, tuple[int, ...]]:
    """Add the inputs that have a default and were left out; return all, and the size of each free axis.

    Raises:
        InvalidRequest: a shape is not one that the model takes, or a number is none that the catalog declares.
    """
    sizes = contract.sizes({name: array.shape for name, array in tensors.items()})
    for spec in contract.inputs:
        if spec.values is not None and spec.name in tensors:
            array = tensors[spec.name]
            outside = spec.values.outside(array.min().item(), array.max().item())
            if outside is not None:
                raise InvalidRequest(f"input {spec.name!r} takes numbers in {spec.values}, not {outside}")
    if len(tensors) == len(contract.inputs):
        return tensors, sizes
    completed = dict(tensors)
    for spec in contract.inputs:
        if spec.name not in completed and spec.default is not None:
            shape = contract.shape(spec, sizes)
            completed[spec.name] = np.full(shape, spec.default, NUMPY_TYPES[spec.datatype])
    return completed, sizes


def probe(
    contract: Contract, sizes: tuple[int, ...], seed: int = 0, *, highest: Mapping[str, int] = MappingProxyType({})
) -> dict[str, NDArray[Any]]:
    """Return inputs for a trial run where the free axes have these sizes: the defaults, or made-up values.

    Values are those that the contract allows; where it does not say, noise and small whole numbers. ``highest`` has the
    largest whole number of such an input, by its name, where it is known.
    """
    random = np.random.default_rng(seed)
    tensors: dict[str, NDArray[Any]] = {}
    for spec in contract.inputs:
        shape, dtype = contract.shape(spec, sizes), NUMPY_TYPES[spec.datatype]
        if spec.default is not None:
            tensors[spec.name] = np.full(shape, spec.default, dtype)
        elif spec.values is not None:
            tensors[spec.name] = _within(spec.values, shape, dtype, random)
        elif dtype.kind == "f":
            tensors[spec.name] = random.standard_normal(shape, dtype=np.float32).astype(dtype)
        elif dtype.hasobject:
            tensors[spec.name] = np.full(shape, b"text", dtype)
        else:
            # The smallest numbers: of a vocabulary or a table they are valid whatever its size.
            tensors[spec.name] = random.integers(0, highest.get(spec.name, 1) + 1, shape).astype(dtype)
    return tensors


def _within(
    values: ValueRange, shape: tuple[int, ...], dtype: np.dtype[Any], random: np.random.Generator
) -> NDArray[Any]:
    if dtype.kind == "f":
        return np.asarray(random.uniform(values.least, values.most, shape)).astype(dtype)
    return np.asarray(random.integers(int(values.least), int(values.most), shape, dtype, endpoint=True))
