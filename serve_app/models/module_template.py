"""A module on the meta device, and the slots that its tensors go into."""

from __future__ import annotations

import mmap
from dataclasses import dataclass
from typing import Any

import torch

from serve_app.errors import StoreError
from serve_app.models.builders.registry import skeleton
from serve_app.models.graph_optimizations import fold, named_slots
from serve_app.models.torch_internals import as_parameter
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


#: What models compute in, by the names of the catalogue.
TORCH_COMPUTE_DTYPES: dict[str, torch.dtype] = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True, slots=True)
class _Slot:
    """One name in the module: the table that owns it, what fills it when loaded and what when not."""

    table: dict[str, Any]
    key: str
    place: int
    empty: torch.Tensor


@dataclass(frozen=True, slots=True)
class _Place:
    """One distinct tensor of the files, ``offset`` elements from the start; tied slots share it."""

    file: int
    offset: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    is_parameter: bool


class ModuleTemplate:
    """A module without weights, ready to be filled with the tensors of one manifest.

    Raises:
        StoreError: the module does not have the tensors that the manifest lists.
    """

    def __init__(self, manifest: Manifest) -> None:
        self.manifest = manifest
        self.module = skeleton(manifest.model.builder, manifest.model.weights_actual)
        self.dtype = TORCH_COMPUTE_DTYPES[manifest.model.dtype]
        self._restructure()
        self._places: list[_Place] = []
        self._slots: list[_Slot] = []
        self._files = [file.name for file in manifest.files]
        self._match_slots({place.name: place for place in manifest.tensors})
        self._flats = {(place.file, place.dtype) for place in self._places}

    def fill(self, files: list[mmap.mmap]) -> None:
        """Points every slot at its bytes in the mapped ``files``, which are in the manifest's order."""
        # Inference mode spares each tensor what autograd would note of it, and that is half of the time.
        with torch.inference_mode():
            flat = {key: _flat(files[key[0]], key[1]) for key in self._flats}
            tensors = [_tensor(place, flat[place.file, place.dtype]) for place in self._places]
        for slot in self._slots:
            slot.table[slot.key] = tensors[slot.place]

    def empty(self) -> None:
        """Puts meta tensors back into every slot; this drops the last references to the mapped files."""
        for slot in self._slots:
            slot.table[slot.key] = slot.empty

    def _restructure(self) -> None:
        """Does to the module what was done to it when it was published."""
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
            place, empty = by_name.pop(name, None), table[key]
            if place is None or place.shape != tuple(empty.shape) or TORCH_DTYPES[place.dtype] != empty.dtype:
                raise StoreError(
                    f"tensor {name!r} of model {model.model_id!r} is not in the store as {model.builder} builds it "
                    "now; publish the model again"
                )
            identity = (place.file, place.offset, place.dtype, place.shape, place.layout, place.kind)
            if identity not in distinct:
                distinct[identity] = len(self._places)
                self._places.append(self._place(place))
            self._slots.append(_Slot(table, key, distinct[identity], empty))
        if by_name:
            raise StoreError(
                f"{model.builder} does not have the tensors {sorted(by_name)[:3]} of model {model.model_id!r} "
                "any more; publish the model again"
            )

    def _place(self, place: TensorPlace) -> _Place:
        return _Place(
            file=self._files.index(place.file),
            offset=place.offset // ITEM_BYTES[place.dtype],
            dtype=TORCH_DTYPES[place.dtype],
            shape=place.shape,
            strides=place.strides,
            is_parameter=place.kind == "parameter",
        )


def _flat(file: mmap.mmap, dtype: torch.dtype) -> torch.Tensor:
    """A whole file as elements of one type; what is left over at the end is no tensor's."""
    return torch.frombuffer(file, dtype=dtype, count=len(file) // dtype.itemsize)


def _tensor(place: _Place, flat: torch.Tensor) -> torch.Tensor:
    tensor = flat.as_strided(place.shape, place.strides, place.offset)
    return as_parameter(tensor) if place.is_parameter else tensor
