"""What compiled models depend on, found without loading a library: routers ask too."""

from __future__ import annotations

import importlib.metadata
from functools import cache

from serve_app.models.runtimes.processor import processor
from serve_app.store.forms import Environments


@cache
def environments() -> Environments:
    """Return what a compiled form of a model must have been made for to be used on this machine."""
    version = onnxruntime_version()
    return {} if version is None else {"onnxruntime": onnxruntime_environment(version)}


def onnxruntime_environment(version: str) -> str:
    """Return what graphs depend on that ONNX Runtime of this version has optimized here."""
    return f"onnxruntime {version} {processor()}"


def onnxruntime_version() -> str | None:
    """Return the version of ONNX Runtime; None if it is not installed."""
    try:
        return importlib.metadata.version("onnxruntime")
    except importlib.metadata.PackageNotFoundError:
        return None
