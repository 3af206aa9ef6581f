"""Publish one built model: write it, load it back, compare its answers, measure it, and commit the manifest."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from serve_app.core.catalog import Dtype, ImageInput, ModelEntry, ModelProfile, PublishedModel, TensorSpec
from serve_app.errors import StoreError
from serve_app.models.builders import registry
from serve_app.models.builders.base import Metadata
from serve_app.models.graph_optimizations import ROUNDING, largest_difference, named_slots, optimize, order_of_use
from serve_app.models.loader import load_into
from serve_app.models.module_template import TORCH_COMPUTE_DTYPES, TORCH_DTYPES, ModuleTemplate
from serve_app.models.profiling.measure import Measurement, measure
from serve_app.models.torch_internals import STATE_TABLES
from serve_app.store.manifest import BlobFile, ExecutionFormat, Layout, Manifest, TensorPlace
from serve_app.store.model_store import ModelStore
from serve_app.store.safetensors_writer import BlobTensor, plan_blob, write_blob

#: Largest difference allowed between the logits of the stored and of the directly built model, in parts of the largest
#: logit, by what the stored one computes in: bfloat16 has eight bits, and their rounding adds up over the layers.
TOLERANCE: dict[Dtype, float] = {"float32": ROUNDING, "bfloat16": 0.05}

#: Of a built model until it is in the store.
ModuleStage = Literal["writing", "verifying", "measuring", "published"]

_DTYPE_NAMES = {dtype: name for name, dtype in TORCH_DTYPES.items()}


def publish_module(
    store: ModelStore, entry: ModelEntry, weights: str, module: nn.Module, on_stage: Callable[[ModuleStage, int], None]
) -> None:
    """Publish one built model; the caller holds ``store.exclusive``.

    Args:
        store: where to.
        entry: what the catalog asks for.
        weights: the weights that ``module`` was built with.
        module: in eval mode; it is changed, and no more used once it is written.
        on_stage: called with every stage, and the bytes of the weights.

    Raises:
        StoreError: the module is no float32 classifier, does not load back as it was, or cannot be written.
    """
    metadata = registry.metadata(entry)
    image = entry.input or metadata.image
    batch = _probe_input(image)
    expected = _run_directly(entry, module, batch)
    execution = optimize(module, batch, expected, entry.model_id)
    dtype = TORCH_COMPUTE_DTYPES[entry.dtype]
    module.to(dtype)
    order = order_of_use(module, torch.from_numpy(batch[:1]), execution, dtype)
    weights_bytes = sum(tensor.nbytes for tensor in _distinct_tensors(module).values())
    on_stage("writing", weights_bytes)
    places, blob = _write_blob(store, module, order, execution)
    on_stage("verifying", weights_bytes)
    model = _unmeasured_model(entry, weights, metadata, image, expected.shape[1], weights_bytes)
    manifest = Manifest(model=model, default_image=metadata.image, execution=execution, tensors=places, files=(blob,))
    template = ModuleTemplate(manifest)
    _verify(store, template, batch, expected, entry.dtype)
    on_stage("measuring", weights_bytes)
    measurement = measure(lambda: load_into(template, store), batch[:1], template.module)
    store.commit(dataclasses.replace(manifest, model=_with_measurement(model, measurement)))
    on_stage("published", weights_bytes)


def _probe_input(image: ImageInput) -> NDArray[np.float32]:
    """Make the fixed input for comparing logits: two images, so that the batch dimension is exercised."""
    shape = (2, 3, image.crop_px, image.crop_px)
    return np.random.default_rng(0).standard_normal(shape, dtype=np.float32)


def _run_directly(entry: ModelEntry, module: nn.Module, batch: NDArray[np.float32]) -> NDArray[np.float32]:
    with torch.inference_mode():
        logits = module(torch.from_numpy(batch))
    if not isinstance(logits, torch.Tensor) or logits.ndim != 2 or len(logits) != len(batch):
        shape = tuple(logits.shape) if isinstance(logits, torch.Tensor) else type(logits).__name__
        raise StoreError(f"{entry.builder} is not a classifier: it must return logits (N, classes), not {shape}")
    if logits.dtype != torch.float32:
        raise StoreError(f"{entry.builder} computes in {logits.dtype}; only float32 is served")
    if not bool(torch.isfinite(logits).all()):
        raise StoreError(f"{entry.builder} with weights {entry.weights} gives numbers that are not finite")
    return np.array(logits.numpy())


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


def _unmeasured_model(
    entry: ModelEntry, weights: str, metadata: Metadata, image: ImageInput, classes: int, weights_bytes: int
) -> PublishedModel:
    """Describe the model as far as it is known before it is measured."""
    labels = metadata.labels if len(metadata.labels) == classes else ()
    profile = ModelProfile(
        model_id=entry.model_id, size_bytes=max(1, weights_bytes), load_s=0, exec_s=0, accuracy=metadata.accuracy
    )
    return PublishedModel(
        model_id=entry.model_id,
        builder=entry.builder,
        family=entry.family,
        weights_requested=entry.weights,
        weights_actual=weights,
        dtype=entry.dtype,
        pinned=entry.pinned,
        image=image,
        inputs=(TensorSpec(name="input", datatype="FP32", shape=(-1, 3, image.crop_px, image.crop_px)),),
        outputs=(TensorSpec(name="logits", datatype="FP32", shape=(-1, classes)),),
        labels=labels,
        weights_bytes=weights_bytes,
        workspace_bytes=0,
        profile=profile,
    )


def _with_measurement(model: PublishedModel, measurement: Measurement) -> PublishedModel:
    profile = dataclasses.replace(model.profile, load_s=measurement.load_s, exec_s=measurement.exec_s)
    return dataclasses.replace(model, workspace_bytes=measurement.workspace_bytes, profile=profile)


def _verify(
    store: ModelStore, template: ModuleTemplate, batch: NDArray[np.float32], expected: NDArray[np.float32], dtype: Dtype
) -> None:
    """Run the model as workers will, and compare its logits with those of the directly built module."""
    builder = template.manifest.model.builder
    model = load_into(template, store)
    try:
        unstored = next(_plain_meta_tensors(template.module), None)
        if unstored is not None:
            raise StoreError(
                f"{builder} keeps the tensor {unstored!r} as a plain attribute, which is not stored; "
                "use register_buffer for it"
            )
        actual = model.infer(batch)
    except NotImplementedError as error:
        raise StoreError(
            f"{builder} computes with a tensor that is neither parameter nor buffer, so it is not stored; "
            "use register_buffer for it"
        ) from error
    finally:
        model.unload()
    difference = largest_difference(actual, expected)
    if not difference < TOLERANCE[dtype]:
        raise StoreError(
            f"{builder} loaded from the store differs from the built one by {difference:.2g} of its largest logit; "
            "does it keep state that is neither parameter nor buffer"
            + ("?" if dtype == "float32" else f", or does it need more precision than {dtype}?")
        )


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
