"""ONNX Runtime: runs the graph that publishing has optimized, on weights that it maps from the store.

The graph names its weights by the name of their blob, in the folder of all blobs. They were packed for the processor
when the model was published, so a load packs and copies next to nothing, and the page cache holds them once for all
workers of a machine.
"""

from __future__ import annotations

import importlib
import threading
from collections.abc import Mapping
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from serve_app.errors import StoreError
from serve_app.models.runtimes.environment import environment
from serve_app.models.runtimes.session import PreparedSession, require_made_here
from serve_app.models.threads import inference_threads
from serve_app.store.manifest import Manifest
from serve_app.store.model_store import ModelStore

PROVIDERS = ("CPUExecutionProvider",)

#: Never through an exception: what the library logs about files that publishing has made on purpose.
_FATAL_ONLY = 4

_pool_lock = threading.Lock()
_has_pool = False


@cache
def library() -> Any:
    """Import onnxruntime.

    Raises:
        StoreError: it cannot be imported.
    """
    try:
        ort = importlib.import_module("onnxruntime")
    except ImportError as error:
        raise StoreError(f"onnxruntime cannot be imported ({error}); run: pip install onnxruntime") from error
    ort.set_default_logger_severity(_FATAL_ONLY)
    return ort


def session_options() -> Any:
    """Return the options of every session: the threads of one inference, and no memory kept between executions."""
    ort = library()
    options = ort.SessionOptions()
    if _uses_pool(ort):
        options.use_per_session_threads = False
    else:
        options.intra_op_num_threads = 1
        options.inter_op_num_threads = 1
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    # An arena keeps the activations of the largest execution as long as its session lives.
    options.enable_cpu_mem_arena = False
    options.log_severity_level = _FATAL_ONLY
    return options


def _uses_pool(ort: Any) -> bool:
    """Return whether sessions share one pool of threads: as soon as one inference uses several.

    The library has one pool in a process, which cannot be changed, and which then all sessions must use.
    """
    global _has_pool
    with _pool_lock:
        if not _has_pool and inference_threads() > 1:
            ort.set_global_thread_pool_sizes(inference_threads(), 1)
            _has_pool = True
        return _has_pool


class _OnnxSession:
    """An ``InferenceSession``, see ``Session``."""

    def __init__(self, session: Any, outputs: list[str]) -> None:
        self._session = session
        self._outputs = outputs

    def run(self, feeds: Mapping[str, NDArray[Any]], threads: int) -> list[NDArray[Any]]:
        """Run the graph, see ``Session.run``."""
        # Copied: an output is a view into memory that belongs to its session.
        return [np.array(output) for output in self._session.run(self._outputs, feeds)]


def _open(manifest: Manifest, store: ModelStore) -> _OnnxSession:
    (graph,) = (file for file in manifest.files if file.role == "graph")
    path = store.blob_path(graph.name)
    options = session_options()
    options.graph_optimization_level = library().GraphOptimizationLevel.ORT_DISABLE_ALL
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(path.parent))
    session = library().InferenceSession(path.read_bytes(), options, providers=PROVIDERS)
    return _OnnxSession(session, [spec.name for spec in manifest.model.outputs])


class OnnxRuntime:
    """The runtime of ONNX graphs."""

    def environment(self) -> str:
        """Return what optimized graphs depend on, see ``Runtime.environment``."""
        return environment("onnxruntime", library().__version__)

    def prepare(self, manifest: Manifest, store: ModelStore) -> PreparedSession:
        """Check that the graph was optimized for this machine, see ``Runtime.prepare``."""
        require_made_here(manifest, self.environment())
        return PreparedSession(manifest, store, _open)
