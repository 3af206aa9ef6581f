"""A module on the meta device, and the slots that its tensors are bound to."""

from __future__ import annotations

import mmap
from dataclasses import dataclass, replace
from typing import Any

import torch

from serve_app.errors import StoreError
from serve_app.models.builders.registry import build_on_meta
from serve_app.models.graph_optimizations import fold, named_slots
from serve_app.models.torch_internals import STATE_TABLES, as_parameter
from serve_app.store.manifest import ITEM_BYTES, Manifest, TensorPlace

#: torch's names for the element types of safetensors.
TORCH_DTYPES: dict[str, torch.dtype] = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "U16": torch.uint16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I32": torch.int32,
    "U32": torch.uint32,
    "F32": torch.float32,
    "I64": torch.int64,
    "U64": torch.uint64,
    "F64": torch.float64,
}


#: What models compute in, by the names of the catalog.
TORCH_COMPUTE_DTYPES: dict[str, torch.dtype] = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True, slots=True)
class _Slot:
    """One place in the module: the table that holds it, its stored tensor, and the meta tensor while none is bound.

    The table is one of parameters or buffers, or a list or dictionary in which a module keeps some of them once more.
    """

    table: Any
    key: Any
    tensor: int
    meta: torch.Tensor


@dataclass(frozen=True, slots=True)
class _StoredTensor:
    """One distinct tensor of the files, ``offset`` elements from the start; tied slots share it."""

    file: int
    offset: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    is_parameter: bool


class ModuleTemplate:
    """A module without weights, to which the tensors of one manifest can be bound.

    Args:
        manifest: of the published model.
        structure: what the store has of the structure of the module; None if its builder makes it anew.

    Raises:
        StoreError: the module does not have the tensors that the manifest lists.
    """

    def __init__(self, manifest: Manifest, structure: bytes | None = None) -> None:
        self.manifest = manifest
        self.module = build_on_meta(manifest.model.builder, manifest.model.weights_actual, structure)
        self.dtype = TORCH_COMPUTE_DTYPES[manifest.model.dtype]
        self._repeat_optimizations()
        self._tensors: list[_StoredTensor] = []
        self._slots: list[_Slot] = []
        self._files = [file.name for file in manifest.files if file.role == "weights"]
        self._match_slots({place.name: place for place in manifest.tensors})
        self._slots.extend(self._repeated_slots())
        self._views = {(tensor.file, tensor.dtype) for tensor in self._tensors}

    def bind_weights(self, files: list[mmap.mmap]) -> None:
        """Bind every slot to its bytes in the mapped ``files``: those of weights, in the manifest's order."""
        # Inference mode skips the bookkeeping of autograd for each tensor, which is half of the time.
        with torch.inference_mode():
            views = {(file, dtype): _elements(files[file], dtype) for file, dtype in self._views}
            tensors = [_view(tensor, views[tensor.file, tensor.dtype]) for tensor in self._tensors]
        for slot in self._slots:
            slot.table[slot.key] = tensors[slot.tensor]

    def unbind_weights(self) -> None:
        """Put meta tensors back into every slot; this drops the last references to the mapped files."""
        for slot in self._slots:
            slot.table[slot.key] = slot.meta

    def _repeat_optimizations(self) -> None:
        """Repeat on the module what publishing did to it."""
        model = self.manifest.model
        try:
            fold(self.module, self.manifest.execution.folded)
        except AttributeError as error:
            raise StoreError(
                f"{model.builder} does not have the layers of model {model.model_id!r} any more ({error}); "
                "publish the model again"
            ) from error
        self.module.to(self.dtype)

    def _match_slots(self, by_name: dict[str, TensorPlace]) -> None:
        distinct: dict[tuple[object, ...], int] = {}
        model = self.manifest.model
        for name, table, key in named_slots(self.module):
            place, meta = by_name.pop(name, None), table[key]
            if place is None or place.shape != tuple(meta.shape) or TORCH_DTYPES[place.dtype] != meta.dtype:
                raise StoreError(
                    f"tensor {name!r} of model {model.model_id!r} is not in the store as {model.builder} builds it "
                    "now; publish the model again"
                )
            identity = (place.file, place.offset, place.dtype, place.shape, place.layout, place.kind)
            if identity not in distinct:
                distinct[identity] = len(self._tensors)
                self._tensors.append(self._stored_tensor(place))
            self._slots.append(_Slot(table, key, distinct[identity], meta))
        if by_name:
            raise StoreError(
                f"{model.builder} does not have the tensors {sorted(by_name)[:3]} of model {model.model_id!r} "
                "any more; publish the model again"
            )

    def _repeated_slots(self) -> list[_Slot]:
        """Return where modules keep parameters a second time, as recurrent ones do in ``_flat_weights``."""
        by_identity = {id(slot.meta): slot for slot in self._slots}
        repeated = []
        for owner in self.module.modules():
            for name, value in vars(owner).items():
                if name in STATE_TABLES:
                    continue
                table: Any = vars(owner) if isinstance(value, torch.Tensor) else value
                items = (
                    [(name, value)]
                    if isinstance(value, torch.Tensor)
                    else enumerate(value)
                    if type(value) is list
                    else value.items()
                    if type(value) is dict
                    else ()
                )
                for key, item in items:
                    slot = by_identity.get(id(item))
                    if slot is not None:
                        repeated.append(replace(slot, table=table, key=key))
        return repeated

    def _stored_tensor(self, place: TensorPlace) -> _StoredTensor:
        return _StoredTensor(
            file=self._files.index(place.file),
            offset=place.offset // ITEM_BYTES[place.dtype],
            dtype=TORCH_DTYPES[place.dtype],
            shape=place.shape,
            strides=place.strides,
            is_parameter=place.kind == "parameter",
        )


def _elements(file: mmap.mmap, dtype: torch.dtype) -> torch.Tensor:
    """Return a file as elements of one type; bytes left over at the end belong to no tensor of that type."""
    return torch.frombuffer(file, dtype=dtype, count=len(file) // dtype.itemsize)


def _view(stored: _StoredTensor, elements: torch.Tensor) -> torch.Tensor:
    tensor = elements.as_strided(stored.shape, stored.strides, stored.offset)
    return as_parameter(tensor) if stored.is_parameter else tensor
