"""Convert the bytes of an image to the input of a classifier, and its logits to predictions.

The arithmetic is that of torchvision's ``ImageClassification`` preset on a PIL image, to the last bit.
"""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from serve_app.core.task import ImageInput
from serve_app.errors import InvalidRequest
from serve_app.tasks.base import RawInput, Solution, TaskModel

MAX_TOP_K = 1000

FORMATS = ("JPEG", "PNG", "WEBP")

#: Beyond this ratio of the sides only the cropped part is resized: an image one pixel high must not cost gigabytes.
MAX_RATIO = 32

_RESAMPLING = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}


@dataclass(frozen=True, slots=True, kw_only=True)
class Prediction:
    """One class of a classification; ``probability`` is the softmax over all classes."""

    label: str
    index: int
    probability: float


def solve(raw: RawInput, model: TaskModel) -> Solution:
    """The task: one image in, its best labels out; option ``top_k``, 5 by default."""
    count = label_count(raw.options.get("top_k", "5"))
    assert model.task.image is not None
    pixels = preprocess(decode_image(raw.data, model.max_pixels), model.task.image)
    outputs = yield {model.contract.inputs[0].name: pixels[None]}
    best = top_k(outputs[model.contract.outputs[0].name][0], model.task.labels, count)
    return {
        "predictions": [{"label": each.label, "index": each.index, "probability": each.probability} for each in best]
    }


def label_count(value: str) -> int:
    """Check the option ``top_k``.

    Raises:
        InvalidRequest: it is not a whole number in range.
    """
    if re.fullmatch("[0-9]{1,4}", value) is None or not 1 <= int(value) <= MAX_TOP_K:
        raise InvalidRequest(f"top_k must be a whole number from 1 to {MAX_TOP_K}, not {value[:32]!r}")
    return int(value)


def decode_image(data: bytes, max_pixels: int) -> Image.Image:
    """Decode a JPEG, PNG or WebP, recognized by its content, into an RGB image.

    The orientation of EXIF is not applied, as in torchvision's reference. Of an animation the first frame counts.

    Raises:
        InvalidRequest: it is none of these formats, damaged, truncated, or has more than ``max_pixels`` pixels.
    """
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
        width, height = image.size
        if width * height <= max_pixels:
            return _to_rgb(image)
    except UnidentifiedImageError as error:
        raise InvalidRequest("the body is not a JPEG, PNG or WebP image; send one of these") from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise InvalidRequest(
            f"the image is larger than the limit of {max_pixels} pixels; send a smaller one"
        ) from error
    except MemoryError:
        raise
    except Exception as error:  # Pillow's decoders raise nearly anything on damaged data
        raise InvalidRequest(f"the image is damaged or truncated ({error}); send it again whole") from error
    raise InvalidRequest(
        f"the image has {width}x{height} pixels, more than the limit of {max_pixels}; send a smaller one"
    )


def preprocess(image: Image.Image, spec: ImageInput) -> NDArray[np.float32]:
    """Resize, crop, scale and normalize an RGB image.

    Returns:
        float32 of shape (3, crop_px, crop_px).
    """
    cropped = _center_crop(_resize(image, spec), spec.crop_px)
    pixels = np.asarray(cropped, dtype=np.float32).transpose(2, 0, 1) / np.float32(255)
    mean = np.asarray(spec.mean, dtype=np.float32)[:, None, None]
    std = np.asarray(spec.std, dtype=np.float32)[:, None, None]
    return np.ascontiguousarray((pixels - mean) / std)


def top_k(logits: NDArray[np.float32], labels: Sequence[str], k: int) -> tuple[Prediction, ...]:
    """Return the ``k`` most probable classes, best first; all of them if there are fewer.

    Args:
        logits: shape (classes,).
        labels: one per class; a class without a label is named by its number.
        k: at least 1.

    Raises:
        InvalidRequest: ``k`` is less than 1.
    """
    if k < 1:
        raise InvalidRequest(f"top_k must be at least 1, not {k}")
    exponentials = np.exp(logits.astype(np.float64) - np.max(logits))
    probabilities = exponentials / exponentials.sum()
    best = np.argsort(-probabilities, kind="stable")[:k]
    return tuple(
        Prediction(
            label=labels[index] if index < len(labels) else str(index),
            index=int(index),
            probability=float(probabilities[index]),
        )
        for index in best
    )


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "P" and "transparency" in image.info:
        # Gives the same colors as the direct conversion, which warns about transparency given as bytes.
        image = image.convert("RGBA")
    return image.convert("RGB")


def _resize(image: Image.Image, spec: ImageInput) -> Image.Image:
    """Resize the shorter side to ``resize_px``; of a very long image keep only the middle."""
    width, height = image.size
    short, long = min(width, height), max(width, height)
    new_long = int(spec.resize_px * long / short)
    resampling = _RESAMPLING[spec.interpolation]
    if new_long <= MAX_RATIO * spec.resize_px:
        size = (spec.resize_px, new_long) if width <= height else (new_long, spec.resize_px)
        return image if size == image.size else image.resize(size, resampling)
    kept = max(spec.crop_px, spec.resize_px)
    start = round((new_long - kept) / 2) * long / new_long
    end = start + kept * long / new_long
    if width <= height:
        return image.resize((spec.resize_px, kept), resampling, box=(0, start, width, end))
    return image.resize((kept, spec.resize_px), resampling, box=(start, 0, end, height))


def _center_crop(image: Image.Image, crop_px: int) -> Image.Image:
    """Cut out the middle; pixels outside of a smaller image are black."""
    width, height = image.size
    if width < crop_px or height < crop_px:
        padded = Image.new("RGB", (max(width, crop_px), max(height, crop_px)))
        padded.paste(image, (max(0, crop_px - width) // 2, max(0, crop_px - height) // 2))
        image, (width, height) = padded, padded.size
    left, top = round((width - crop_px) / 2), round((height - crop_px) / 2)
    return image.crop((left, top, left + crop_px, top + crop_px))
