"""The runtimes by their names in manifests and catalogs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from serve_app.core.catalog import RuntimeName
from serve_app.models.runtimes.base import PreparedModel, Runtime
from serve_app.models.runtimes.onnx_runtime import OnnxRuntime
from serve_app.models.runtimes.openvino_runtime import OpenVinoRuntime
from serve_app.models.runtimes.torch_runtime import TorchRuntime
from serve_app.store.manifest import Manifest
from serve_app.store.model_store import ModelStore

RUNTIMES: Final[Mapping[RuntimeName, Runtime]] = {
    "torch": TorchRuntime(),
    "onnxruntime": OnnxRuntime(),
    "openvino": OpenVinoRuntime(),
}


def prepare(manifest: Manifest, store: ModelStore) -> PreparedModel:
    """Prepare a model with the runtime that its manifest names; raises ``StoreError`` like ``Runtime.prepare``."""
    return RUNTIMES[manifest.execution.runtime].prepare(manifest, store)


def is_made_here(manifest: Manifest) -> bool:
    """Return whether the files of a model were made for the libraries and the processor of this machine.

    Raises:
        StoreError: the library of its runtime is not installed.
    """
    return manifest.execution.made_for == RUNTIMES[manifest.execution.runtime].environment()
