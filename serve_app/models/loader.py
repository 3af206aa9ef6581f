"""Load published models with the runtimes that they were published for."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from serve_app.core.forms import model_of
from serve_app.errors import StoreError
from serve_app.models.guarded_model import GuardedModel, signatures
from serve_app.models.process_memory import give_back_free_memory
from serve_app.models.readahead import ReadAhead
from serve_app.models.runtimes import registry
from serve_app.models.runtimes.base import PreparedModel, StartReadAhead
from serve_app.store.blob_store import check_size
from serve_app.store.manifest import Manifest, ManifestKey
from serve_app.store.model_store import ModelStore

logger = logging.getLogger(__name__)

#: An unload that frees more has the kernel get it back.
_HEAP_BYTES = 4 * 2**20


class ModelLoader:
    """Loads the models of a store, several at a time from several threads.

    A model whose compiled form is missing or damaged is loaded as it was published.

    The caller makes sure that a model is loaded at most once at a time: a loaded model of torch *is* the
    module that was prepared.

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
        self._release_page_cache = release_page_cache
        # A release takes milliseconds, for which the caller of unload must not wait.
        self._releases = ThreadPoolExecutor(1, thread_name_prefix="release")
        self._prepared: dict[str, PreparedModel] = {}
        self._locks: dict[str, threading.Lock] = {}
        #: Stands for what a key means now, whatever its form: a model in memory may run as long as this is the same.
        self._meanings: dict[str, object] = {}
        #: What may be loaded, by key; None: whatever the store has, by name.
        self._selected: Mapping[str, ManifestKey] | None = None

    def select(self, manifests: Mapping[str, ManifestKey]) -> None:
        """Load these manifests from now on and no others, by the keys of their models.

        What a key stood for before is replaced in memory as soon as it is to run again; another form of the same
        answers alike, and stays.
        """
        before, self._selected = self._selected or {}, dict(manifests)
        for key in before.keys() - manifests.keys():
            model = manifests.get(model_of(key))
            if model is not None and model.stem != before[key].stem:
                # A faster form of what the model was before.
                self._prepared.pop(key, None)
                self._meanings.pop(key, None)
        for key, manifest in manifests.items():
            former = before.get(key)
            if former != manifest:
                self._prepared.pop(key, None)
            if former is None or former.stem != manifest.stem:
                self._meanings.pop(key, None)

    def prepare(self, model_id: str) -> PreparedModel:
        """Do once per process, and model, what a load need not do.

        Raises:
            StoreError: the model is not published, or it cannot be run here as it was published.
        """
        ready = self._prepared.get(model_id)
        if ready is not None:
            return ready
        with self._locks.setdefault(model_id, threading.Lock()):
            if model_id not in self._prepared:
                self._prepared[model_id] = self._prepare_now(model_id)
            return self._prepared[model_id]

    def check(self, model_id: str) -> None:
        """Check, in microseconds, that the files of a prepared model exist and have their sizes.

        Raises:
            StoreError: a load would fail now.
        """
        prepared = self._prepared.get(model_id)
        if prepared is None:
            return
        try:
            self._check_sizes(prepared.manifest, model_id)
        except StoreError as error:
            self._check_sizes(self._instead(model_id, prepared.manifest, error), model_id)

    def load(self, model_id: str) -> GuardedModel:
        """Bring a model into memory.

        Raises:
            StoreError: the model is not published, or a file is missing, truncated or corrupt.
        """
        prepared = self.prepare(model_id)
        meaning = self._meanings.setdefault(model_id, object())
        files = signatures(prepared.manifest, self._store)
        try:
            loaded = prepared.load(self._read_ahead, self._release)
        except StoreError as error:
            other = self._instead(model_id, prepared.manifest, error)
            logger.warning("model %s is loaded from other files: %s", model_id, error)
            self._prepared[model_id] = prepared = registry.prepare(other, self._store)
            self._meanings[model_id] = meaning = object()
            files = signatures(other, self._store)
            loaded = prepared.load(self._read_ahead, self._release)
        model = prepared.manifest.model
        return GuardedModel(loaded, files, lambda: self._meanings.get(model_id) is meaning, model.form, model.own_bytes)

    def wait_for_releases(self) -> None:
        """Block until what unloads so far have freed is back with the kernel."""
        self._releases.submit(lambda: None).result()

    def _prepare_now(self, model_id: str) -> PreparedModel:
        try:
            return registry.prepare(self._manifest(model_id), self._store)
        except StoreError as error:
            place = self._as_published(model_id)
            if place is None:
                raise
            logger.warning("model %s is served as it was published: %s", model_id, error)
            return registry.prepare(self._store.read(place), self._store)

    def _instead(self, model_id: str, failed: Manifest, error: StoreError) -> Manifest:
        """Return what to load in the place of ``failed``; raises ``error`` if there is nothing else.

        The model may have been published again, and its earlier files swept; or a compiled form of it is damaged.
        """
        place = self._as_published(model_id)
        try:
            newer = self._manifest(model_id)
        except StoreError:
            if place is None:
                raise
        else:
            if newer.files != failed.files:
                return newer
        if place is None:
            raise error
        newer = self._store.read(place)
        if newer.files == failed.files:
            raise error
        return newer

    def _as_published(self, model_id: str) -> ManifestKey | None:
        """Return where a model of which a compiled form is selected is as it was published; None for any other key."""
        place = (self._selected or {}).get(model_id)
        if place is None or not place.form or model_of(model_id) != model_id:
            return None
        return dataclasses.replace(place, form="")

    def _check_sizes(self, manifest: Manifest, model_id: str) -> None:
        for file in manifest.files:
            check_size(file, self._store.blob_path(file.name), model_id)

    def _manifest(self, model_id: str) -> Manifest:
        """Return the manifest of a model; raises ``StoreError`` if there is none."""
        if self._selected is None:
            return self._store.manifest(model_id)
        if model_id not in self._selected:
            raise StoreError(f"this deployment has not published model {model_id!r}; run: edgeserve publish")
        return self._store.read(self._selected[model_id])

    def _release(self, manifest: Manifest, readers: Sequence[ReadAhead]) -> None:
        if manifest.model.own_bytes > _HEAP_BYTES:
            # The allocator would keep it, and the next model takes memory of its own.
            self._releases.submit(give_back_free_memory)
        if self._release_page_cache:
            paths = [self._store.blob_path(file.name) for file in manifest.files]
            self._releases.submit(_release_pages, paths, readers)


def _release_pages(paths: Sequence[Path], readers: Sequence[ReadAhead]) -> None:
    """Let the kernel drop the pages of files; pages that a process has mapped stay."""
    for reader in readers:
        reader.wait()
    for path in paths:
        with contextlib.suppress(OSError), path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
