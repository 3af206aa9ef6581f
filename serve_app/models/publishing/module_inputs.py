"""What a built module takes: what its builder or an example says, completed by what the catalog declares."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from serve_app.core.catalog import ModelEntry
from serve_app.core.contract import FREE, Axis, Contract, TensorSpec
from serve_app.core.contract_declaration import complete_contract
from serve_app.core.task import TaskSpec
from serve_app.errors import StoreError
from serve_app.models.builders.base import Metadata
from serve_app.models.builders.refusals import foreign_reason
from serve_app.tasks.tensors import NUMPY_TYPES, Tensors

#: The input of image tasks, where none is declared.
_IMAGE = "input"

_DATATYPES = {dtype: name for name, dtype in NUMPY_TYPES.items() if name not in ("BF16", "BYTES")}


def input_contract(entry: ModelEntry, task: TaskSpec, metadata: Metadata, example: Tensors | None) -> Contract:
    """Return a contract whose inputs are known, and whose output stands for those that a trial run will show.

    Raises:
        StoreError: nothing says what the module takes, or what is declared contradicts it.
    """
    said = metadata.inputs
    if example is not None:
        said = tuple(_spec(name, array) for name, array in example.items())
    elif not said and not entry.inputs:
        said = (_image(entry, task),)
    texts = [each.name for each in said if each.datatype == "BYTES"]
    texts += [each.name for each in entry.inputs if each.datatype == "BYTES"]
    if texts:
        raise StoreError(f"input {texts[0]!r} of {entry.builder} is of BYTES, of which torch has no tensors")
    unknown = TensorSpec(name="output", datatype="FP32", shape=(FREE,))
    # Which output returns a state is checked once outputs are known.
    stateless = [dataclasses.replace(each, returned_by=None) for each in entry.inputs]
    try:
        return complete_contract(said, (unknown,), stateless, (), _limits(entry, said, metadata))
    except ValueError as error:
        raise StoreError(f"{entry.builder}: {error}") from error


def output_contract(entry: ModelEntry, known: Contract, outputs: Sequence[TensorSpec]) -> Contract:
    """Return the contract of a module whose outputs a trial has shown, completed by what the entry says of them.

    Raises:
        StoreError: that contradicts what the trial has shown.
    """
    names = {spec.name for spec in outputs}
    declared = [each for each in entry.outputs if each.name in names]
    try:
        return complete_contract(known.inputs, outputs, entry.inputs, declared, known.axes)
    except ValueError as error:
        raise StoreError(f"{entry.builder}: {error}") from error


def read_example(entry: ModelEntry, module: nn.Module) -> Tensors | None:
    """Call the function that returns an example of a model's inputs; None if the entry names none.

    It returns tensors or arrays: a dictionary of them by name, or a tuple in the order of the module's parameters.

    Raises:
        StoreError: there is no such function, it fails, or it returns something else.
    """
    if entry.example is None:
        return None
    place, _, attribute = entry.example.partition(":")
    try:
        made = getattr(importlib.import_module(place), attribute)()
    except (Exception, SystemExit) as error:
        # Foreign code raises what it likes.
        raise StoreError(
            f"example {entry.example!r} cannot be made ({foreign_reason(error)}); name a function: "
            "package.module:function"
        ) from error
    named = made if isinstance(made, Mapping) else _named(made if isinstance(made, tuple | list) else (made,), module)
    example = {str(name): _array(entry.example, str(name), value) for name, value in named.items()}
    if not example:
        raise StoreError(f"example {entry.example!r} is empty; return an array or a tensor for each input")
    return example


def _named(values: Sequence[Any], module: nn.Module) -> dict[str, Any]:
    """Name positional inputs by the parameters of ``forward``."""
    parameters = [
        each.name
        for each in inspect.signature(module.forward).parameters.values()
        if each.kind in (each.POSITIONAL_ONLY, each.POSITIONAL_OR_KEYWORD)
    ]
    names = [*parameters, *(f"input_{position}" for position in range(len(parameters), len(values)))]
    return dict(zip(names, values, strict=False))


def _array(example: str, name: str, value: Any) -> NDArray[Any]:
    if isinstance(value, torch.Tensor):
        value = value.detach()
        value = (value.float() if value.dtype is torch.bfloat16 else value).numpy()
    if isinstance(value, np.ndarray | np.generic | bool | int | float):
        array = np.asarray(value)
        if array.dtype in _DATATYPES:
            return array
    raise StoreError(
        f"example {example!r} has a {type(value).__name__} for input {name!r}; return tensors or arrays of numbers"
    )


def _spec(name: str, array: NDArray[Any]) -> TensorSpec:
    """Return the input that an example is of: its first axis is the batch, and free."""
    shape = (FREE, *array.shape[1:]) if array.ndim else ()
    return TensorSpec(name=name, datatype=_DATATYPES[array.dtype], shape=shape)


def _image(entry: ModelEntry, task: TaskSpec) -> TensorSpec:
    """Return the input of a model of images; detectors take one image at a time."""
    if task.image is None:
        raise StoreError(
            f"{entry.builder} does not say what it takes; add inputs: [{{name: ..., datatype: FP32, shape: "
            "[batch, ...]}], or an example: package.module:function that returns valid inputs"
        )
    batch = 1 if task.kind == "detection" else FREE
    shape = (batch, task.image.channels, task.image.crop_px, task.image.crop_px)
    return TensorSpec(name=_IMAGE, datatype="FP32", shape=shape)


def _limits(entry: ModelEntry, inputs: Sequence[TensorSpec], metadata: Metadata) -> list[Axis]:
    """Return the limits of the entry, and those of the model for the axes that the entry does not name."""
    of_model = {axis.name: axis for axis in metadata.axes}
    said: dict[str, Axis] = {}
    for before, name in _axis_names(entry, inputs):
        if before in of_model:
            said[name] = _narrowed(dataclasses.replace(of_model[before], name=name), said.get(name))
    given = [_narrowed(axis, said.get(axis.name)) for axis in entry.limits]
    names = {axis.name for axis in given}
    return [*given, *(axis for axis in said.values() if axis.name not in names)]


def _axis_names(entry: ModelEntry, inputs: Sequence[TensorSpec]) -> Iterator[tuple[str, str]]:
    """Yield every free axis of the inputs, by the name that the model has for it, and by that of the entry."""
    declared = {each.name: each.shape for each in entry.inputs}
    for spec in inputs:
        shape = declared.get(spec.name) or spec.axes
        for before, name in zip(spec.axes, shape, strict=False):
            if before:
                yield before, name if isinstance(name, str) else before


def _narrowed(axis: Axis, said: Axis | None) -> Axis:
    """Return the limits of an entry within what the model says: it may be made for every fourth size only."""
    if said is None or axis.most < said.least:
        return axis
    return dataclasses.replace(axis, least=max(axis.least, said.least), multiple=math.lcm(axis.multiple, said.multiple))
