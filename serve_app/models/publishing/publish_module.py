"""Publish one built module: write it, load it back, compare its answers, measure it, and commit the manifest."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from serve_app.core.catalog import Dtype, ModelEntry, task_for
from serve_app.core.contract import BATCH, Contract, TensorSpec
from serve_app.core.contract_declaration import TensorDeclaration, complete_contract
from serve_app.core.task import TaskSpec
from serve_app.errors import StoreError
from serve_app.models.builders import registry
from serve_app.models.graph_optimizations import ROUNDING, largest_difference, named_slots, optimize, order_of_use
from serve_app.models.module_call import call_module, ordered_outputs, takes_keywords
from serve_app.models.module_template import TORCH_COMPUTE_DTYPES, TORCH_DTYPES, ModuleTemplate
from serve_app.models.profiling.grid import grid, trial_sizes
from serve_app.models.profiling.measure_published import measure_published, require_counted
from serve_app.models.publishing.described import OnStage, describe, runs_row_by_row, with_measurement
from serve_app.models.publishing.task_files import with_task
from serve_app.models.runtimes.torch_runtime import PreparedModule
from serve_app.models.torch_internals import STATE_TABLES
from serve_app.store.manifest import BlobFile, ExecutionFormat, Layout, Manifest, TensorPlace
from serve_app.store.model_store import ModelStore
from serve_app.store.safetensors_writer import BlobTensor, plan_blob, write_blob
from serve_app.tasks.tensors import NUMPY_TYPES, probe

#: Largest difference allowed between the outputs of the stored and of the directly built model, in parts of the largest
#: number, by what the stored one computes in: bfloat16 has eight bits, and their rounding adds up over the layers.
TOLERANCE: dict[Dtype, float] = {"float32": ROUNDING, "bfloat16": 0.05}

_DTYPE_NAMES = {dtype: name for name, dtype in TORCH_DTYPES.items()}

_DATATYPES = {torch.from_numpy(np.empty(0, NUMPY_TYPES[name])).dtype: name for name in (
    "BOOL", "UINT8", "INT8", "INT16", "INT32", "INT64", "FP16", "FP32", "FP64")}  # fmt: skip

#: Inputs of image tasks, where none are declared.
_IMAGE, _LOGITS = "input", "logits"


def publish_module(store: ModelStore, entry: ModelEntry, weights: str, module: nn.Module, on_stage: OnStage) -> None:
    """Publish one built model; the caller holds ``store.exclusive``.

    Args:
        store: where to.
        entry: what the catalog asks for.
        weights: the weights that ``module`` was built with.
        module: in eval mode; it is changed, and no more used once it is written.
        on_stage: called with every stage, and the bytes of the weights.

    Raises:
        StoreError: the module does not answer as its entry says, does not load back as it was, or cannot be written.
    """
    metadata = registry.metadata(entry)
    task = task_for(entry, metadata.task)
    inputs = _input_contract(entry, task)
    execution = ExecutionFormat(by_keyword=bool(entry.inputs) and takes_keywords(module, _names(inputs.inputs)))
    contract, trials = _trial_runs(entry, module, task, inputs, execution)
    first = trials[-1]
    execution = optimize(
        module,
        lambda tried: _run(module, contract, first.inputs, tried, torch.float32),
        first.outputs,
        execution,
        entry.model_id,
    )
    dtype = TORCH_COMPUTE_DTYPES[entry.dtype]
    module.to(dtype)
    order = order_of_use(module, partial(_run, module, contract, trials[0].inputs, execution, dtype))
    weights_bytes = sum(tensor.nbytes for tensor in _distinct_tensors(module).values())
    on_stage("writing", weights_bytes)
    places, blob = _write_blob(store, module, order, execution)
    on_stage("verifying", weights_bytes)
    model = describe(
        entry, weights=weights, runtime="torch", contract=contract, task=_labeled(task, contract),
        row_by_row=runs_row_by_row(contract), weights_bytes=weights_bytes, accuracy=metadata.accuracy,
    )  # fmt: skip
    manifest = Manifest(
        model=model, default_task=_labeled(metadata.task, contract), execution=execution, tensors=places, files=(blob,)
    )
    answers = {spec.name: tensor.numpy() for spec, tensor in zip(contract.outputs, first.outputs, strict=True)}
    manifest = with_task(store, entry, manifest, answers)
    model = manifest.model
    prepared = PreparedModule(ModuleTemplate(manifest), store)
    _verify(prepared, trials, entry.dtype)
    on_stage("measuring", weights_bytes)
    sizes = (_least(contract),) if model.row_by_row else grid(contract.axes)
    measurement = measure_published(manifest, store, sizes)
    require_counted(entry.builder, measurement, weights_bytes)
    store.commit(dataclasses.replace(manifest, model=with_measurement(model, measurement, weights_bytes)))
    on_stage("published", weights_bytes)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class _Trial:
    """One input to compare answers on, and what the module of the builder answers."""

    inputs: Mapping[str, NDArray[Any]]
    outputs: Sequence[torch.Tensor]


def _input_contract(entry: ModelEntry, task: TaskSpec) -> Contract:
    """Return a contract whose inputs are known, and whose output stands for those that a trial run will show."""
    declared: tuple[TensorDeclaration, ...] = entry.inputs
    if not declared:
        if task.image is None:
            raise StoreError(
                f"{entry.builder} does not say what it takes; add inputs: [{{name: ..., datatype: FP32, "
                "shape: [batch, ...]}]"
            )
        shape = (BATCH, task.image.channels, task.image.crop_px, task.image.crop_px)
        declared = (TensorDeclaration(name=_IMAGE, datatype="FP32", shape=shape),)
    unknown = TensorDeclaration(name="output", datatype="FP32", shape=(BATCH,))
    without_state = [dataclasses.replace(each, returned_by=None) for each in declared]
    return _complete(entry, (), without_state, (unknown,))


def _complete(
    entry: ModelEntry, outputs: Sequence[TensorSpec], inputs: Sequence[TensorDeclaration],
    declared_outputs: Sequence[TensorDeclaration],
) -> Contract:  # fmt: skip
    try:
        return complete_contract((), outputs, inputs, declared_outputs, entry.limits)
    except ValueError as error:
        raise StoreError(f"{entry.builder}: {error}") from error


def _trial_runs(
    entry: ModelEntry, module: nn.Module, task: TaskSpec, known: Contract, execution: ExecutionFormat
) -> tuple[Contract, list[_Trial]]:
    """Run the module at different sizes of every free axis; return the contract that this shows, and the runs."""
    all_sizes = trial_sizes(known.axes)
    runs: list[tuple[Mapping[str, NDArray[Any]], dict[str, torch.Tensor]]] = []
    for sizes in all_sizes:
        inputs = probe(known, sizes)
        try:
            with torch.inference_mode():
                tensors = [torch.from_numpy(inputs[spec.name]) for spec in known.inputs]
                runs.append((inputs, call_module(module, known.inputs, tensors, execution, torch.float32)))
        except Exception as error:
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
            shapes = ", ".join(f"{name} {list(array.shape)}" for name, array in inputs.items())
            raise StoreError(
                f"{entry.builder} fails on inputs {shapes} ({reason}); declare what it takes under inputs"
            ) from error
    outputs = _observed(entry, task, known, all_sizes, [results for _, results in runs])
    if task.kind == "image-classification":
        _require_classifier(entry, outputs)
    declared = entry.inputs or tuple(
        TensorDeclaration(name=spec.name, datatype=spec.datatype, shape=_named_shape(spec)) for spec in known.inputs
    )
    contract = _complete(entry, outputs, declared, ())
    trials = [_Trial(inputs=inputs, outputs=ordered_outputs(results, outputs)) for inputs, results in runs]
    for trial in trials:
        for spec, tensor in zip(outputs, trial.outputs, strict=True):
            if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
                raise StoreError(
                    f"{entry.builder} with weights {entry.weights} gives numbers that are not finite in {spec.name!r}"
                )
    return contract, trials


def _least(contract: Contract) -> tuple[int, ...]:
    return grid(contract.axes)[0]


def _observed(
    entry: ModelEntry, task: TaskSpec, known: Contract, sizes: Sequence[tuple[int, ...]],
    results: Sequence[dict[str, torch.Tensor]],
) -> tuple[TensorSpec, ...]:  # fmt: skip
    """Return the outputs that trial runs have shown, named by the catalog where it declares as many as there are."""
    names = list(results[0])
    if not names:
        raise StoreError(f"{entry.builder} returns no tensor; return tensors, or dictionaries or tuples of tensors")
    wanted = [each.name for each in entry.outputs] or names
    if len(wanted) == len(names) == 1:
        pairs = [(wanted[0] if entry.outputs else _single_name(task, names[0]), names[0])]
    else:
        missing = [name for name in wanted if name not in names]
        if missing:
            raise StoreError(f"{entry.builder} returns no output {missing[0]!r}; it returns {', '.join(names)}")
        pairs = [(name, name) for name in wanted]
    return tuple(_observed_tensor(entry, name, [each[key] for each in results], known, sizes) for name, key in pairs)


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
        is_free = len(set(seen)) > 1
        equal = next((axis for axis, given in by_axis.items() if given == seen), f"{name}_{position}")
        shape.append(-1 if is_free else seen[0])
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


def _labeled(task: TaskSpec, contract: Contract) -> TaskSpec:
    """Return the task of a classifier without labels that do not fit: there must be one for each class."""
    if not task.kind.endswith("classification"):
        return task
    classes = contract.outputs[0].shape[-1] if contract.outputs[0].shape else 0
    return task if len(task.labels) == classes else dataclasses.replace(task, labels=())


def _named_shape(spec: TensorSpec) -> tuple[int | str, ...]:
    return tuple(axis or size for size, axis in zip(spec.shape, spec.axes, strict=True))


def _names(specs: Sequence[TensorSpec]) -> list[str]:
    return [spec.name for spec in specs]


def _run(
    module: nn.Module, contract: Contract, inputs: Mapping[str, NDArray[Any]], execution: ExecutionFormat,
    dtype: torch.dtype,
) -> list[torch.Tensor]:  # fmt: skip
    tensors = [torch.from_numpy(inputs[spec.name]) for spec in contract.inputs]
    return ordered_outputs(call_module(module, contract.inputs, tensors, execution, dtype), contract.outputs)


def _tensor_identity(tensor: torch.Tensor) -> tuple[object, ...]:
    """Return a key that is equal for names that share one tensor."""
    return (tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype) if tensor.numel() else (id(tensor),)


def _distinct_tensors(module: nn.Module) -> dict[tuple[object, ...], torch.Tensor]:
    """Return every tensor of the module once, however many names it has."""
    return {_tensor_identity(table[key]): table[key] for _, table, key in named_slots(module)}


def _write_blob(
    store: ModelStore, module: nn.Module, order: Mapping[str, int], execution: ExecutionFormat
) -> tuple[tuple[TensorPlace, ...], BlobFile]:
    """Write all parameters and buffers into one blob, in order of use; tied tensors once."""
    convs = {id(conv.weight) for conv in module.modules() if isinstance(conv, nn.Conv2d)}
    owner: dict[tuple[object, ...], str] = {}
    tensors: dict[str, torch.Tensor] = {}
    layouts: dict[str, Layout] = {}
    for name, table, key in sorted(named_slots(module), key=lambda slot: order[slot[0]]):
        tensor = table[key]
        layouts[name] = "channels_last" if execution.channels_last and id(tensor) in convs else "row_major"
        if owner.setdefault(_tensor_identity(tensor), name) == name:
            tensors[name] = _as_stored(tensor, layouts[name])
    layout = plan_blob(
        [
            BlobTensor(name=name, dtype=_dtype_name(name, tensor), shape=tuple(tensor.shape))
            for name, tensor in tensors.items()
        ]
    )
    content = (_tensor_bytes(tensors[tensor.name]) for tensor in layout.order)
    blob = store.put_blob(lambda path: write_blob(path, layout, content))
    places = []
    for name, table, key in named_slots(module):
        tensor = table[key]
        places.append(
            TensorPlace(
                name=name,
                kind="parameter" if isinstance(tensor, nn.Parameter) else "buffer",
                file=blob.name,
                offset=layout.offsets[owner[_tensor_identity(tensor)]],
                nbytes=tensor.nbytes,
                dtype=_dtype_name(name, tensor),
                shape=tuple(tensor.shape),
                layout=layouts[name],
            )
        )
    return tuple(places), blob


def _as_stored(tensor: torch.Tensor, layout: Layout) -> torch.Tensor:
    """Return the tensor with its dimensions in their order in the file."""
    return tensor.permute(0, 2, 3, 1) if layout == "channels_last" else tensor


def _dtype_name(name: str, tensor: torch.Tensor) -> str:
    if tensor.dtype not in _DTYPE_NAMES:
        raise StoreError(f"tensor {name!r} is of {tensor.dtype}, which the store cannot hold")
    return _DTYPE_NAMES[tensor.dtype]


def _tensor_bytes(tensor: torch.Tensor) -> memoryview:
    """Return the bytes of a tensor, row-major."""
    flat = tensor.detach().contiguous().reshape(-1)
    array: NDArray[np.uint8] = flat.view(torch.uint8).numpy()
    return memoryview(array)  # type: ignore[arg-type]


def _verify(prepared: PreparedModule, trials: Sequence[_Trial], dtype: Dtype) -> None:
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


def _difference(answers: Mapping[str, NDArray[Any]], trial: _Trial) -> float:
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
