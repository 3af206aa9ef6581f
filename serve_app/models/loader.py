"""Loads models in milliseconds: a module without weights is kept ready, and its tensors point into mapped files.

Nothing is copied and nothing is initialised. Building the module, naming its tensors and looking up their places is
done once per process by ``prepare``; ``load`` maps the files (private, copy on write) and puts one tensor into every
slot. The page cache of the kernel holds the weights once per machine, whatever the number of workers.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from serve_app.errors import InvalidRequest, StoreError
from serve_app.models.builders import skeleton
from serve_app.models.manifest import ITEM_BYTES, BlobFile, Manifest, TensorPlace
from serve_app.models.optimise import fold, named_slots, run
from serve_app.models.read_ahead import ReadAhead, is_resident
from serve_app.models.store import ModelStore, check_size

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


class Skeleton:
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


#: Called with the manifest of a model that was unloaded, and with those that may still be reading its files.
Unloaded = Callable[[Manifest, Sequence[ReadAhead]], object]


class LoadedModel:
    """A model in memory; made by ``ModelLoader.load``.

    Args:
        filled: what runs.
        reading: who reads the weights meanwhile; stopped when the model is unloaded.
        unloaded: called when it has been unloaded.
    """

    def __init__(
        self,
        filled: Skeleton,
        reading: Sequence[ReadAhead] = (),
        unloaded: Unloaded | None = None,
    ) -> None:
        self._reading = reading
        self._unloaded = unloaded
        self.model_id = filled.manifest.model.model_id
        self.weights_bytes = filled.manifest.model.weights_bytes
        self._input_shape = filled.manifest.model.inputs[0].shape[1:]
        self._skeleton: Skeleton | None = filled

    def infer(self, batch: NDArray[np.float32]) -> NDArray[np.float32]:
        """Runs the model.

        Args:
            batch: float32 of shape (N, 3, H, W), N >= 1; may be read-only and of any memory layout.

        Returns:
            Logits, float32 of shape (N, classes), in memory of their own.

        Raises:
            InvalidRequest: the batch has another shape.
            StoreError: the model was unloaded.
        """
        loaded = self._skeleton
        if loaded is None:
            raise StoreError(f"model {self.model_id!r} was unloaded; load it before running it")
        if batch.ndim != 1 + len(self._input_shape) or batch.shape[1:] != self._input_shape or not len(batch):
            expected = ("N", *self._input_shape)
            raise InvalidRequest(f"input of {self.model_id!r} must have shape {expected}, not {batch.shape}")
        for reader in self._reading:
            reader.hurry()
        # torch takes neither read-only nor negatively strided arrays without complaint.
        images = torch.from_numpy(np.require(batch, dtype=np.float32, requirements=["C", "W"]))
        channels_last = loaded.manifest.execution.channels_last
        with torch.inference_mode():
            # One at a time: the workspace of one image is what the model is counted with, and on a CPU a batch is
            # hardly faster.
            logits = [
                run(loaded.module, image, channels_last=channels_last, dtype=loaded.dtype)
                for image in images.unsqueeze(1)
            ]
            return np.array(torch.cat(logits).numpy(), dtype=np.float32)

    def unload(self) -> None:
        """Gives the memory back at once; the caller makes sure that no inference runs. Twice is harmless."""
        if self._skeleton is not None:
            manifest = self._skeleton.manifest
            for reader in self._reading:
                reader.stop()
            self._skeleton.empty()
            self._skeleton = None
            if self._unloaded is not None:
                self._unloaded(manifest, self._reading)


class ModelLoader:
    """Loads the models of a store, several at a time from several threads.

    The caller makes sure that a model is loaded at most once at a time: the loaded model *is* the prepared module.

    Args:
        store: the published models.
        release_page_cache: whether unloading a model lets the kernel forget its weights as well.
    """

    def __init__(self, store: ModelStore, *, release_page_cache: bool = False) -> None:
        self._store = store
        # It takes milliseconds, which the caller of unload does not have.
        self._releasing = ThreadPoolExecutor(1, thread_name_prefix="release") if release_page_cache else None
        self._skeletons: dict[str, Skeleton] = {}
        self._locks: dict[str, threading.Lock] = {}

    def prepare(self, model_id: str) -> None:
        """Builds the module without weights, once per process; ``load`` does it if nobody has.

        Raises:
            StoreError: the model is not published, or it was published from another version of its builder.
        """
        self._prepared(model_id)

    def check(self, model_id: str) -> None:
        """Looks, in microseconds, whether the files of a prepared model are there and whole in size.

        Raises:
            StoreError: a load would fail now.
        """
        prepared = self._skeletons.get(model_id)
        if prepared is None:
            return
        try:
            for file in prepared.manifest.files:
                check_size(file, self._store.blob_path(file.name), model_id)
        except StoreError:
            # Published again since, the model is loaded from other files.
            if self._store.manifest(model_id).files == prepared.manifest.files:
                raise

    def load(self, model_id: str) -> LoadedModel:
        """Maps the weights of a model into its module.

        Raises:
            StoreError: the model is not published, or a file is missing, truncated or corrupt.
        """
        prepared = self._prepared(model_id)
        try:
            return fill(self._store, prepared, self._release)
        except StoreError:
            # The model may have been published again, and the files of before swept.
            newer = self._store.manifest(model_id)
            if newer.files == prepared.manifest.files:
                raise
            self._skeletons[model_id] = replaced = Skeleton(newer)
            return fill(self._store, replaced, self._release)

    def _release(self, manifest: Manifest, reading: Sequence[ReadAhead]) -> None:
        if self._releasing is not None:
            paths = [self._store.blob_path(file.name) for file in manifest.files]
            self._releasing.submit(_forget_pages, paths, reading)

    def _prepared(self, model_id: str) -> Skeleton:
        ready = self._skeletons.get(model_id)
        if ready is not None:
            return ready
        with self._locks.setdefault(model_id, threading.Lock()):
            if model_id not in self._skeletons:
                self._skeletons[model_id] = Skeleton(self._store.manifest(model_id))
            return self._skeletons[model_id]


def fill(store: ModelStore, empty: Skeleton, unloaded: Unloaded | None = None) -> LoadedModel:
    """Maps the files of a prepared model and fills it; ``unloaded`` is called when it has been unloaded again.

    Files that are not in the page cache are read on in the background.

    Raises:
        StoreError: a file is missing, truncated or corrupt; the module stays empty.
    """
    model_id = empty.manifest.model.model_id
    for file in empty.manifest.files:
        store.require_whole(file, model_id)
    mapped = [_map(store, file, model_id) for file in empty.manifest.files]
    reading = [
        ReadAhead(store.blob_path(file.name), file.size_bytes)
        for file, (_, is_warm) in zip(empty.manifest.files, mapped, strict=True)
        if not is_warm
    ]
    empty.fill([file for file, _ in mapped])
    return LoadedModel(empty, reading, unloaded)


def _forget_pages(paths: Sequence[Path], reading: Sequence[ReadAhead]) -> None:
    """Lets the kernel give back the pages of files; those that somebody has mapped stay."""
    for reader in reading:
        reader.wait()
    for path in paths:
        with contextlib.suppress(OSError), path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _map(store: ModelStore, file: BlobFile, model_id: str) -> tuple[mmap.mmap, bool]:
    """Maps a blob whole, and says whether it is in the page cache.

    A truncated one is refused, because touching its missing pages would kill the process.
    """
    path = store.blob_path(file.name)
    try:
        with path.open("rb", buffering=0) as blob:
            size_bytes = os.fstat(blob.fileno()).st_size
            if size_bytes == file.size_bytes:
                is_warm = is_resident(blob.fileno(), size_bytes)
                return mmap.mmap(blob.fileno(), size_bytes, access=mmap.ACCESS_COPY), is_warm
    except OSError as error:
        raise StoreError(
            f"weights {path} of model {model_id!r} cannot be opened ({error.strerror}); publish it again"
        ) from error
    raise StoreError(
        f"weights {path} of model {model_id!r} have {size_bytes} bytes instead of {file.size_bytes}; publish it again"
    )


def _flat(file: mmap.mmap, dtype: torch.dtype) -> torch.Tensor:
    """A whole file as elements of one type; what is left over at the end is no tensor's."""
    return torch.frombuffer(file, dtype=dtype, count=len(file) // dtype.itemsize)


def _tensor(place: _Place, flat: torch.Tensor) -> torch.Tensor:
    tensor = flat.as_strided(place.shape, place.strides, place.offset)
    # What nn.Parameter does, less the questions it asks first: there are hundreds in a load.
    return torch.Tensor._make_subclass(nn.Parameter, tensor, False) if place.is_parameter else tensor
