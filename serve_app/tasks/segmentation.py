"""Task ``segmentation``: one image in, the class of each of its pixels out."""

from __future__ import annotations

import base64
import io
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from serve_app.errors import InvalidRequest
from serve_app.tasks.base import RawInput, Solution, TaskModel
from serve_app.tasks.classes import label_of
from serve_app.tasks.images import Placement, image_input


def solve(raw: RawInput, model: TaskModel) -> Solution:
    """The task; option ``mask``: whether the answer holds one, ``true`` by default.

    The mask is a gray PNG as large as the picture, whose values are the numbers of the classes.
    """
    wants_mask = raw.options.get("mask", "true")
    if wants_mask not in ("true", "false"):
        raise InvalidRequest(f"mask must be true or false, not {wants_mask[:32]!r}")
    inputs, placement = image_input(raw.data, model)
    outputs = yield inputs
    threshold = 0.5 if model.task.activation == "none" else 0.0
    classes = classes_of_pixels(outputs[model.contract.outputs[0].name][0], placement, threshold)
    counts = np.bincount(classes.reshape(-1))
    order = [int(index) for index in np.argsort(-counts, kind="stable") if counts[index]]
    answer: dict[str, Any] = {
        "classes": [
            {"label": label_of(index, model.task.labels), "index": index, "share": float(counts[index] / classes.size)}
            for index in order
        ],
        "picture": {"width": placement.width, "height": placement.height},
    }
    if wants_mask == "true":
        answer["mask"] = {"encoding": "png;base64", "data": base64.b64encode(_png(classes)).decode()}
    return answer


def classes_of_pixels(scores: NDArray[Any], placement: Placement, threshold: float = 0.0) -> NDArray[np.uint8]:
    """Return the class of every pixel of the picture.

    Args:
        scores: shape (classes, height, width) of the model's output, which may be smaller than its input.
        placement: of the picture in the input.
        threshold: with a single class, pixels of a higher score are of class 1, and the others of class 0.

    Returns:
        Shape (height, width) of the picture; pixels that the model has not seen are of class 0.
    """
    best = (scores[0] > threshold).astype(np.uint8) if len(scores) == 1 else scores.argmax(axis=0).astype(np.uint8)
    height, width = best.shape
    # The output covers the whole input, in a resolution of its own.
    columns = _positions(placement.width, placement.scale_x, placement.left, width / placement.input_width)
    rows = _positions(placement.height, placement.scale_y, placement.top, height / placement.input_height)
    result: NDArray[np.uint8] = best[np.clip(rows, 0, height - 1)][:, np.clip(columns, 0, width - 1)]
    result[(rows < 0) | (rows >= height)] = 0
    result[:, (columns < 0) | (columns >= width)] = 0
    return result


def _positions(size: int, scale: float, offset: float, output_scale: float) -> NDArray[np.intp]:
    """Return the row or column of the output that each pixel of a side of the picture falls into."""
    inside = ((np.arange(size) + 0.5) * scale + offset) * output_scale
    positions: NDArray[np.intp] = np.floor(inside).astype(np.intp)
    return positions


def _png(classes: NDArray[np.uint8]) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(classes, "L").save(buffer, "PNG")
    return buffer.getvalue()
