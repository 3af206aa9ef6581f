"""Photographs to compare variants of a model on: of a folder, or those that installed packages ship."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Sequence
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

#: The least square that is cut out at random, in parts of the shorter side.
_LEAST_PART: Final = 1 / 3

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
        image = _decoded(path, preset.channels)
        tensors += [torch.from_numpy(preprocess(square, preset))[None] for square in _squares(image)]
    return tensors


def random_squares(paths: Sequence[Path], count: int, channels: int, seed: int) -> Iterator[Image.Image]:
    """Yield squares that are cut out of photographs at random, as many of each as far as that is possible.

    Args:
        paths: the photographs; at least one.
        count: how many squares.
        channels: 1 for gray, 3 for RGB.
        seed: of the places and the sizes, from a third of the shorter side to all of it.

    Raises:
        ConfigError: a file is no image.
    """
    random = np.random.default_rng(seed)
    for number, path in enumerate(paths):
        image = _decoded(path, channels)
        for _ in range(count // len(paths) + (number < count % len(paths))):
            side = max(1, int(min(image.size) * random.uniform(_LEAST_PART, 1.0)))
            left, top = (int(random.integers(0, length - side + 1)) for length in image.size)
            yield image.crop((left, top, left + side, top + side))


def noise(shape: Sequence[int], count: int) -> list[torch.Tensor]:
    """Return tensors of seeded random numbers: what a model with random weights is compared on."""
    generator = np.random.default_rng(0)
    return [torch.from_numpy(generator.standard_normal((1, *shape), dtype=np.float32)) for _ in range(count)]


def _decoded(path: Path, channels: int) -> Image.Image:
    try:
        return decode_image(path.read_bytes(), _MAX_PIXELS, channels)
    except (OSError, InvalidRequest) as error:
        raise ConfigError(f"{path}: {error}") from error


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
