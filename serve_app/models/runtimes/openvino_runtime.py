"""OpenVINO: runs what it has compiled when the model was published, on weights that it maps from the store.

The compiled model is small and refers to its weights by their place in their file. A load maps them, and packs a copy
for the processor.
"""

from __future__ import annotations

import importlib
import io
import os
import threading
from collections.abc import Mapping
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from serve_app.core.precision import Dtype
from serve_app.errors import InvalidRequest, StoreError
from serve_app.models.runtimes.environment import environment, installed_version
from serve_app.models.runtimes.session import PreparedSession, require_made_here
from serve_app.models.threads import inference_threads
from serve_app.store.manifest import Manifest
from serve_app.store.model_store import ModelStore

DEVICE = "CPU"

#: Left alone, it computes in bfloat16 wherever the processor can.
_PRECISIONS: Mapping[str, str] = {"float32": "f32", "bfloat16": "bf16"}

_SHAPES_KEPT = 4

_INT32 = np.iinfo(np.int32)

#: Types of whole numbers that it takes, and computes in those of 32 bits.
_CUT_OFF = (np.dtype(np.int64), np.dtype(np.uint64), np.dtype(np.uint32))

_first_use = threading.RLock()

_KERNELS_KEPT = "ONEDNN_PRIMITIVE_CACHE_CAPACITY"


def library() -> Any:
    """Import openvino.

    Raises:
        StoreError: it cannot be imported.
    """
    with _first_use:
        return _import()


@cache
def _import() -> Any:
    try:
        library = importlib.import_module("openvino")
    except ImportError as error:
        raise StoreError(f"openvino cannot be imported ({error}); run: pip install 'edgeserve[openvino]'") from error
    # The first inference of a process fills a table of types, and lets other threads run meanwhile. One that needs the
    # table then waits for it without letting the first one go on: the process stands still for ever. So it is filled
    # here, before there are inferences.
    library.Type.f32.to_dtype()
    return library


@cache
def core() -> Any:
    """Return the one ``Core`` of the process."""
    with _first_use:
        made = library().Core()
        _keep_no_kernels(made)
    return made


def _keep_no_kernels(made: Any) -> None:
    """Have kernels live and die with the models that they were compiled for.

    The library keeps the last 1,024 otherwise, tens of megabytes that no unload gives back. It reads the limit, once,
    when it makes its first kernel. torch has a copy of the same library and reads the same variable, but must keep its
    kernels: it looks them up for every execution.
    """
    ops = importlib.import_module("openvino.opset13")
    given = ops.parameter([1, 8], np.float32)
    weights = ops.constant(np.ones((8, 8), np.float32))
    before = os.environ.get(_KERNELS_KEPT)
    os.environ[_KERNELS_KEPT] = "0"
    try:
        model = library().Model([ops.matmul(given, weights, False, False)], [given], "first")
        made.compile_model(model, DEVICE)(np.zeros((1, 8), np.float32))
    finally:
        if before is None:
            del os.environ[_KERNELS_KEPT]
        else:
            os.environ[_KERNELS_KEPT] = before


def settings(dtype: Dtype | str) -> dict[str, Any]:
    """Return the settings of compiling and of loading, for models that compute in ``dtype``.

    A model runs one inference at a time, in the thread that asks. Several streams bring threads for each model in
    memory, and take more memory at larger sizes than publishing counts.
    """
    return {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": _PRECISIONS[dtype],
        # One, without threads of its own.
        "NUM_STREAMS": 0,
        "INFERENCE_NUM_THREADS": inference_threads(),
        # Else the first stream of every model, in every worker, runs on the first processor and nowhere else.
        "ENABLE_CPU_PINNING": False,
        # Compiled models refer to the file of their weights instead of holding them.
        "CACHE_MODE": "OPTIMIZE_SIZE",
        # It keeps what it has made for every shape that it has seen, else, which is memory that grows without end.
        "CPU_RUNTIME_CACHE_CAPACITY": _SHAPES_KEPT,
    }


class _OpenVinoSession:
    """A ``CompiledModel``, see ``Session``.

    Args:
        compiled: the model.
        outputs: their names.
        has_one_size: it is always executed at the same sizes.
    """

    def __init__(self, compiled: Any, outputs: list[str], has_one_size: bool) -> None:
        self._compiled = compiled
        self._has_one_size = has_one_size
        self._outputs = [compiled.output(name) for name in outputs]
        self._lock = threading.Lock()

    def run(self, feeds: Mapping[str, NDArray[Any]], threads: int) -> list[NDArray[Any]]:
        """Run the model, one inference at a time, see ``Session.run``."""
        _require_32_bits(feeds)
        with self._lock:
            try:
                # A new request costs microseconds, and keeps no input alive.
                results = self._compiled.create_infer_request().infer(feeds, share_inputs=True, share_outputs=True)
                return [np.array(results[output]) for output in self._outputs]
            finally:
                # It keeps the activations of the largest execution else. Where all take as much, these count with the
                # model: to have the system make their pages anew takes up to half of an execution.
                if not self._has_one_size:
                    self._compiled.release_memory()


def _require_32_bits(feeds: Mapping[str, NDArray[Any]]) -> None:
    """Refuse what the library would cut off without a word: it computes larger whole numbers in 32 bits."""
    for name, array in feeds.items():
        if array.dtype in _CUT_OFF:
            outside = next((each for each in (array.min(), array.max()) if not _INT32.min <= each <= _INT32.max), None)
            if outside is not None:
                raise InvalidRequest(
                    f"input {name!r} takes numbers in {_INT32.min}..{_INT32.max}, because openvino computes in 32 "
                    f"bits, not {outside}"
                )


def _open(manifest: Manifest, store: ModelStore) -> _OpenVinoSession:
    (graph,) = (file for file in manifest.files if file.role == "graph")
    config = settings(manifest.model.dtype)
    for file in manifest.files:
        if file.role == "weights":
            config["WEIGHTS_PATH"] = str(store.blob_path(file.name))
    content = io.BytesIO(store.blob_path(graph.name).read_bytes())
    return _OpenVinoSession(
        core().import_model(content, DEVICE, config),
        [spec.name for spec in manifest.model.outputs],
        manifest.model.row_by_row,
    )


class OpenVinoRuntime:
    """The runtime of models that OpenVINO has compiled."""

    def environment(self) -> str:
        """Return what compiled models depend on, see ``Runtime.environment``."""
        library()
        # The library names itself with its build as well, which cannot be known without loading it.
        return environment("openvino", installed_version("openvino") or "")

    def prepare(self, manifest: Manifest, store: ModelStore) -> PreparedSession:
        """Check that the model was compiled for this machine, see ``Runtime.prepare``."""
        require_made_here(manifest, self.environment())
        return PreparedSession(manifest, store, _open)
