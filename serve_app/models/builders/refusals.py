"""What cannot be served as a module, and what to do instead: one sentence for each.

A module can be served if its memory is that of its parameters and buffers, so that an unload gives it back. The
sentences here are for what is known not to be so; whatever else hides memory is found when it is measured.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from serve_app.errors import StoreError
from serve_app.models.torch_internals import is_compiled

#: What a message quotes of a foreign exception.
_REASON_LENGTH = 300

_EXPORT = (
    "export it (torch.export.save(torch.export.export(module, inputs), 'model.pt2')) and use builder: "
    "export:model.pt2, or as ONNX and use builder: onnx:model.onnx"
)

#: Top packages of libraries that run models by themselves, with what to do.
_ENGINES = {
    "onnxruntime": "use builder: onnx:FILE with the file that its session reads",
    "openvino": "use builder: onnx:FILE with the model that it was converted from, and runtime: openvino",
    "tensorrt": "use builder: onnx:FILE with the model that it was built from",
    "tflite_runtime": "convert the model to ONNX (tf2onnx) and use builder: onnx:FILE",
    "ai_edge_litert": "convert the model to ONNX (tf2onnx) and use builder: onnx:FILE",
    "tensorflow": "convert the model to ONNX (tf2onnx) and use builder: onnx:FILE",
    "jax": "convert the model to ONNX (jax2onnx) and use builder: onnx:FILE",
}


def foreign_reason(error: BaseException) -> str:
    """Return what foreign code has raised, on one line that is not too long."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:_REASON_LENGTH]


def require_module(made: object, builder: str) -> nn.Module:
    """Require that a builder has made a module.

    Raises:
        StoreError: it has made something else.
    """
    if isinstance(made, nn.Module):
        return made
    match type(made).__name__:
        case "ExportedProgram":
            cure = "save it (torch.export.save(program, 'model.pt2')) and use builder: export:model.pt2"
        case "AOTICompiledModel":
            cure = "it can never be unloaded; save the exported program itself, and use builder: export:model.pt2"
        case "ScriptFunction":
            cure = _EXPORT
        case _:
            cure = "return a torch.nn.Module"
    raise StoreError(f"{builder} returned a {type(made).__name__}, not a torch.nn.Module; {cure}")


def require_servable(module: nn.Module, builder: str) -> None:
    """Require that a module keeps its weights where they can be bound and given back.

    Raises:
        StoreError: it does not.
    """
    for name, part in module.named_modules():
        where = f"{builder} has in {name!r}" if name else f"{builder} is"
        reason = _problem(part)
        if reason is not None:
            raise StoreError(f"{where} {reason}")
    try:
        module.eval()
    except NotImplementedError as error:
        raise StoreError(
            f"{builder} has the module of an exported program, which has one mode only; save the program "
            "(torch.export.save(program, 'model.pt2')) and use builder: export:model.pt2"
        ) from error
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        kind = type(tensor)
        if kind not in (torch.Tensor, nn.Parameter, nn.parameter.Buffer) or tensor.is_quantized or tensor.is_sparse:
            what = f"a {kind.__name__} of {kind.__module__}" if kind is not nn.Parameter else "quantized or sparse"
            raise StoreError(
                f"{builder}: the weights {name!r} are {what}, which cannot be mapped from a file; use the module "
                "before it was quantized with dtype: bfloat16, or quantize its ONNX export"
            )


def _problem(part: nn.Module) -> str | None:
    """Return what is wrong with one module, as the end of a sentence; None if nothing is known to be."""
    if isinstance(part, torch.jit.ScriptModule):
        return f"TorchScript, which copies its weights; {_EXPORT}"
    kind = type(part)
    if is_compiled(part):
        return "compiled by torch.compile, which every worker would repeat; return the module before torch.compile"
    if ".quantized" in kind.__module__ and kind.__module__.startswith("torch."):
        return (
            f"a {kind.__name__} of torch.ao, which packs its weights outside of parameters and buffers; use the module "
            "before it was quantized with dtype: bfloat16, or quantize its ONNX export (onnxruntime.quantization)"
        )
    for key, value in vars(part).items():
        reason = _foreign(value)
        if reason is not None:
            return f"a {kind.__name__} around {reason} (attribute {key!r})"
    return None


def _foreign(value: Any) -> str | None:
    """Return which foreign runtime an attribute belongs to, and what to do; None for anything else."""
    kind = type(value)
    package = kind.__module__.partition(".")[0]
    if package in _ENGINES and not isinstance(value, type):
        return f"a {kind.__name__} of {package}, whose memory nobody counts; {_ENGINES[package]}"
    if kind.__name__ in ("AOTICompiledModel", "AOTIModelPackageLoader"):
        return "a package of AOTInductor, which can never be unloaded; save the exported program: export:FILE.pt2"
    if isinstance(value, torch.ScriptObject):
        return f"a TorchScript object, whose weights nobody counts; {_EXPORT}"
    return None
