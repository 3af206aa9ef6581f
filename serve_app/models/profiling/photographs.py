"""Photographs to compare variants of a model on: of a folder, or those that installed packages ship."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import numpy as np
import torch
from PIL import Image

from serve_app.core.task import ImageInput
from serve_app.errors import ConfigError, InvalidRequest
from serve_app.tasks.images import FORMATS, decode_image, preprocess

_ENDINGS: Final = (".jpg", ".jpeg", ".png", ".webp")

#: Photographs in packages that may be installed; the first is a dependency of EdgeServe.
_SHIPPED: Final = (
    ("matplotlib", "mpl-data/sample_data/grace_hopper.jpg"),
    ("skimage", "data/astronaut.png"),
    ("skimage", "data/camera.png"),
    ("skimage", "data/chelsea.png"),
    ("skimage", "data/coffee.png"),
    ("skimage", "data/motorcycle_left.png"),
    ("skimage", "data/rocket.jpg"),
    ("sklearn", "datasets/images/china.jpg"),
    ("sklearn", "datasets/images/flower.jpg"),
)

#: The parts of the shorter side that are cut out of every photograph.
_PARTS: Final = (1.0, 0.75, 0.5)

_MAX_PIXELS: Final = 100_000_000


def find_photographs(folder: Path | None) -> tuple[Path, ...]:
    """Return the images of a folder; without one, those that installed packages ship.

    Raises:
        ConfigError: the folder has no JPEG, PNG or WebP.
    """
    if folder is None:
        found = (_package_folder(package) / path for package, path in _SHIPPED if importlib.util.find_spec(package))
        return tuple(path for path in found if path.is_file())
    images = tuple(path for path in sorted(folder.iterdir()) if path.suffix.lower() in _ENDINGS)
    if not images:
        raise ConfigError(f"{folder} has no image; the formats are {', '.join(FORMATS)}")
    return images


def crops(paths: Sequence[Path], preset: ImageInput) -> list[torch.Tensor]:
    """Cut squares of three sizes out of each photograph, eleven in all, and convert them to the input of a model.

    Returns:
        Tensors of shape (1, channels, side, side).

    Raises:
        ConfigError: a file is no image.
    """
    tensors = []
    for path in paths:
        try:
            image = decode_image(path.read_bytes(), _MAX_PIXELS, preset.channels)
        except (OSError, InvalidRequest) as error:
            raise ConfigError(f"{path}: {error}") from error
        tensors += [torch.from_numpy(preprocess(square, preset))[None] for square in _squares(image)]
    return tensors


def noise(shape: Sequence[int], count: int) -> list[torch.Tensor]:
    """Return tensors of seeded random numbers: what a model with random weights is compared on."""
    generator = np.random.default_rng(0)
    return [torch.from_numpy(generator.standard_normal((1, *shape), dtype=np.float32)) for _ in range(count)]


def _squares(image: Image.Image) -> list[Image.Image]:
    """Return the middle, and of the smaller sizes four corners as well."""
    squares = []
    for part in _PARTS:
        side = max(1, int(min(image.size) * part))
        right, bottom = image.width - side, image.height - side
        corners = [(right // 2, bottom // 2)]
        if part < 1:
            corners += [(0, 0), (right, 0), (0, bottom), (right, bottom)]
        squares += [image.crop((left, top, left + side, top + side)) for left, top in corners]
    return squares


def _package_folder(name: str) -> Path:
    spec = importlib.util.find_spec(name)
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent
