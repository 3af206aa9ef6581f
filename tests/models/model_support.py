"""Catalogue entries and inputs that the tests of the store, the loader and the publisher share."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from serve_app.core.catalog import ImageInput, ModelEntry

SMALL_INPUT = ImageInput(resize_px=32, crop_px=32)


def tiny(name: str, factory: str = "Tied", weights: str = "random:3", **fields: object) -> ModelEntry:
    return ModelEntry(model_id=name, builder=f"tiny_models:{factory}", weights=weights, input=SMALL_INPUT, **fields)


def vision(name: str, weights: str = "random:7", **fields: object) -> ModelEntry:
    return ModelEntry(model_id=name, builder=f"torchvision:{name}", weights=weights, **fields)


VISION = tuple(vision(name) for name in ("squeezenet1_1", "shufflenet_v2_x0_5", "mobilenet_v3_small"))


def images(count: int = 1, side: int = 224, seed: int = 1) -> NDArray[np.float32]:
    return np.random.default_rng(seed).standard_normal((count, 3, side, side), dtype=np.float32)


def offline(url: str) -> bool:
    return False


def mapped(path: Path) -> bool:
    """Whether this process has the file in its memory map."""
    return path.name in Path("/proc/self/maps").read_text()
