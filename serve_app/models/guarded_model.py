"""A model in memory whose files are looked at before every execution.

The weights of a model are the pages of its files. Whoever truncates such a file makes the next access to a missing page
kill the process (SIGBUS), and whoever writes to it changes the answers. So an execution first compares the stat
signature of every file with that of the load, which takes about two microseconds a file.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from numpy.typing import NDArray

from serve_app.errors import ModelChanged
from serve_app.models.runtimes.base import LoadedModel
from serve_app.store.manifest import Manifest
from serve_app.store.model_store import ModelStore
from serve_app.tasks.tensors import Tensors

#: Path of a file, and what its stat signature was before the load.
Signatures = tuple[tuple[str, tuple[int, int, int, int] | None], ...]


def signatures(manifest: Manifest, store: ModelStore) -> Signatures:
    """Return the present signatures of a model's files, None for a missing one; taken before the model is loaded."""
    paths = [str(store.blob_path(file.name)) for file in manifest.files]
    return tuple((path, _signature(path)) for path in paths)


class GuardedModel:
    """Runs a model as long as its files are those that it was loaded from.

    Args:
        model: in memory.
        files: their signatures before the load.
        is_current: whether the name of the model still stands for what was loaded.
        form: see ``PublishedModel.form``.
        own_bytes: see ``PublishedModel.own_bytes``.
    """

    def __init__(
        self, model: LoadedModel, files: Signatures, is_current: Callable[[], bool], form: str, own_bytes: int
    ) -> None:
        self._model = model
        self._files = files
        self._is_current = is_current
        self.form = form
        self.own_bytes = own_bytes
        self.model_id = model.model_id
        self.weights_bytes = model.weights_bytes

    def run(self, inputs: Tensors, threads: int = 0) -> dict[str, NDArray[Any]]:
        """Execute the model, see ``LoadedModel.run``.

        Raises:
            ModelChanged: what is in memory is not what was published any more; load the model again.
        """
        if not self._is_current():
            raise ModelChanged(f"model {self.model_id!r} was published again; send the request again")
        for path, signature in self._files:
            if _signature(path) != signature:
                raise ModelChanged(
                    f"file {path} of model {self.model_id!r} was changed or removed after it was published; "
                    "publish it again"
                )
        return self._model.run(inputs, threads)

    def unload(self) -> None:
        """Give the memory back at once, see ``LoadedModel.unload``."""
        self._model.unload()


def _signature(path: str) -> tuple[int, int, int, int] | None:
    try:
        status = os.stat(path)  # noqa: PTH116 - half the time of Path.stat, for every execution
    except OSError:
        return None
    return status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns
