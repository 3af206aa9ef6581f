"""What compiled models depend on, found without loading a library: routers ask too."""

from __future__ import annotations

import importlib.metadata
from functools import cache

from serve_app.core.catalog import RuntimeName
from serve_app.models.runtimes.processor import processor
from serve_app.store.forms import Environments

#: Those that modules are compiled for; their packages have the same names.
_LIBRARIES: tuple[RuntimeName, ...] = ("onnxruntime", "openvino")


@cache
def environments() -> Environments:
    """Return what a compiled form of a model must have been made for to be used on this machine."""
    versions = {library: installed_version(library) for library in _LIBRARIES}
    return {library: environment(library, version) for library, version in versions.items() if version is not None}


def environment(library: RuntimeName, version: str) -> str:
    """Return what files depend on that this version of a library has compiled here."""
    return f"{library} {version} {processor()}"


def installed_version(library: RuntimeName) -> str | None:
    """Return the version of a library; None if it is not installed."""
    try:
        return importlib.metadata.version(library)
    except importlib.metadata.PackageNotFoundError:
        return None
