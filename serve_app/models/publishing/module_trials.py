"""Run a built module at different sizes: what it answers says what its outputs are, and is what is compared with."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from serve_app.core.catalog import ModelEntry
from serve_app.core.contract import BATCH, FREE, Contract, TensorSpec
from serve_app.core.task import TaskSpec
from serve_app.errors import StoreError
from serve_app.models.builders.refusals import foreign_reason
from serve_app.models.graph_optimizations import ROUNDING, largest_difference
from serve_app.models.module_call import call_module, ordered_outputs
from serve_app.models.profiling.grid import trial_sizes
from serve_app.models.profiling.measure_published import KNOWN_BUILDERS
from serve_app.models.publishing.module_inputs import output_contract
from serve_app.store.manifest import ExecutionFormat
from serve_app.tasks.tensors import Tensors, probe

#: The name of the only output of a classifier of images.
_LOGITS = "logits"

#: What detectors return of each thing that they find.
_FOUND = ("boxes", "scores", "labels", "masks", "keypoints", "keypoints_scores")

#: The datatype of each element type that an output may have. Numbers in bfloat16 are given as FP32.
_DATATYPES = {
    torch.bool: "BOOL",
    torch.uint8: "UINT8",
    torch.uint16: "UINT16",
    torch.uint32: "UINT32",
    torch.uint64: "UINT64",
    torch.int8: "INT8",
    torch.int16: "INT16",
    torch.int32: "INT32",
    torch.int64: "INT64",
    torch.float16: "FP16",
    torch.float32: "FP32",
    torch.float64: "FP64",
}


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """One input to compare answers on, and what the module of the builder answers."""

    inputs: Mapping[str, NDArray[Any]]
    outputs: Sequence[torch.Tensor]


def run_trials(
    entry: ModelEntry,
    module: nn.Module,
    task: TaskSpec,
    known: Contract,
    example: Tensors | None,
    execution: ExecutionFormat,
) -> tuple[Contract, list[Trial]]:
    """Run a module, twice at least; return the contract that this shows, and the runs.

    Args:
        entry: what the catalog asks for.
        module: as its builder has made it.
        task: of the model.
        known: has the inputs; its output stands for those that are not known yet.
        example: inputs that are certain to be valid; None: noise.
        execution: how to call the module.

    Raises:
        StoreError: the module fails, answers with what is no tensor or not finite, or not as its task wants.
    """
    trial_inputs = _trial_inputs(known, example)
    dtype = compute_dtype(module)
    results = [_try(entry, module, known, inputs, execution, dtype) for inputs in trial_inputs]
    sizes = [known.sizes({name: array.shape for name, array in inputs.items()}) for inputs in trial_inputs]
    outputs = _observed(entry, task, known, sizes, results)
    contract = output_contract(entry, known, outputs)
    if task.kind == "image-classification":
        _require_classifier(entry, contract.outputs)
    trials = [
        Trial(inputs=inputs, outputs=ordered_outputs(result, outputs))
        for inputs, result in zip(trial_inputs, results, strict=True)
    ]
    for trial in trials:
        for spec, tensor in zip(outputs, trial.outputs, strict=True):
            if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
                raise StoreError(
                    f"{entry.builder} with weights {entry.weights} gives numbers that are not finite in {spec.name!r}"
                )
    if not entry.builder.startswith(KNOWN_BUILDERS):
        _require_no_state(entry, results[0], _try(entry, module, known, trial_inputs[0], execution, dtype))
    return contract, trials


def compute_dtype(module: nn.Module) -> torch.dtype:
    """Return what most numbers of a module are."""
    counts: dict[torch.dtype, int] = {torch.float32: 0}
    for parameter in module.parameters():
        if parameter.is_floating_point():
            counts[parameter.dtype] = counts.get(parameter.dtype, 0) + parameter.numel()
    return max(counts, key=lambda dtype: counts[dtype])


def run_module(
    module: nn.Module, contract: Contract, inputs: Tensors, execution: ExecutionFormat, dtype: torch.dtype
) -> list[torch.Tensor]:
    """Return the outputs of a module, in the order of its contract."""
    return ordered_outputs(
        call_module(module, contract.inputs, _as_tensors(contract, inputs), execution, dtype), contract.outputs
    )


def _as_tensors(contract: Contract, inputs: Tensors) -> list[torch.Tensor]:
    return [torch.from_numpy(np.require(inputs[spec.name], requirements=["C", "W"])) for spec in contract.inputs]


def _try(
    entry: ModelEntry,
    module: nn.Module,
    known: Contract,
    inputs: Tensors,
    execution: ExecutionFormat,
    dtype: torch.dtype,
) -> dict[str, torch.Tensor]:
    try:
        with torch.inference_mode():
            return call_module(module, known.inputs, _as_tensors(known, inputs), execution, dtype)
    except (Exception, SystemExit) as error:
        # Foreign code raises what it likes.
        shapes = ", ".join(f"{name} {list(array.shape)}" for name, array in inputs.items())
        raise StoreError(
            f"{entry.builder} fails on inputs {shapes} ({foreign_reason(error)}); declare what it takes under inputs "
            "and limits, or name an example: package.module:function that returns valid inputs"
        ) from error


def _require_no_state(entry: ModelEntry, first: dict[str, torch.Tensor], again: dict[str, torch.Tensor]) -> None:
    """Require that a module answers one input as it did before it had others: requests know nothing of each other."""
    if not largest_difference(list(again.values()), list(first.values())) < ROUNDING:
        raise StoreError(
            f"{entry.builder} does not answer the same input equally twice: it keeps state, or draws random numbers; "
            "take state as an input and return it (returned_by), and switch randomness off in eval mode"
        )


def _trial_inputs(contract: Contract, example: Tensors | None) -> list[Tensors]:
    """Return inputs of two sizes of every free axis; where there is none, two inputs of the same size."""
    if example is not None:
        return _trials_of_example(contract, example)
    sizes = trial_sizes(contract.axes)
    return [probe(contract, sizes[0]), probe(contract, sizes[-1], seed=int(len(sizes) == 1))]


def _trials_of_example(contract: Contract, example: Tensors) -> list[Tensors]:
    """Return an example, and the same twice along the batch axis as far as that is free."""
    sizes = contract.sizes({name: array.shape for name, array in example.items()})
    batch = next((size for axis, size in zip(contract.axes, sizes, strict=True) if axis.name == BATCH), None)
    if batch is None or contract.batch is None or contract.batch.problem(2 * batch) is not None:
        return [example]
    twice = {
        spec.name: np.concatenate([example[spec.name]] * 2, axis=spec.axes.index(BATCH))
        if BATCH in spec.axes
        else example[spec.name]
        for spec in contract.inputs
    }
    return [example, twice]


def _observed(
    entry: ModelEntry,
    task: TaskSpec,
    known: Contract,
    sizes: Sequence[tuple[int, ...]],
    results: Sequence[dict[str, torch.Tensor]],
) -> tuple[TensorSpec, ...]:
    """Return the outputs that trial runs have shown, named by the catalog where it declares as many as there are."""
    names = list(results[0])
    if not names:
        raise StoreError(f"{entry.builder} returns no tensor; return tensors, or dictionaries or tuples of tensors")
    if any(list(each) != names for each in results):
        raise StoreError(
            f"{entry.builder} returns other outputs for other inputs; return the same ones always, or fix the batch "
            "at 1 in the shapes of its inputs"
        )
    wanted = [each.name for each in entry.outputs] or names
    if len(wanted) == len(names) == 1:
        pairs = [(wanted[0] if entry.outputs else _single_name(task, names[0]), names[0])]
    else:
        missing = [name for name in wanted if name not in names]
        if missing:
            raise StoreError(f"{entry.builder} returns no output {missing[0]!r}; it returns {', '.join(names)}")
        pairs = [(name, name) for name in wanted]
    specs = [_observed_tensor(entry, name, [each[key] for each in results], known, sizes) for name, key in pairs]
    return tuple(_of_any_length(spec) if task.kind == "detection" and spec.name in _FOUND else spec for spec in specs)


def _of_any_length(spec: TensorSpec) -> TensorSpec:
    """Return an output of a detector, which has a row for each thing that it finds, however many noise has shown."""
    axes = (f"{spec.name}_0", *spec.axes[1:])
    return dataclasses.replace(spec, shape=(FREE, *spec.shape[1:]), axes=axes)


def _single_name(task: TaskSpec, name: str) -> str:
    return _LOGITS if task.kind == "image-classification" else name


def _observed_tensor(
    entry: ModelEntry, name: str, tensors: Sequence[torch.Tensor], known: Contract, sizes: Sequence[tuple[int, ...]]
) -> TensorSpec:
    dtype = tensors[0].dtype
    if dtype not in _DATATYPES:
        raise StoreError(f"output {name!r} of {entry.builder} is of {dtype}, for which the protocol has no datatype")
    ranks = {tensor.ndim for tensor in tensors}
    if len(ranks) > 1:
        raise StoreError(
            f"output {name!r} of {entry.builder} has {min(ranks)} axes for some sizes, and more for others"
        )
    by_axis = {axis.name: tuple(each[at] for each in sizes) for at, axis in enumerate(known.axes)}
    shape, axes = [], []
    for position in range(tensors[0].ndim):
        seen = tuple(tensor.shape[position] for tensor in tensors)
        # None is what a detector finds in noise.
        is_free = len(set(seen)) > 1 or 0 in seen
        equal = next((axis for axis, given in by_axis.items() if given == seen), f"{name}_{position}")
        shape.append(FREE if is_free else seen[0])
        axes.append(equal if is_free else "")
    return TensorSpec(name=name, datatype=_DATATYPES[dtype], shape=tuple(shape), axes=tuple(axes))


def _require_classifier(entry: ModelEntry, outputs: Sequence[TensorSpec]) -> None:
    spec = outputs[0]
    if len(outputs) == 1 and len(spec.shape) == 2 and spec.axes[0] == BATCH and spec.datatype == "FP32":
        return
    found = ", ".join(f"{each.name} {each.datatype} {list(each.shape)}" for each in outputs)
    raise StoreError(
        f"{entry.builder} is not a classifier: it must return logits FP32 (N, classes), not {found}; "
        "name its task, such as task: tensors"
    )
