"""Load published models: map their files and bind the tensors to a module without a copy."""

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
    """Let one inference use ``count`` threads, in the whole process; parallel inferences bring their own."""
    torch.set_num_threads(count)


#: Starts to read a file, given with its size in bytes, into the page cache.
StartReadAhead = Callable[[Path, int], ReadAhead]

#: Called after an unload with the manifest of the model and the readers of its files, which may not have ended yet.
OnUnload = Callable[[Manifest, Sequence[ReadAhead]], object]


class LoadedModel:
    """A model in memory; made by ``ModelLoader.load``.

    Args:
        template: the module, with its weights bound.
        readers: read the weights into the page cache meanwhile; an unload stops them.
        on_unload: called after the unload.
    """

    def __init__(
        self,
        template: ModuleTemplate,
        readers: Sequence[ReadAhead] = (),
        on_unload: OnUnload | None = None,
    ) -> None:
        self._readers = readers
        self._on_unload = on_unload
        self.model_id = template.manifest.model.model_id
        self.weights_bytes = template.manifest.model.weights_bytes
        self._input_shape = template.manifest.model.inputs[0].shape[1:]
        self._template: ModuleTemplate | None = template

    def infer(self, batch: NDArray[np.float32]) -> NDArray[np.float32]:
        """Run the model.

        Args:
            batch: float32 of shape (N, 3, H, W), N >= 1; may be read-only and of any memory layout.

        Returns:
            Logits, float32 of shape (N, classes), in memory of their own.

        Raises:
            InvalidRequest: the batch has another shape.
            StoreError: the model was unloaded.
        """
        template = self._template
        if template is None:
            raise StoreError(f"model {self.model_id!r} was unloaded; load it before running it")
        if batch.ndim != 1 + len(self._input_shape) or batch.shape[1:] != self._input_shape or not len(batch):
            expected = ("N", *self._input_shape)
            raise InvalidRequest(f"input of {self.model_id!r} must have shape {expected}, not {batch.shape}")
        for reader in self._readers:
            reader.prioritize()
        # torch takes neither read-only nor negatively strided arrays without complaint.
        images = torch.from_numpy(np.require(batch, dtype=np.float32, requirements=["C", "W"]))
        channels_last = template.manifest.execution.channels_last
        with torch.inference_mode():
            # One at a time: the workspace of one image is what the model is counted with, and on a CPU a batch is
            # hardly faster.
            logits = [
                run(template.module, image, channels_last=channels_last, dtype=template.dtype)
                for image in images.unsqueeze(1)
            ]
            return np.array(torch.cat(logits).numpy(), dtype=np.float32)

    def unload(self) -> None:
        """Give the memory back at once; the caller makes sure that no inference runs. Twice is harmless."""
        if self._template is not None:
            manifest = self._template.manifest
            for reader in self._readers:
                reader.stop()
            self._template.unbind_weights()
            self._template = None
            if self._on_unload is not None:
                self._on_unload(manifest, self._readers)


class ModelLoader:
    """Loads the models of a store, several at a time from several threads.

    The caller makes sure that a model is loaded at most once at a time: the loaded model *is* the module of the
    template.

    Args:
        store: the published models.
        release_page_cache: whether unloading a model lets the kernel drop its weights from the page cache as well.
        read_ahead: reads the weights of a model that are not in the page cache.
    """

    def __init__(
        self, store: ModelStore, *, release_page_cache: bool = False, read_ahead: StartReadAhead = ReadAhead
    ) -> None:
        self._store = store
        self._read_ahead = read_ahead
        # A release takes milliseconds, for which the caller of unload must not wait.
        self._releases = ThreadPoolExecutor(1, thread_name_prefix="release") if release_page_cache else None
        self._templates: dict[str, ModuleTemplate] = {}
        self._locks: dict[str, threading.Lock] = {}

    def prepare(self, model_id: str) -> None:
        """Build the module without weights, once per process, so that the first load need not.

        Raises:
            StoreError: the model is not published, or it was published from another version of its builder.
        """
        self.template(model_id)

    def template(self, model_id: str) -> ModuleTemplate:
        """Return the module of a model, whose tensors are on the meta device unless the model is loaded.

        Raises:
            StoreError: the model is not published, or it was published from another version of its builder.
        """
        ready = self._templates.get(model_id)
        if ready is not None:
            return ready
        with self._locks.setdefault(model_id, threading.Lock()):
            if model_id not in self._templates:
                self._templates[model_id] = ModuleTemplate(self._store.manifest(model_id))
            return self._templates[model_id]

    def check(self, model_id: str) -> None:
        """Check, in microseconds, that the files of a prepared model exist and have their sizes.

        Raises:
            StoreError: a load would fail now.
        """
        template = self._templates.get(model_id)
        if template is None:
            return
        try:
            for file in template.manifest.files:
                check_size(file, self._store.blob_path(file.name), model_id)
        except StoreError:
            # A model that was published again is loaded from other files.
            if self._store.manifest(model_id).files == template.manifest.files:
                raise

    def load(self, model_id: str) -> LoadedModel:
        """Map the weights of a model into its module.

        Raises:
            StoreError: the model is not published, or a file is missing, truncated or corrupt.
        """
        template = self.template(model_id)
        try:
            return self._load_into(template)
        except StoreError:
            # The model may have been published again, and its earlier files swept.
            newer = self._store.manifest(model_id)
            if newer.files == template.manifest.files:
                raise
            self._templates[model_id] = replaced = ModuleTemplate(newer)
            return self._load_into(replaced)

    def _load_into(self, template: ModuleTemplate) -> LoadedModel:
        return load_into(template, self._store, self._read_ahead, self._release)

    def _release(self, manifest: Manifest, readers: Sequence[ReadAhead]) -> None:
        if self._releases is not None:
            paths = [self._store.blob_path(file.name) for file in manifest.files]
            self._releases.submit(_release_pages, paths, readers)


def load_into(
    template: ModuleTemplate,
    store: ModelStore,
    read_ahead: StartReadAhead = ReadAhead,
    on_unload: OnUnload | None = None,
) -> LoadedModel:
    """Map the files of a model and bind its weights; ``on_unload`` is called after the model was unloaded again.

    Files that are not in the page cache are read in the background.

    Raises:
        StoreError: a file is missing, truncated or corrupt; the template stays without weights.
    """
    model_id = template.manifest.model.model_id
    for file in template.manifest.files:
        store.require_verified(file, model_id)
    mapped = [_map_blob(store, file, model_id) for file in template.manifest.files]
    readers = [
        read_ahead(store.blob_path(file.name), file.size_bytes)
        for file, (_, is_warm) in zip(template.manifest.files, mapped, strict=True)
        if not is_warm
    ]
    template.bind_weights([file for file, _ in mapped])
    return LoadedModel(template, readers, on_unload)


def _release_pages(paths: Sequence[Path], readers: Sequence[ReadAhead]) -> None:
    """Let the kernel drop the pages of files; pages that a process has mapped stay."""
    for reader in readers:
        reader.wait()
    for path in paths:
        with contextlib.suppress(OSError), path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _map_blob(store: ModelStore, file: BlobFile, model_id: str) -> tuple[mmap.mmap, bool]:
    """Map a complete blob, and return whether it is in the page cache.

    A truncated blob is refused, because touching its missing pages would kill the process.
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
