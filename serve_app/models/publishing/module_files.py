"""Write the tensors of a built module into one file of the store."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from serve_app.errors import StoreError
from serve_app.models.graph_optimizations import named_slots
from serve_app.models.module_template import TORCH_DTYPES
from serve_app.store.manifest import BlobFile, ExecutionFormat, Layout, TensorPlace
from serve_app.store.model_store import ModelStore
from serve_app.store.safetensors_writer import BlobTensor, plan_blob, write_blob

_DTYPE_NAMES = {dtype: name for name, dtype in TORCH_DTYPES.items()}


def distinct_tensors(module: nn.Module) -> dict[tuple[object, ...], torch.Tensor]:
    """Return every tensor of the module once, however many names it has."""
    return {_tensor_identity(table[key]): table[key] for _, table, key in named_slots(module)}


def write_module(
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


def _tensor_identity(tensor: torch.Tensor) -> tuple[object, ...]:
    """Return a key that is equal for names that share one tensor."""
    return (tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype) if tensor.numel() else (id(tensor),)
