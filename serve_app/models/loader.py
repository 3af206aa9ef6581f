"""Process-wide settings of torch."""

from __future__ import annotations

import contextlib
import mmap
import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from serve_app.errors import InvalidRequest, StoreError
from serve_app.models.graph_optimizations import run
from serve_app.models.module_template import ModuleTemplate
from serve_app.models.readahead import ReadAhead, is_resident
from serve_app.store.manifest import BlobFile, Manifest
from serve_app.store.model_store import ModelStore, check_size


def use_threads(count: int) -> None:
    """Let one inference use ``count`` threads; parallel inferences bring their own."""
    torch.set_num_threads(count)


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
        filled: ModuleTemplate,
        reading: Sequence[ReadAhead] = (),
        unloaded: Unloaded | None = None,
    ) -> None:
        self._reading = reading
        self._unloaded = unloaded
        self.model_id = filled.manifest.model.model_id
        self.weights_bytes = filled.manifest.model.weights_bytes
        self._input_shape = filled.manifest.model.inputs[0].shape[1:]
        self._skeleton: ModuleTemplate | None = filled

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
        self._skeletons: dict[str, ModuleTemplate] = {}
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
            self._skeletons[model_id] = replaced = ModuleTemplate(newer)
            return fill(self._store, replaced, self._release)

    def _release(self, manifest: Manifest, reading: Sequence[ReadAhead]) -> None:
        if self._releasing is not None:
            paths = [self._store.blob_path(file.name) for file in manifest.files]
            self._releasing.submit(_forget_pages, paths, reading)

    def _prepared(self, model_id: str) -> ModuleTemplate:
        ready = self._skeletons.get(model_id)
        if ready is not None:
            return ready
        with self._locks.setdefault(model_id, threading.Lock()):
            if model_id not in self._skeletons:
                self._skeletons[model_id] = ModuleTemplate(self._store.manifest(model_id))
            return self._skeletons[model_id]


def fill(store: ModelStore, empty: ModuleTemplate, unloaded: Unloaded | None = None) -> LoadedModel:
    """Maps the files of a prepared model and fills it; ``unloaded`` is called when it has been unloaded again.

    Files that are not in the page cache are read on in the background.

    Raises:
        StoreError: a file is missing, truncated or corrupt; the module stays empty.
    """
    model_id = empty.manifest.model.model_id
    for file in empty.manifest.files:
        store.require_verified(file, model_id)
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
