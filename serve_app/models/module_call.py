"""Call a module with named tensors, and name what it returns."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from serve_app.core.contract import TensorSpec
from serve_app.store.manifest import ExecutionFormat

_PLAIN, _KEYWORD_ONLY = inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY
_ANY_KEYWORD = inspect.Parameter.VAR_KEYWORD


def call_module(
    module: nn.Module,
    inputs: Sequence[TensorSpec],
    tensors: Sequence[torch.Tensor],
    execution: ExecutionFormat,
    dtype: torch.dtype,
) -> dict[str, torch.Tensor]:
    """Return the outputs of a module that computes in ``dtype``, by name, in order.

    Args:
        module: in eval mode.
        inputs: names the tensors.
        tensors: in the order of ``inputs``; floating-point ones are converted to ``dtype``.
        execution: how to call the module.
        dtype: what the module computes in; outputs of that type come back as float32.
    """
    arguments = [_as_argument(tensor, execution, dtype) for tensor in tensors]
    if execution.by_keyword:
        result = module(**{spec.name: argument for spec, argument in zip(inputs, arguments, strict=True)})
    else:
        result = module(*arguments)
    if isinstance(result, torch.Tensor):
        return {"output": _as_output(result)}
    return {name or "output": _as_output(tensor) for name, tensor in _walk(result, "")}


def ordered_outputs(results: Mapping[str, torch.Tensor], outputs: Sequence[TensorSpec]) -> list[torch.Tensor]:
    """Return the outputs of a contract, in its order; a single one may have any name."""
    if len(results) == len(outputs) == 1:
        return list(results.values())
    return [results[spec.name] for spec in outputs]


def takes_keywords(module: nn.Module, names: Sequence[str]) -> bool:
    """Return whether ``forward`` can be called with arguments of these names, in whatever order."""
    parameters = inspect.signature(module.forward).parameters
    kinds = {each.kind for each in parameters.values()}
    if all(name in parameters for name in names):
        return all(parameters[name].kind in (_PLAIN, _KEYWORD_ONLY) for name in names)
    return _ANY_KEYWORD in kinds and not kinds & {_PLAIN, inspect.Parameter.POSITIONAL_ONLY}


def _as_argument(tensor: torch.Tensor, execution: ExecutionFormat, dtype: torch.dtype) -> torch.Tensor:
    if not tensor.is_floating_point():
        return tensor
    if execution.channels_last and tensor.ndim == 4:
        return tensor.to(dtype=dtype, memory_format=torch.channels_last)
    return tensor.to(dtype)


def _as_output(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.float() if tensor.dtype is torch.bfloat16 else tensor


def _walk(value: Any, name: str) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the tensors within a value, each with its name; anything else is left out.

    The keys of dictionaries and the fields of dataclasses are names, joined by dots; a member of a tuple is named by
    its position, unless it is the only one.
    """
    match value:
        case torch.Tensor():
            yield name, value
        case Mapping():
            for key, item in value.items():
                yield from _walk(item, _joined(name, str(key)))
        case list() | tuple() if hasattr(value, "_fields"):
            for key in value._fields:
                yield from _walk(getattr(value, key), _joined(name, key))
        case list() | tuple():
            for position, item in enumerate(value):
                yield from _walk(item, name if len(value) == 1 else _joined(name or "output", str(position), "_"))
        case _ if dataclasses.is_dataclass(value):
            for field in dataclasses.fields(value):
                yield from _walk(getattr(value, field.name), _joined(name, field.name))


def _joined(name: str, key: str, by: str = ".") -> str:
    return f"{name}{by}{key}" if name else key
