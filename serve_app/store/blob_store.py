"""The immutable files of a store, named after their content."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import threading
from collections.abc import Callable
from pathlib import Path

from serve_app.errors import StoreError
from serve_app.store.directory import StoreDirectory
from serve_app.store.durable_files import explain_os_errors, fsync_path, sha256_of, stat_signature
from serve_app.store.manifest import BlobFile, Role

logger = logging.getLogger(__name__)

#: Nobody writes to a blob. Its owner may still, by another mode, and root by any.
_READ_ONLY = 0o444


class BlobStore(StoreDirectory):
    """Writes blobs, finds them, and makes sure that they have their content.

    Args:
        root: the directory of the store.
    """

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self._verified = self.root / "verified"
        #: Blobs that this process has verified: the signature at that time, and what was wrong with the content.
        self._checked: dict[str, tuple[list[int], str | None]] = {}

    def blob_path(self, name: str) -> Path:
        """Return the path of the blob with this name, whether or not it exists."""
        return self._blobs / name

    def require_verified(self, file: BlobFile, model_id: str) -> None:
        """Require that a blob has the content that it was published with.

        Reading a blob takes far longer than loading it. The content is therefore trusted while the file's inode, size
        and times are those of its last verification, by any process of this machine; otherwise it is read again.

        Raises:
            StoreError: it is missing, truncated or corrupt.
        """
        path = self.blob_path(file.name)
        check_size(file, path, model_id)
        signature = stat_signature(path)
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
                    problem = f"weights {path} of model {model_id!r} are corrupt; publish it again"
            self._checked[file.name] = signature, problem
        if problem is not None:
            raise StoreError(problem)

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
        with self.exclusive(), self.temporary(f".{ending}") as temporary:
            with explain_os_errors(f"write weights to {self.root}", self.root):
                write(temporary)
                temporary.chmod(_READ_ONLY)
                fsync_path(temporary)
                digest = sha256_of(temporary)
                size_bytes = temporary.stat().st_size
                blob = BlobFile(name=f"{digest}.{ending}", role=role, size_bytes=size_bytes, sha256=digest)
                path = self.blob_path(blob.name)
                # An existing file is trusted only after reading it: putting a blob again must heal a corrupt one.
                if not path.is_file() or sha256_of(path) != digest:
                    temporary.replace(path)
                    fsync_path(self._blobs)
                self._record_verified(blob.name, stat_signature(path))
            return blob

    def remove_blob(self, name: str) -> int:
        """Remove a blob and what is recorded of it; return the bytes freed."""
        path = self.blob_path(name)
        size_bytes = path.stat().st_size
        path.unlink()
        self._record_path(name).unlink(missing_ok=True)
        return size_bytes

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
