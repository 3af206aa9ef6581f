"""The interface of a runtime: prepare a model once in a process, load it, run it, and give its memory back.

To add a runtime, write a ``Runtime`` (a library that makes a session of files takes the rest from ``session``), name it
in ``registry``, and have a publisher write its files (``serve_app/models/publishing``).
``tests/models/test_runtimes.py`` runs over all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

from numpy.typing import NDArray

from serve_app.models.readahead import ReadAhead
from serve_app.store.manifest import Manifest
from serve_app.store.model_store import ModelStore
from serve_app.tasks.tensors import Tensors

#: Starts to read a file, given with its size in bytes, into the page cache.
StartReadAhead = Callable[[Path, int], ReadAhead]

#: Called after an unload with the manifest of the model and the readers of its files, which may not have ended yet.
OnUnload = Callable[[Manifest, Sequence[ReadAhead]], object]


class LoadedModel(Protocol):
    """A model in memory."""

    @property
    def model_id(self) -> str:
        """The name of the model."""

    @property
    def weights_bytes(self) -> int:
        """What it takes in memory while no execution runs."""

    def run(self, inputs: Tensors, threads: int = 0) -> dict[str, NDArray[Any]]:
        """Execute the model; may be called by several threads.

        Args:
            inputs: every input of the contract, of a shape that ``Contract.sizes`` accepts; may be read-only.
            threads: of this execution; 0: as many as ``use_threads`` says. A runtime that cannot do it uses those.

        Returns:
            Every output of the contract, in memory of its own.

        Raises:
            StoreError: the model was unloaded.
            InvalidRequest: the library refuses what the inputs hold, such as an index beyond a table.
        """

    def unload(self) -> None:
        """Give the memory back at once; the caller makes sure that no execution runs. Twice is harmless."""


class PreparedModel(Protocol):
    """What of a model a process keeps while the model is not in memory: as little as makes its load fast."""

    @property
    def manifest(self) -> Manifest:
        """What was published."""

    def load(self, read_ahead: StartReadAhead, on_unload: OnUnload | None) -> LoadedModel:
        """Bring the model into memory; the caller makes sure that it is there at most once at a time.

        Raises:
            StoreError: a file is missing, truncated or corrupt.
        """


class Runtime(Protocol):
    """One library."""

    def environment(self) -> str:
        """Return what published files depend on: the version of the library and the processor; empty: on nothing.

        A model whose manifest says otherwise in ``ExecutionFormat.made_for`` must be published again.

        Raises:
            StoreError: the library is not installed.
        """

    def prepare(self, manifest: Manifest, store: ModelStore) -> PreparedModel:
        """Do once per process what a load need not do.

        Raises:
            StoreError: the library is not installed, or cannot run what was published.
        """
