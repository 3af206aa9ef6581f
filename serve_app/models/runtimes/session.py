"""Models of libraries that make a session of files: what they have in common.

A runtime of that kind writes a ``Session`` and how to open one; loads, cold files, rows, errors and unloads are here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from serve_app.core.contract import BATCH, TensorSpec
from serve_app.errors import EdgeServeError, InvalidRequest, StoreError, Unavailable
from serve_app.models.readahead import ReadAhead
from serve_app.models.runtimes.base import OnUnload, StartReadAhead
from serve_app.models.runtimes.blob_files import read_cold
from serve_app.store.manifest import Manifest
from serve_app.store.model_store import ModelStore
from serve_app.tasks.tensors import NUMPY_TYPES, Tensors

#: Of the words with which libraries say that memory has run out.
_OUT_OF_MEMORY = ("bad_alloc", "bad allocation", "allocate memory", "out of memory")

_REASON_LENGTH = 300


class Session(Protocol):
    """A model in the memory of a library; its memory returns when the last reference to it goes."""

    def run(self, feeds: Mapping[str, NDArray[Any]], threads: int) -> list[NDArray[Any]]:
        """Return the outputs of the contract, in its order and in memory of their own; called by several threads.

        ``threads`` is that of ``LoadedModel.run``.
        """


#: Opens the session of a model whose files are as they were published.
OpenSession = Callable[[Manifest, ModelStore], Session]


def reason_of(error: Exception) -> str:
    """Return what a library says of a failure, on one line that is not too long."""
    return " ".join(str(error).split())[:_REASON_LENGTH]


class SessionModel:
    """A session in memory, see ``LoadedModel``."""

    def __init__(
        self, session: Session, manifest: Manifest, readers: Sequence[ReadAhead], on_unload: OnUnload | None
    ) -> None:
        self._session: Session | None = session
        self._manifest = manifest
        self._readers = readers
        self._on_unload = on_unload
        model = manifest.model
        self.model_id = model.model_id
        self.weights_bytes = model.weights_bytes
        self._row_by_row = model.row_by_row
        self._inputs = model.contract.inputs
        self._outputs = model.contract.outputs

    def run(self, inputs: Tensors, threads: int = 0) -> dict[str, NDArray[Any]]:
        """Execute the model, see ``LoadedModel.run``.

        Raises:
            StoreError: the model was unloaded.
            InvalidRequest: the library refuses what the inputs hold.
            Unavailable: the library gets no memory.
        """
        session = self._session
        if session is None:
            raise StoreError(f"model {self.model_id!r} was unloaded; load it before running it")
        for reader in self._readers:
            reader.prioritize()
        feeds = {spec.name: _feed(inputs[spec.name], spec) for spec in self._inputs}
        try:
            results = (
                _run_rows(session, feeds, self._inputs, threads) if self._row_by_row else session.run(feeds, threads)
            )
        except EdgeServeError:
            raise
        except Exception as error:
            # Errors of libraries have no common class.
            raise self._refusal(error) from error
        return {spec.name: _result(array) for spec, array in zip(self._outputs, results, strict=True)}

    def _refusal(self, error: Exception) -> EdgeServeError:
        reason = reason_of(error)
        if isinstance(error, MemoryError) or any(words in reason.lower() for words in _OUT_OF_MEMORY):
            return Unavailable(f"model {self.model_id!r} gets no memory to run in ({reason}); send smaller inputs")
        return InvalidRequest(f"model {self.model_id!r} cannot run on these inputs ({reason}); correct their values")

    def unload(self) -> None:
        """Give the memory back at once, see ``LoadedModel.unload``."""
        if self._session is not None:
            for reader in self._readers:
                reader.stop()
            self._session = None
            if self._on_unload is not None:
                self._on_unload(self._manifest, self._readers)


class PreparedSession:
    """The place of a model's files; a process keeps nothing else while the model is not in memory.

    Args:
        manifest: what was published.
        store: has the files.
        open_session: makes a session of them.
    """

    def __init__(self, manifest: Manifest, store: ModelStore, open_session: OpenSession) -> None:
        self._manifest = manifest
        self._store = store
        self._open = open_session

    @property
    def manifest(self) -> Manifest:
        """What was published."""
        return self._manifest

    def load(self, read_ahead: StartReadAhead, on_unload: OnUnload | None) -> SessionModel:
        """Open a session, see ``PreparedModel.load``."""
        model_id = self._manifest.model.model_id
        for file in self._manifest.files:
            self._store.require_verified(file, model_id)
        weights = [file for file in self._manifest.files if file.role == "weights"]
        readers = read_cold(self._store, weights, read_ahead)
        try:
            session = self._open(self._manifest, self._store)
        except Exception as error:
            for reader in readers:
                reader.stop()
            if isinstance(error, StoreError):
                raise
            raise StoreError(
                f"model {model_id!r} cannot be loaded ({reason_of(error)}); publish it again with force"
            ) from error
        return SessionModel(session, self._manifest, readers, on_unload)


def require_made_here(manifest: Manifest, environment: str) -> None:
    """Require that the files of a model were made for this version of its library, and this processor.

    Raises:
        StoreError: they were not.
    """
    made_for = manifest.execution.made_for
    if made_for != environment:
        raise StoreError(
            f"model {manifest.model.model_id!r} was optimized for {made_for!r}, and here is {environment!r}; "
            "publish it here again"
        )


def _feed(array: NDArray[Any], spec: TensorSpec) -> NDArray[Any]:
    """Return an input as libraries take it: C-contiguous, of its very type, texts as ``str``."""
    dtype = NUMPY_TYPES[spec.datatype]
    if not dtype.hasobject:
        return np.require(array, dtype, ["C"])
    texts = np.empty(array.shape, dtype)
    for index, item in enumerate(array.flat):
        try:
            texts.flat[index] = item.decode() if isinstance(item, bytes) else str(item)
        except UnicodeDecodeError as error:
            raise InvalidRequest(f"element {index} of input {spec.name!r} must be UTF-8 text ({error})") from None
    return texts


def _result(array: NDArray[Any]) -> NDArray[Any]:
    """Return an output as the protocol takes it: texts as ``bytes``."""
    if array.dtype.kind not in "OSU":
        return array
    texts = np.empty(array.shape, NUMPY_TYPES["BYTES"])
    for index, item in enumerate(array.flat):
        texts.flat[index] = item if isinstance(item, bytes) else str(item).encode()
    return texts


def _run_rows(
    session: Session, feeds: Mapping[str, NDArray[Any]], inputs: Sequence[TensorSpec], threads: int
) -> list[NDArray[Any]]:
    """Run the rows of a batch one after another, each in the workspace of one."""
    axes = {spec.name: spec.axes.index(BATCH) for spec in inputs}
    count = next(feeds[name].shape[axis] for name, axis in axes.items())
    if count == 1:
        return session.run(feeds, threads)
    rows = [
        session.run({name: np.ascontiguousarray(feeds[name].take([row], axis)) for name, axis in axes.items()}, threads)
        for row in range(count)
    ]
    return [np.concatenate(parts) for parts in zip(*rows, strict=True)]
