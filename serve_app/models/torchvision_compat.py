"""Make ``import torchvision`` work with a CPU-only torch.

The torchvision wheel of the package index is built against CUDA. Beside a torch without CUDA its C++ extension cannot
be loaded, and ``import torchvision`` then fails with ``operator torchvision::nms does not exist``, because it
registers shapes for two operators that only the extension declares. Declaring the two schemas first is enough:
classification models never call them.
"""

from __future__ import annotations

import importlib
import importlib.util
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

_SCHEMAS = {
    "nms": "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms": "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
}

_lock = threading.Lock()


def import_torchvision() -> Any:
    """Import ``torchvision``, whether or not its C++ extension fits the installed torch."""
    with _lock:
        declare_missing_operators()
        return importlib.import_module("torchvision")


def declare_missing_operators(is_extension_loaded: Callable[[], bool] | None = None) -> None:
    """Declare the operators that torchvision's extension would, unless it can be loaded or they already exist.

    Args:
        is_extension_loaded: loads the extension and returns whether it loads; by default that of torchvision.
    """
    if (is_extension_loaded or load_extension)():
        return
    for name, schema in _SCHEMAS.items():
        if not hasattr(torch.ops.torchvision, name):
            torch.library.define(f"torchvision::{name}", schema)


def load_extension() -> bool:
    """Load the extension as torchvision is about to, and return whether it loads; loading it twice is harmless."""
    spec = importlib.util.find_spec("torchvision")
    if spec is None or spec.origin is None:
        return False
    for path in sorted(Path(spec.origin).parent.glob("_C*.so")):
        try:
            torch.ops.load_library(str(path))  # type: ignore[no-untyped-call]
        except (OSError, ImportError):
            continue
        return True
    return False
