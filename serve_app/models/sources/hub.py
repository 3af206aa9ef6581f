"""Files of the Hugging Face hub, by huggingface_hub (an extra), in the cache that its users share."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from serve_app.core.reference import Reference, hub_parts
from serve_app.errors import DownloadFailed, StoreError
from serve_app.models.sources.download_cache import OnBytes

#: Of a repository that is named whole: its configuration, tokenizer and weights, but no pickles.
_WANTED: Final = ("*.json", "*.safetensors", "*.txt", "*.model")


def fetch(reference: Reference, on_bytes: OnBytes, is_reachable: Callable[[str], bool]) -> Path:
    """Return the local file of a reference, or the folder of a whole repository.

    Args:
        reference: to a file or a repository.
        on_bytes: called as they come.
        is_reachable: whether the server of a URL answers; where not, what is in the cache will do. The library itself
            would try for half a minute.

    Raises:
        DownloadFailed: it cannot be downloaded.
        StoreError: huggingface_hub is not installed.
    """
    library, address = _library(), endpoint()
    repository, revision, file = hub_parts(reference)
    options = {
        "revision": revision,
        "etag_timeout": 10,
        "tqdm_class": _progress(on_bytes),
        "local_files_only": not is_reachable(address),
    }
    try:
        if file:
            return Path(library.hf_hub_download(repository, file, **options))
        return Path(library.snapshot_download(repository, allow_patterns=list(_WANTED), **options))
    except Exception as error:  # its own errors, and those of its HTTP library
        if options["local_files_only"]:
            raise DownloadFailed(f"cannot download hf://{reference.place}: {address} cannot be reached") from error
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise DownloadFailed(f"cannot download hf://{reference.place}: {reason}") from error


def has(reference: Reference) -> bool:
    """Return whether the file is in the cache of the hub; of a whole repository, only the hub can tell."""
    try:
        library = _library()
    except StoreError:
        return False
    repository, revision, file = hub_parts(reference)
    return bool(file) and isinstance(library.try_to_load_from_cache(repository, file, revision=revision), str)


def endpoint() -> str:
    """Return the address of the hub.

    Raises:
        StoreError: huggingface_hub is not installed.
    """
    _library()
    address: str = importlib.import_module("huggingface_hub.constants").ENDPOINT
    return address


def _library() -> Any:
    try:
        return importlib.import_module("huggingface_hub")
    except ImportError as error:
        raise StoreError("hf:// needs huggingface_hub; run: pip install 'edgeserve[hub]'") from error


def _progress(on_bytes: OnBytes) -> Any:
    """Return a class of progress bars that draws nothing, and reports to ``on_bytes``."""
    base = importlib.import_module("huggingface_hub.utils").tqdm

    class Progress(base):  # type: ignore[misc, valid-type]
        def __init__(self, *args: Any, **options: Any) -> None:
            self._is_bytes = options.get("unit") == "B"
            super().__init__(*args, **{**options, "disable": True})
            self._done, self._all = int(options.get("initial") or 0), int(options.get("total") or 0)

        def update(self, n: float | None = 1) -> None:
            self._done += int(n or 0)
            if self._is_bytes:
                on_bytes(self._done, self._all)

    return Progress
