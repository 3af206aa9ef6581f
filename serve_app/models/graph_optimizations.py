"""Make a module faster without changing its answers: batch norms folded into convolutions, channels last in memory.

Publishing finds both once and writes them into the manifest. A worker repeats them on the module without weights, which
takes no tracing and no arithmetic. Both together made every model of the catalog faster and none slower
(``edgeserve profile --variants``), so there is no choice per model.
"""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from serve_app.models.torch_internals import (
    FirstUseRecorder,
    buffer_table,
    child_table,
    has_forward_hooks,
    parameter_table,
    storage_address,
)
from serve_app.store.manifest import ExecutionFormat, FoldedNorm

logger = logging.getLogger(__name__)

#: Largest difference of logits that comes from rounding alone, in parts of the largest logit.
ROUNDING = 1e-4

_TINY = float(np.finfo(np.float32).tiny)

#: A convolution that pads in its own way and then calls the inherited ``_conv_forward`` computes the same with other
#: weights; whether the answers stay is compared in any case.
_NORM_AFTER: dict[type[nn.Conv1d] | type[nn.Conv2d] | type[nn.Conv3d], type] = {
    nn.Conv1d: nn.BatchNorm1d,
    nn.Conv2d: nn.BatchNorm2d,
    nn.Conv3d: nn.BatchNorm3d,
}


class _ConvolutionTracer(fx.Tracer):
    """Does not look into convolutions, also not into those that pad in a way of their own."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Return whether a module stays one call in the graph."""
        return isinstance(m, tuple(_NORM_AFTER)) or super().is_leaf_module(m, module_qualified_name)


def named_slots(module: nn.Module) -> Iterator[tuple[str, dict[str, Any], str]]:
    """Yield every parameter and buffer, non-persistent ones included, as (full name, table that owns it, key in it).

    A tensor that is tied to another appears under each of its names.
    """
    for prefix, owner in module.named_modules():
        for table in (parameter_table(owner), buffer_table(owner)):
            for key, tensor in table.items():
                if tensor is not None:
                    yield f"{prefix}.{key}" if prefix else key, table, key


#: Executes the module in a format, and returns its outputs in order.
Execute = Callable[[ExecutionFormat], list[torch.Tensor]]


def optimize(
    module: nn.Module,
    execute: Execute,
    expected: Sequence[torch.Tensor],
    execution: ExecutionFormat,
    name: str,
    folded: tuple[FoldedNorm, ...],
) -> ExecutionFormat:
    """Apply in place the fastest optimizations with which a module still answers as expected.

    Args:
        module: float32, in eval mode.
        execute: runs the module on the input to compare with.
        expected: the outputs of the unchanged module.
        execution: how to call the module.
        name: of the model, for the log.
        folded: the batch norms to fold, see ``foldable_norms``.

    Returns:
        What was done, so that it can be repeated; nothing where the answers would change or the module would fail.
    """
    channels_last = any(isinstance(child, nn.Conv2d) for child in module.modules())
    candidates = [
        replace(execution, folded=folded, channels_last=channels_last),
        replace(execution, folded=folded),
        replace(execution, channels_last=channels_last),
    ]
    for candidate in dict.fromkeys(candidates):
        undo = fold(module, candidate.folded)
        problem = _problem(execute, candidate, expected)
        if problem is None:
            return candidate
        undo()
        what = "channels last in memory" if candidate.channels_last else "batch norms folded"
        logger.warning("model %s is not run with %s: %s", name, what, problem)
    return execution


def largest_difference(actual: Sequence[torch.Tensor], expected: Sequence[torch.Tensor]) -> float:
    """Return the largest difference of any output, in parts of its largest expected number.

    Infinite where an output has another shape, or integers that differ; NaN if a number is not finite.
    """
    if len(actual) != len(expected):
        return math.inf
    return max((_difference(*pair) for pair in zip(actual, expected, strict=True)), default=0.0)


def _difference(actual: torch.Tensor, expected: torch.Tensor) -> float:
    if actual.shape != expected.shape:
        return math.inf
    if not expected.numel():
        return 0.0
    if not expected.is_floating_point():
        return 0.0 if torch.equal(actual, expected) else math.inf
    largest = max(float(expected.abs().max()), _TINY)
    return float((actual.double() - expected.double()).abs().max()) / largest


def foldable_norms(module: nn.Module, name: str) -> tuple[FoldedNorm, ...]:
    """Find the batch norms whose only input is the output of one convolution that has no other reader.

    Neither module may be called twice, and only the call of a module may read its tensors.
    """
    if not has_norms(module):
        # A trace hands symbols to foreign code, which nothing is gained by here.
        return ()
    try:
        graph = _ConvolutionTracer().trace(module)
    except Exception as error:
        # A forward that depends on values, or on anything else that a trace cannot follow.
        reason = " ".join(str(error).split())
        logger.warning("model %s keeps its batch norms, torch.fx cannot trace it: %s", name, reason)
        return ()
    modules = dict(module.named_modules())
    calls = Counter(node.target for node in graph.nodes if node.op == "call_module")
    read = {str(node.target).rpartition(".")[0] for node in graph.nodes if node.op == "get_attr"}
    names_of = Counter(id(table[key]) for _, table, key in named_slots(module))
    folded = []
    for node in graph.nodes:
        before = node.args[0] if node.op == "call_module" and len(node.args) == 1 else None
        if not isinstance(before, fx.Node) or before.op != "call_module" or len(before.users) != 1:
            continue
        pair = FoldedNorm(conv=str(before.target), norm=str(node.target))
        conv, norm = modules[pair.conv], modules[pair.norm]
        used_once = all(calls[part] == 1 and part not in read for part in (pair.conv, pair.norm))
        if used_once and _fits(conv, norm) and names_of[id(conv.weight)] == 1:
            folded.append(pair)
    return tuple(folded)


def has_norms(module: nn.Module) -> bool:
    """Return whether a module has batch norms that might be folded."""
    return any(type(child) in _NORM_AFTER.values() for child in module.modules())


def fold(module: nn.Module, folded: Iterable[FoldedNorm]) -> Callable[[], None]:
    """Fold batch norms into the weights of their convolutions, in place; return the function that undoes it.

    On the meta device only the structure changes.

    Raises:
        AttributeError: the module does not have such parts.
    """
    before: list[tuple[dict[str, Any], str, Any]] = []

    def put(table: dict[str, Any], key: str, value: Any) -> None:
        before.append((table, key, table[key]))
        table[key] = value

    def undo() -> None:
        while before:
            table, key, value = before.pop()
            table[key] = value

    for pair in folded:
        conv: Any = module.get_submodule(pair.conv)
        norm: Any = module.get_submodule(pair.norm)
        owner, _, key = pair.norm.rpartition(".")
        if conv.weight.is_meta:
            # Not empty_like: torch imports a part of its compiler for that.
            bias = torch.empty(norm.running_mean.shape, dtype=norm.running_mean.dtype, device="meta")
            put(parameter_table(conv), "bias", nn.Parameter(bias, requires_grad=False))
        else:
            weight, bias = fuse_conv_bn_weights(
                conv.weight, conv.bias, norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias
            )
            put(parameter_table(conv), "weight", weight)
            put(parameter_table(conv), "bias", bias)
        put(child_table(module.get_submodule(owner)), key, nn.Identity())
    return undo


def order_of_use(module: nn.Module, execute: Callable[[], object]) -> dict[str, int]:
    """Return by name the rank in which one execution first uses each parameter and buffer; unused ones come last."""
    recorder = FirstUseRecorder()
    with torch.inference_mode(), recorder:
        execute()
    unused = len(recorder.first_use)
    return {
        name: recorder.first_use.get(storage_address(table[key]), unused) for name, table, key in named_slots(module)
    }


def _fits(conv: nn.Module, norm: nn.Module) -> bool:
    """Return whether these are modules without hooks, of which the second can be folded into the first."""
    kind: Any = next((kind for kind in _NORM_AFTER if isinstance(conv, kind)), None)
    if kind is None or _NORM_AFTER[kind] is not type(norm) or norm.running_mean is None:
        return False
    if getattr(type(conv), "_conv_forward", None) is not kind._conv_forward:
        return False
    return not any(has_forward_hooks(part) for part in (conv, norm))


def _problem(execute: Execute, execution: ExecutionFormat, expected: Sequence[torch.Tensor]) -> str | None:
    try:
        with torch.inference_mode():
            actual = execute(execution)
    except Exception as error:
        return " ".join(f"{type(error).__name__}: {error}".split())
    difference = largest_difference(actual, expected)
    return None if difference < ROUNDING else f"its outputs would change by {difference:.1e} of the largest"
