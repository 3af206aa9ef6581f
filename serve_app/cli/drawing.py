"""Answers of models, drawn into a copy of the picture that was sent."""

from __future__ import annotations

import base64
import colorsys
import io
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from serve_app.errors import EdgeServeError

_OPACITY = 0.5

#: Steps on the circle of hues, so that neighbors differ: the golden ratio.
_HUE_STEP = 0.618034


def draw(data: bytes, answer: dict[str, Any]) -> Image.Image:
    """Return the picture with the boxes or the mask of an answer.

    Args:
        data: the picture as it was sent.
        answer: of ``/v1/predict``.

    Raises:
        EdgeServeError: the answer has neither boxes nor a mask.
    """
    if not {"detections", "mask"} & answer.keys():
        raise EdgeServeError(
            f"model {answer['model']} has the task {answer['task']}, whose answer cannot be drawn; leave --output out"
        )
    picture = Image.open(io.BytesIO(data)).convert("RGB")
    if "mask" in answer:
        return _with_mask(picture, answer["mask"]["data"])
    _draw_boxes(picture, answer["detections"])
    return picture


def color_of(index: int) -> tuple[int, int, int]:
    """Return the color of a class."""
    red, green, blue = colorsys.hsv_to_rgb(index * _HUE_STEP % 1, 0.8, 1)
    return round(red * 255), round(green * 255), round(blue * 255)


def _draw_boxes(picture: Image.Image, detections: list[dict[str, Any]]) -> None:
    pen = ImageDraw.Draw(picture)
    size = max(12, min(picture.size) // 40)
    font = ImageFont.load_default(size)
    # The best ones last, so that they are on top.
    for found in reversed(detections):
        color, (left, top, right, bottom) = color_of(found["index"]), found["box"]
        pen.rectangle((left, top, max(left, right), max(top, bottom)), outline=color, width=max(2, size // 6))
        text = f"{found['label']} {found['score']:.2f}"
        corner = (left, max(0, top - size - 4))
        pen.rectangle(pen.textbbox(corner, text, font), fill=color)
        pen.text(corner, text, fill="black", font=font)


def _with_mask(picture: Image.Image, encoded: str) -> Image.Image:
    """Return the picture under the colors of its classes; class 0 is the background, which has none."""
    classes = np.asarray(Image.open(io.BytesIO(base64.b64decode(encoded))))
    colors = np.array([color_of(index) for index in range(256)], np.uint8)
    pixels = np.asarray(picture, np.float64)
    mixed = (1 - _OPACITY) * pixels + _OPACITY * colors[classes]
    return Image.fromarray(np.where(classes[:, :, None] == 0, pixels, mixed).round().astype(np.uint8))
