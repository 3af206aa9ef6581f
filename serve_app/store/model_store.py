"""The model store on disk: immutable blobs of weights, and one manifest per model.

Layout::

    root/models/<model_id>.json         manifest; its atomic rename publishes the model
    root/blobs/<sha256>.<ending>        weights and graphs, named after their content, never changed
    root/verified/<sha256>.json         stat signature of the blob's file when its content was last verified
    root/tmp/                           files being written, named after the process that writes them
    root/lock                           held by the one publisher that may write

Readers take no lock. A reader sees the manifest from before or after a publication, never a mixture. This module does
not import torch: routers read the store too.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import json
import logging
import os
import secrets
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from serve_app.core.catalog import MODEL_ID_PATTERN, Catalog, ModelEntry, PublishedModel, runtime_of, task_for
from serve_app.errors import StoreError
from serve_app.store.durable_files import explain_os_errors, fsync_path, is_alive, sha256_of, write_durably
from serve_app.store.manifest import BlobFile, Manifest, Role

logger = logging.getLogger(__name__)


class ModelStore:
    """Reads and writes one store directory; an instance may be used by several threads.

    Args:
        root: the directory; it is made by the first write.
    """

    def __init__(self, root: Path) -> None:
        self.root = Path(root)
        self._models = self.root / "models"
        self._blobs = self.root / "blobs"
        self._tmp = self.root / "tmp"
        self._verified = self.root / "verified"
        #: Blobs that this process has verified: the signature at that time, and what was wrong with the content.
        self._checked: dict[str, tuple[list[int], str | None]] = {}
        self._writer = threading.RLock()
        self._depth = 0

    def published(self) -> tuple[str, ...]:
        """Return the names of all models that have a manifest, sorted."""
        return tuple(sorted(path.stem for path in self._models.glob("*.json") if not path.name.startswith(".")))

    def has(self, model_id: str) -> bool:
        """Return whether the model has a manifest; ``check_sizes`` checks its files as well."""
        return self._manifest_path(model_id).is_file()

    def manifest(self, model_id: str) -> Manifest:
        """Read the manifest of a model.

        Raises:
            StoreError: the model is not published, or its manifest is malformed.
        """
        path = self._manifest_path(model_id)
        try:
            text = path.read_bytes()
        except FileNotFoundError as error:
            raise StoreError(f"model {model_id!r} is not in the store {self.root}; publish it first") from error
        except OSError as error:
            raise StoreError(f"cannot read {path}: {error.strerror}; check the permissions of the store") from error
        manifest = Manifest.from_json(text, str(path))
        if manifest.model.model_id != model_id:
            raise StoreError(f"manifest {path} is of model {manifest.model.model_id!r}; publish {model_id!r} again")
        return manifest

    def catalog(self, entries: Sequence[ModelEntry]) -> Catalog:
        """Return those of ``entries`` that are published, in their order.

        Family, pinning, accuracy and input are those of the entry. A model with a malformed manifest, or published from
        another builder, other weights or another dtype than the entry asks for, is logged and left out, so that the
        others are served.
        """
        models = []
        for entry in entries:
            if not self.has(entry.model_id):
                continue
            try:
                manifest = self.manifest(entry.model_id)
            except StoreError as error:
                logger.error("model %s is left out: %s", entry.model_id, error)
                continue
            if is_published_from(manifest, entry):
                models.append(_overlaid(manifest, entry))
            else:
                logger.warning("model %s is left out: its entry changed; publish it again", entry.model_id)
        return Catalog(tuple(models))

    def blob_path(self, name: str) -> Path:
        """Return the path of the blob with this name, whether or not it exists."""
        return self._blobs / name

    def check_sizes(self, model_id: str) -> None:
        """Check that every file of the model exists and has its size; costs one ``stat`` per file.

        Raises:
            StoreError: the model is not published, or a file is missing or has another size.
        """
        for file in self.manifest(model_id).files:
            check_size(file, self.blob_path(file.name), model_id)

    def require_verified(self, file: BlobFile, model_id: str) -> None:
        """Require that a blob has the content that it was published with.

        Reading a blob takes far longer than loading it. The content is therefore trusted while the file's inode, size
        and times are those of its last verification, by any process of this machine; otherwise it is read again.

        Raises:
            StoreError: it is missing, truncated or corrupt.
        """
        path = self.blob_path(file.name)
        check_size(file, path, model_id)
        signature = _stat_signature(path)
        checked, problem = self._checked.get(file.name, ([], None))
        if checked != signature:
            problem = None
            if not self._is_recorded(file.name, signature):
                logger.info("reading weights %s: they are new here, or have changed", path)
                with explain_os_errors(f"read {path}", path):
                    digest = sha256_of(path)
                if digest == file.sha256:
                    self._record_verified(file.name, signature)
                else:
                    problem = f"weights {path} of model {model_id!r} are corrupt; publish it again with force"
            self._checked[file.name] = signature, problem
        if problem is not None:
            raise StoreError(problem)

    def _is_recorded(self, name: str, signature: list[int]) -> bool:
        try:
            return bool(json.loads(self._record_path(name).read_bytes()) == signature)
        except (OSError, ValueError):
            return False

    def _record_path(self, name: str) -> Path:
        return (self._verified / name).with_suffix(".json")

    def _record_verified(self, name: str, signature: list[int]) -> None:
        # The record only saves time: a process that may not write to the store reads the blob once.
        with contextlib.suppress(OSError):
            self._verified.mkdir(exist_ok=True)
            temporary = self._verified / f".{name}.{os.getpid()}.{threading.get_ident()}"
            try:
                temporary.write_text(json.dumps(signature))
                temporary.replace(self._record_path(name))
            finally:
                temporary.unlink(missing_ok=True)

    @contextlib.contextmanager
    def exclusive(self, on_wait: Callable[[], None] | None = None) -> Iterator[None]:
        """Make the caller the only publisher on this store, across threads and processes; may be nested.

        Blobs that no manifest names are safe from ``sweep`` only while their publisher holds this.

        Args:
            on_wait: called once if another publisher holds the store and this one has to wait.

        Raises:
            StoreError: the store cannot be written.
        """
        with self._writer:
            if self._depth == 0:
                descriptor = self._lock_file(on_wait)
            self._depth += 1
            try:
                yield
            finally:
                self._depth -= 1
                if self._depth == 0:
                    os.close(descriptor)

    def put_blob(
        self, write: Callable[[Path], None], *, role: Role = "weights", ending: str = "safetensors"
    ) -> BlobFile:
        """Store one file under the name of its content; keep an equal file that the store already has.

        Args:
            write: writes the content to the path that it is given.
            role: what of a model the file is.
            ending: of its name.

        Raises:
            StoreError: the disk is full or the store cannot be written; nothing half-written stays.
        """
        with self.exclusive(), self._temporary(f".{ending}") as temporary:
            with explain_os_errors(f"write weights to {self.root}", self.root):
                write(temporary)
                fsync_path(temporary)
                digest = sha256_of(temporary)
                size_bytes = temporary.stat().st_size
                blob = BlobFile(name=f"{digest}.{ending}", role=role, size_bytes=size_bytes, sha256=digest)
                path = self.blob_path(blob.name)
                # An existing file is trusted only after reading it: putting a blob again must heal a corrupt one.
                if not path.is_file() or sha256_of(path) != digest:
                    temporary.replace(path)
                    fsync_path(self._blobs)
                self._record_verified(blob.name, _stat_signature(path))
            return blob

    def commit(self, manifest: Manifest) -> None:
        """Publish a model: once this method has returned it is in the store, even after a power failure.

        Raises:
            StoreError: a file of the manifest is not in the store, the disk is full or the store cannot be written.
        """
        model_id = manifest.model.model_id
        with self.exclusive(), self._temporary(".json") as temporary:
            for file in manifest.files:
                check_size(file, self.blob_path(file.name), model_id)
            with explain_os_errors(f"write the manifest of {model_id!r}", self.root):
                write_durably(temporary, manifest.to_json())
                temporary.replace(self._manifest_path(model_id))
                fsync_path(self._models)

    def sweep(self) -> int:
        """Remove temporary files of dead publishers and blobs that no manifest names; return the bytes freed.

        All blobs stay while any manifest cannot be read, because its references are not known.
        """
        freed = 0
        with self.exclusive(), explain_os_errors(f"tidy up {self.root}", self.root):
            for path in list(self._tmp.iterdir()):
                if not is_alive(path.name.partition("-")[0]):
                    freed += _remove(path)
            try:
                used = {file.name for model_id in self.published() for file in self.manifest(model_id).files}
            except StoreError as error:
                logger.warning("unused weights are kept: %s", error)
                return freed
            for path in list(self._blobs.iterdir()):
                if path.name not in used:
                    freed += _remove(path)
                    self._record_path(path.name).unlink(missing_ok=True)
        return freed

    def _manifest_path(self, model_id: str) -> Path:
        if MODEL_ID_PATTERN.fullmatch(model_id) is None:
            raise StoreError(f"{model_id!r} is not the name of a model")
        return self._models / f"{model_id}.json"

    def _lock_file(self, on_wait: Callable[[], None] | None) -> int:
        """Take the lock of the store; closing the descriptor, or the end of the process, releases it."""
        with explain_os_errors(f"write to {self.root}", self.root):
            for directory in (self._models, self._blobs, self._tmp):
                directory.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(self.root / "lock", os.O_RDWR | os.O_CREAT, 0o666)
            try:
                try:
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    if on_wait is not None:
                        on_wait()
                    fcntl.flock(descriptor, fcntl.LOCK_EX)
            except BaseException:
                os.close(descriptor)
                raise
        return descriptor

    @contextlib.contextmanager
    def _temporary(self, suffix: str) -> Iterator[Path]:
        """Yield a path to write to, and remove a file that is still there at the end."""
        path = self._tmp / f"{os.getpid()}-{secrets.token_hex(8)}{suffix}"
        try:
            yield path
        finally:
            path.unlink(missing_ok=True)


def is_published_from(manifest: Manifest, entry: ModelEntry) -> bool:
    """Return whether the published model is what the entry asks for, but for the overlay of ``ModelStore.catalog``."""
    model = manifest.model
    image, task = task_for(entry, manifest.default_task).image, model.task.image
    return (model.builder, model.weights_requested, model.dtype, model.runtime, image and image.crop_px) == (
        entry.builder,
        entry.weights,
        entry.dtype,
        runtime_of(entry),
        task and task.crop_px,
    )


def _stat_signature(path: Path) -> list[int]:
    """Return what changes when a file is written to or replaced: inode, size, and the times of content and inode."""
    status = path.stat()
    return [status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns]


def check_size(file: BlobFile, path: Path, model_id: str) -> None:
    """Check that a blob exists and has its size.

    Raises:
        StoreError: it is missing or has another size.
    """
    try:
        size_bytes = path.stat().st_size
    except OSError as error:
        raise StoreError(
            f"weights {path} of model {model_id!r} are missing ({error.strerror}); publish it again"
        ) from error
    if size_bytes != file.size_bytes:
        raise StoreError(
            f"weights {path} of model {model_id!r} have {size_bytes} bytes instead of {file.size_bytes}; "
            "publish it again"
        )


def _overlaid(manifest: Manifest, entry: ModelEntry) -> PublishedModel:
    model = manifest.model
    accuracy = model.profile.accuracy if entry.accuracy is None else entry.accuracy
    return dataclasses.replace(
        model,
        family=entry.family,
        pinned=entry.pinned,
        task=task_for(entry, manifest.default_task),
        # Manifests have counted workspace with the size once.
        profile=dataclasses.replace(model.profile, accuracy=accuracy, size_bytes=max(1, model.weights_bytes)),
    )


def _remove(path: Path) -> int:
    size_bytes = path.stat().st_size
    path.unlink()
    return size_bytes
