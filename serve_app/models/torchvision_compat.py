"""Make ``import torchvision`` and its detectors work with a CPU-only torch.

The torchvision wheel of the package index is built against CUDA. Beside a torch without CUDA its C++ extension cannot
be loaded, and ``import torchvision`` then fails with ``operator torchvision::nms does not exist``, because it
registers shapes for two operators that only the extension declares. They are declared here first, with implementations
on tensors for those that detectors call.

Nor does it import torch's compiler from here, which no model needs that is run eagerly.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import sys
import threading
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

_SCHEMAS = {
    "nms": "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms": "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "roi_align": (
        "(Tensor input, Tensor rois, float spatial_scale, SymInt pooled_height, SymInt pooled_width, "
        "int sampling_ratio, bool aligned) -> Tensor"
    ),
}

#: Regions that are aligned together: the reference needs memory for each point of each of them.
_REGIONS = 16

_lock = threading.RLock()


def import_torchvision() -> Any:
    """Import ``torchvision``, whether or not its C++ extension fits the installed torch."""
    with _lock:
        declare_missing_operators()
        with _without_compiler():
            torchvision = importlib.import_module("torchvision")
        let_operators_be_called()
        return torchvision


@contextlib.contextmanager
def _without_compiler() -> Iterator[None]:
    """Keep an import of torchvision from importing torch's compiler: seconds and tens of megabytes in every worker.

    Its ``roi_align`` wants one function of it, which says whether the compiler can be used. Whoever imports the
    compiler later gets the real one.
    """
    names = ("torch._dynamo", "torch._dynamo.utils")
    if any(name in sys.modules for name in names):
        yield
        return
    package, utils = (types.ModuleType(name) for name in names)
    package.__path__ = []
    utils.is_compile_supported = lambda device: False  # type: ignore[attr-defined]
    sys.modules |= {names[0]: package, names[1]: utils}
    try:
        yield
    finally:
        for name in names:
            sys.modules.pop(name, None)


def declare_missing_operators(is_extension_loaded: Callable[[], bool] | None = None) -> None:
    """Declare the operators that torchvision's extension would, unless it can be loaded or they already exist.

    Call it before anything that imports torchvision by itself, as transformers and timm do.

    Args:
        is_extension_loaded: loads the extension and returns whether it loads; by default that of torchvision.
    """
    with _lock:
        if all(hasattr(torch.ops.torchvision, name) for name in _SCHEMAS):
            return
        if (is_extension_loaded or load_extension)():
            return
        for name, schema in _SCHEMAS.items():
            if not hasattr(torch.ops.torchvision, name):
                torch.library.define(f"torchvision::{name}", schema)
                implementation = _IMPLEMENTATIONS.get(name)
                if implementation is not None:
                    torch.library.impl(f"torchvision::{name}", "cpu", implementation)


def let_operators_be_called() -> None:
    """Let an imported torchvision call the operators that are declared here, rather than say that they are missing."""
    extension = sys.modules.get("torchvision.extension")
    if extension is None or extension._has_ops():
        return
    for name in ("torchvision.ops.boxes", "torchvision.ops.roi_align"):
        module: Any = sys.modules.get(name)
        if module is not None:
            module._assert_has_ops = lambda: None
            module._has_ops = lambda: True


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


def suppress_overlaps(boxes: torch.Tensor, scores: torch.Tensor, iou_threshold: float) -> torch.Tensor:
    """Return the positions of the boxes to keep, best first: ``torchvision::nms``.

    A box is dropped if its intersection over union with a better box that is kept is larger than the threshold.

    Args:
        boxes: (n, 4), as corners.
        scores: (n,).
        iou_threshold: 0..1.
    """
    order = torch.argsort(scores, descending=True, stable=True)
    sides = boxes[order]
    areas = (sides[:, 2] - sides[:, 0]) * (sides[:, 3] - sides[:, 1])
    is_dropped = torch.zeros(len(order), dtype=torch.bool)
    kept = []
    for position in range(len(order)):
        if is_dropped[position]:
            continue
        kept.append(position)
        best, rest = sides[position], sides[position + 1 :]
        corner = torch.minimum(rest[:, 2:], best[2:]) - torch.maximum(rest[:, :2], best[:2])
        common = corner.clamp_(min=0).prod(dim=1)
        # Boxes without an area give no number, and are kept.
        is_dropped[position + 1 :] |= common / (areas[position + 1 :] + areas[position] - common) > iou_threshold
    return order[kept]


def align_regions(
    features: torch.Tensor, regions: torch.Tensor, scale: float, height: int, width: int, ratio: int, aligned: bool
) -> torch.Tensor:
    """Return the features within each region, resampled: ``torchvision::roi_align`` by torchvision's own reference."""
    # What it is decorated with would compile it.
    reference = sys.modules["torchvision.ops.roi_align"]._roi_align.__wrapped__
    parts = [reference(features, part, scale, height, width, ratio, aligned) for part in torch.split(regions, _REGIONS)]
    return torch.cat(parts) if parts else features.new_empty((0, features.shape[1], height, width))


_IMPLEMENTATIONS: dict[str, Callable[..., torch.Tensor]] = {"nms": suppress_overlaps, "roi_align": align_regions}
