"""Publish one built module: write it, load it back, compare its answers, and measure it."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from numpy.typing import NDArray
from torch import nn

from serve_app.core.catalog import ModelEntry, task_for
from serve_app.core.contract import Contract
from serve_app.core.precision import Dtype
from serve_app.core.task import TaskSpec
from serve_app.errors import StoreError
from serve_app.models.builders import registry
from serve_app.models.builders.base import Metadata
from serve_app.models.builders.described_module import DescribedModule
from serve_app.models.builders.refusals import foreign_reason
from serve_app.models.builders.unread_weights import MOST_READ_BYTES, bytes_read
from serve_app.models.graph_optimizations import ROUNDING, largest_difference, optimize, order_of_use
from serve_app.models.module_call import takes_keywords
from serve_app.models.module_template import TORCH_COMPUTE_DTYPES
from serve_app.models.profiling.grid import grid
from serve_app.models.profiling.measure_published import measure_published, require_counted
from serve_app.models.publishing.classifier_head import require_known_meaning
from serve_app.models.publishing.described import OnStage, describe, runs_row_by_row, with_measurement
from serve_app.models.publishing.module_files import distinct_tensors, write_module
from serve_app.models.publishing.module_inputs import input_contract, read_example
from serve_app.models.publishing.module_trials import Trial, compute_dtype, run_module, run_trials
from serve_app.models.publishing.task_files import with_task
from serve_app.models.publishing.traced_apart import norms_to_fold
from serve_app.models.runtimes.torch_runtime import PreparedModule, TorchRuntime
from serve_app.models.torch_internals import STATE_TABLES
from serve_app.store.manifest import BlobFile, ExecutionFormat, Manifest
from serve_app.store.model_store import ModelStore

#: Largest difference allowed between the outputs of the stored and of the directly built model, in parts of the largest
#: number, by what the stored one computes in: bfloat16 has eight bits, and their rounding adds up over the layers.
TOLERANCE: dict[Dtype, float] = {"float32": ROUNDING, "bfloat16": 0.05}

#: How often a structure is built until that imports nothing more.
_MOST_IMPORTING = 3


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class _TriedModule:
    """What is known of a module that has run: what its builder says, how to call it, and what it takes and answers."""

    metadata: Metadata
    task: TaskSpec
    execution: ExecutionFormat
    contract: Contract
    trials: Sequence[Trial]


def publish_module(
    store: ModelStore, entry: ModelEntry, weights: str, module: nn.Module, on_stage: OnStage
) -> Manifest:
    """Write one built model, and return its manifest, which is to be committed; the caller holds ``store.exclusive``.

    Args:
        store: where to.
        entry: what the catalog asks for.
        weights: the weights that ``module`` was built with.
        module: in eval mode; it is changed, and no more used once it is written.
        on_stage: called with every stage, and the bytes of the weights.

    Raises:
        StoreError: the module does not answer as its entry says, does not load back as it was, or cannot be written.
    """
    tried = _try_module(entry, module)
    metadata, task, execution, contract, trials = (
        tried.metadata, tried.task, tried.execution, tried.contract, tried.trials
    )  # fmt: skip
    if task.kind == "image-classification":
        run = partial(run_module, module, contract, trials[0].inputs, execution, compute_dtype(module))
        require_known_meaning(entry, contract.outputs, run)
    execution = _optimized(entry, weights, module, contract, trials[-1], execution)
    dtype = TORCH_COMPUTE_DTYPES[entry.dtype]
    module.to(dtype)
    order = _order_of_use(entry, module, partial(run_module, module, contract, trials[0].inputs, execution, dtype))
    weights_bytes = sum(tensor.nbytes for tensor in distinct_tensors(module).values())
    on_stage("writing", weights_bytes)
    places, blob = write_module(store, module, order, execution)
    files = (blob, *_write_structure(store, module))
    on_stage("verifying", weights_bytes)
    model = describe(
        entry, weights=weights, runtime="torch", contract=contract, task=_labeled(task, contract),
        row_by_row=runs_row_by_row(contract), weights_bytes=weights_bytes, accuracy=metadata.accuracy,
    )  # fmt: skip
    manifest = Manifest(
        model=model, default_task=_labeled(metadata.task, contract), execution=execution, tensors=places, files=files
    )
    answers = {spec.name: tensor.numpy() for spec, tensor in zip(contract.outputs, trials[-1].outputs, strict=True)}
    manifest = with_task(store, entry, manifest, answers)
    model = manifest.model
    prepared, read_bytes = _prepare(manifest, store)
    _verify(prepared, trials, entry.dtype)
    on_stage("measuring", weights_bytes)
    sizes = grid(contract.axes)
    measurement = measure_published(manifest, store, sizes[:1] if model.row_by_row else sizes)
    require_counted(entry.builder, measurement, weights_bytes)
    # Last: what hides its weights reads them, too.
    _require_unread(entry.builder, read_bytes)
    return dataclasses.replace(manifest, model=with_measurement(model, measurement, weights_bytes))


def _try_module(entry: ModelEntry, module: nn.Module) -> _TriedModule:
    """Run a module as its builder has made it, and return what that shows.

    Raises:
        StoreError: the module does not answer as its entry says.
    """
    metadata = module.metadata if isinstance(module, DescribedModule) else registry.metadata(entry)
    task = task_for(entry, metadata.task)
    _require_compute_dtype(entry, module)
    example = read_example(entry, module)
    known = input_contract(entry, task, metadata, example)
    is_named = bool(entry.inputs or metadata.inputs or example)
    execution = ExecutionFormat(by_keyword=is_named and takes_keywords(module, [spec.name for spec in known.inputs]))
    contract, trials = run_trials(entry, module, task, known, example, execution)
    return _TriedModule(metadata=metadata, task=task, execution=execution, contract=contract, trials=trials)


def _write_structure(store: ModelStore, module: nn.Module) -> tuple[BlobFile, ...]:
    """Store what a worker builds the module from, where its builder alone could not."""
    if not isinstance(module, DescribedModule):
        return ()
    structure = module.structure

    def write(path: Path) -> None:
        path.write_bytes(structure)

    return (store.put_blob(write, role="graph", ending="structure"),)


def _require_compute_dtype(entry: ModelEntry, module: nn.Module) -> None:
    """Require that the entry says so if the weights are of a shorter type than models compute in by default."""
    dtype = compute_dtype(module)
    if dtype is torch.bfloat16 and entry.dtype != "bfloat16":
        raise StoreError(f"the weights of {entry.builder} are bfloat16; use dtype: bfloat16, or return module.float()")
    if dtype is torch.float16:
        raise StoreError(
            f"the weights of {entry.builder} are float16, which processors do not compute in; "
            "use dtype: bfloat16 and return module.bfloat16(), or return module.float()"
        )


def _optimized(
    entry: ModelEntry, weights: str, module: nn.Module, contract: Contract, trial: Trial, execution: ExecutionFormat
) -> ExecutionFormat:
    """Make a module faster where its answers stay; one whose weights are bfloat16 already stays as it is."""
    if compute_dtype(module) is torch.bfloat16:
        return execution
    module.float()
    return optimize(
        module,
        lambda tried: run_module(module, contract, trial.inputs, tried, torch.float32),
        trial.outputs,
        execution,
        entry.model_id,
        norms_to_fold(entry, weights, module),
    )


def _order_of_use(entry: ModelEntry, module: nn.Module, execute: Callable[[], object]) -> dict[str, int]:
    """Return the order in which a module uses its tensors, now that all are of one type.

    Raises:
        StoreError: it cannot run so.
    """
    try:
        return order_of_use(module, execute)
    except Exception as error:
        # A forward that converts between types of its own, such as a module of two halves.
        raise StoreError(
            f"{entry.builder} fails when all its weights are {entry.dtype} ({foreign_reason(error)}); return a module "
            "of one type, which converts nothing itself"
        ) from error


def _labeled(task: TaskSpec, contract: Contract) -> TaskSpec:
    """Return the task of a classifier without labels that do not fit: there must be one for each class."""
    if not task.kind.endswith("classification"):
        return task
    classes = contract.outputs[0].shape[-1] if contract.outputs[0].shape else 0
    return task if len(task.labels) == classes else dataclasses.replace(task, labels=())


def _prepare(manifest: Manifest, store: ModelStore) -> tuple[PreparedModule, int]:
    """Build the structure of a module as workers will, and count the bytes that its factory reads for it."""
    for _ in range(_MOST_IMPORTING):
        known, read_before = len(sys.modules), bytes_read()
        prepared = TorchRuntime().prepare(manifest, store)
        read_bytes = bytes_read() - read_before
        # Torch imports a part of its own with the first operator that needs it on tensors without storage.
        if read_bytes <= MOST_READ_BYTES or len(sys.modules) == known:
            break
    return prepared, read_bytes


def _require_unread(builder: str, read_bytes: int) -> None:
    """Require that a factory does not read its weights in every worker, which builds the structure when it starts.

    Raises:
        StoreError: it has read so many bytes for the structure.
    """
    if read_bytes > MOST_READ_BYTES and registry.is_factory(builder):
        raise StoreError(
            f"{builder} reads {read_bytes / 1e6:.1f} MB when it only builds the structure of its module, and every "
            "worker would; return the module without weights, and name their file (weights: file:PATH), or read it by "
            "torch.load or safetensors"
        )


def _verify(prepared: PreparedModule, trials: Sequence[Trial], dtype: Dtype) -> None:
    """Run the model as workers will, and compare its answers with those of the directly built module."""
    builder = prepared.manifest.model.builder
    model = prepared.load()
    try:
        unstored = next(_plain_meta_tensors(prepared.template.module), None)
        if unstored is not None:
            raise StoreError(
                f"{builder} keeps the tensor {unstored!r} as a plain attribute, which is not stored; "
                "use register_buffer for it"
            )
        difference = max(_difference(model.run(trial.inputs), trial) for trial in trials)
    except NotImplementedError as error:
        raise StoreError(
            f"{builder} computes with a tensor that is neither parameter nor buffer, so it is not stored; "
            "use register_buffer for it"
        ) from error
    finally:
        model.unload()
    if not difference < TOLERANCE[dtype]:
        raise StoreError(
            f"{builder} loaded from the store differs from the built one by {difference:.2g} of its largest output; "
            "does it keep state that is neither parameter nor buffer"
            + ("?" if dtype == "float32" else f", or does it need more precision than {dtype}?")
        )


def _difference(answers: Mapping[str, NDArray[Any]], trial: Trial) -> float:
    difference = largest_difference([torch.from_numpy(array) for array in answers.values()], trial.outputs)
    # Not a number: the answers are not finite.
    return difference if difference == difference else float("inf")


def _plain_meta_tensors(module: nn.Module) -> Iterator[str]:
    """Yield the names of tensors without storage that a module holds outside of its parameters and buffers."""
    for prefix, owner in module.named_modules():
        for key, value in vars(owner).items():
            if key not in STATE_TABLES and _holds_meta(value):
                yield f"{prefix}.{key}" if prefix else key


def _holds_meta(value: Any) -> bool:
    if isinstance(value, torch.Tensor):
        return value.is_meta
    if isinstance(value, dict):
        return any(_holds_meta(item) for item in value.values())
    return isinstance(value, list | tuple) and any(_holds_meta(item) for item in value)
