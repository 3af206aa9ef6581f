"""ONNX Runtime: runs the graph that publishing has optimized, on weights that it maps from the store.

The graph names its weights by the name of their blob, in the folder of all blobs. They were packed for the processor
when the model was published, so a load packs and copies next to nothing, and the page cache holds them once for all
workers of a machine.
"""

from __future__ import annotations

import importlib
import platform
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from serve_app.errors import InvalidRequest, StoreError
from serve_app.models.readahead import ReadAhead
from serve_app.models.runtimes.base import OnUnload, StartReadAhead
from serve_app.models.runtimes.blob_files import read_cold
from serve_app.models.threads import inference_threads
from serve_app.store.manifest import Manifest
from serve_app.store.model_store import ModelStore
from serve_app.tasks.tensors import NUMPY_TYPES, Tensors

_PROVIDERS = ["CPUExecutionProvider"]


@cache
def library() -> Any:
    """Import onnxruntime.

    Raises:
        StoreError: it is not installed.
    """
    try:
        ort = importlib.import_module("onnxruntime")
    except ImportError as error:
        raise StoreError(f"onnxruntime cannot be imported ({error}); run: pip install onnxruntime") from error
    # Errors come as exceptions; its warnings are about files that publishing has made on purpose.
    ort.set_default_logger_severity(4)
    return ort


def session_options() -> Any:
    """Return the options of every session: the threads of one inference, and no memory kept between executions."""
    options = library().SessionOptions()
    options.intra_op_num_threads = inference_threads()
    options.inter_op_num_threads = 1
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    # An arena keeps the activations of the largest execution as long as its session lives.
    options.enable_cpu_mem_arena = False
    options.log_severity_level = 4
    return options


@cache
def environment() -> str:
    """Return what optimized graphs depend on: the version of the library, and the processor with its extensions."""
    return f"onnxruntime {library().__version__} {platform.machine()} {_processor_flags()}"


@cache
def _processor_flags() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ""
    flags = next((line.partition(":")[2].split() for line in lines if line.startswith(("flags", "Features"))), [])
    return " ".join(flag for flag in flags if flag.startswith(("avx", "amx", "fma", "asimd", "sve", "i8mm", "bf16")))


@cache
def invalid_argument() -> type[Exception]:
    """Return what the library raises where a node of a graph cannot take the values that reach it."""
    library()
    state = importlib.import_module("onnxruntime.capi.onnxruntime_pybind11_state")
    found: type[Exception] = state.InvalidArgument
    return found


def feed(array: NDArray[Any], dtype: np.dtype[Any], name: str) -> NDArray[Any]:
    """Return an array as a session takes it: of BYTES as strings, since it would take ``bytes`` by their ``repr``.

    Raises:
        InvalidRequest: BYTES are not UTF-8.
    """
    if not dtype.hasobject:
        return np.require(array, dtype, ["C"])
    texts = np.empty(array.shape, np.object_)
    try:
        texts.flat = [item.decode() if isinstance(item, bytes) else item for item in array.flat]
    except UnicodeDecodeError as error:
        raise InvalidRequest(f"input {name!r} takes text in UTF-8, which what was given is not") from error
    return texts


class OnnxModel:
    """A session."""

    def __init__(
        self, session: Any, manifest: Manifest, readers: Sequence[ReadAhead], on_unload: OnUnload | None
    ) -> None:
        self._session: Any = session
        self._manifest = manifest
        self._readers = readers
        self._on_unload = on_unload
        model = manifest.model
        self.model_id = model.model_id
        self.weights_bytes = model.weights_bytes
        self._inputs = [(spec.name, NUMPY_TYPES[spec.datatype]) for spec in model.contract.inputs]
        self._outputs = [spec.name for spec in model.contract.outputs]

    def run(self, inputs: Tensors) -> dict[str, NDArray[Any]]:
        """Execute the model, see ``LoadedModel.run``."""
        session = self._session
        if session is None:
            raise StoreError(f"model {self.model_id!r} was unloaded; load it before running it")
        for reader in self._readers:
            reader.prioritize()
        feeds = {name: feed(inputs[name], dtype, name) for name, dtype in self._inputs}
        try:
            results = session.run(self._outputs, feeds)
        except invalid_argument() as error:
            # Of the right shape, but of values that the graph has no place for, such as an index beyond its table.
            reason = " ".join(str(error).rpartition("Status Message: ")[2].split())[:300]
            raise InvalidRequest(f"model {self.model_id!r} cannot take these inputs: {reason}") from error
        # Copied: an output is a view into memory that belongs to its session.
        return {name: np.array(result) for name, result in zip(self._outputs, results, strict=True)}

    def unload(self) -> None:
        """Give the memory back at once, see ``LoadedModel.unload``."""
        if self._session is not None:
            for reader in self._readers:
                reader.stop()
            self._session = None
            if self._on_unload is not None:
                self._on_unload(self._manifest, self._readers)


class PreparedGraph:
    """The place of a graph and its weights; a process keeps nothing else while the model is not in memory."""

    def __init__(self, manifest: Manifest, store: ModelStore) -> None:
        self._manifest = manifest
        self._store = store
        (self._graph,) = (file for file in manifest.files if file.role == "graph")

    @property
    def manifest(self) -> Manifest:
        """What was published."""
        return self._manifest

    def load(self, read_ahead: StartReadAhead, on_unload: OnUnload | None) -> OnnxModel:
        """Make a session, see ``PreparedModel.load``."""
        ort, model_id = library(), self._manifest.model.model_id
        for file in self._manifest.files:
            self._store.require_verified(file, model_id)
        weights = [file for file in self._manifest.files if file.role == "weights"]
        readers = read_cold(self._store, weights, read_ahead)
        path = self._store.blob_path(self._graph.name)
        options = session_options()
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(path.parent))
        try:
            session = ort.InferenceSession(path.read_bytes(), options, providers=_PROVIDERS)
        except Exception as error:
            # Errors of the library have no common class.
            reason = " ".join(str(error).split())[:300]
            raise StoreError(f"model {model_id!r} cannot be loaded ({reason}); publish it again with force") from error
        return OnnxModel(session, self._manifest, readers, on_unload)


class OnnxRuntime:
    """The runtime of ONNX graphs."""

    def prepare(self, manifest: Manifest, store: ModelStore) -> PreparedGraph:
        """Check that the graph was optimized for this machine, see ``Runtime.prepare``."""
        if manifest.execution.made_for != environment():
            raise StoreError(
                f"model {manifest.model.model_id!r} was optimized for {manifest.execution.made_for!r}, and here is "
                f"{environment()!r}; publish it here"
            )
        return PreparedGraph(manifest, store)
