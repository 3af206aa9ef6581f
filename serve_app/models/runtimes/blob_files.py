"""Open the files of a model for a load: verified, mapped, and read ahead where they are not in the page cache."""

from __future__ import annotations

import mmap
import os
from collections.abc import Sequence

from serve_app.errors import StoreError
from serve_app.models.readahead import ReadAhead, is_resident
from serve_app.models.runtimes.base import StartReadAhead
from serve_app.store.manifest import BlobFile
from serve_app.store.model_store import ModelStore


def map_blob(store: ModelStore, file: BlobFile, model_id: str) -> tuple[mmap.mmap, bool]:
    """Map a complete blob, and return whether it is in the page cache.

    A truncated blob is refused, because touching its missing pages would kill the process.

    Raises:
        StoreError: it is missing or truncated.
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


def read_cold(store: ModelStore, files: Sequence[BlobFile], read_ahead: StartReadAhead) -> tuple[ReadAhead, ...]:
    """Start to read those files that are not in the page cache; an error is left to whoever uses the file."""
    readers = []
    for file in files:
        path = store.blob_path(file.name)
        try:
            with path.open("rb", buffering=0) as blob:
                is_warm = is_resident(blob.fileno(), file.size_bytes)
        except OSError:
            continue
        if not is_warm:
            readers.append(read_ahead(path, file.size_bytes))
    return tuple(readers)
