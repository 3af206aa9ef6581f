"""Task ``detection``: one image in, boxes with labels out, in pixels of that image.

It reads two layouts of outputs:

* three outputs ``boxes`` (n, 4) as corners in pixels of the input, ``scores`` (n,) and ``labels`` (n,), as torchvision
  has them, from which overlapping boxes are gone already;
* one output (1, 4 + classes, n) or (1, n, 4 + classes) with centers, sizes and the score of each class for every
  candidate, as YOLO has it since version 8; (1, n, 5 + classes) has in addition the score of there being anything.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from serve_app.errors import InvalidRequest
from serve_app.tasks.base import RawInput, Solution, TaskModel
from serve_app.tasks.boxes import from_centers, suppress
from serve_app.tasks.classes import label_of
from serve_app.tasks.images import image_input
from serve_app.tasks.tensors import Tensors

#: Boxes of an answer, best first.
MAX_DETECTIONS = 300


@dataclass(frozen=True, slots=True, kw_only=True)
class Detections:
    """Boxes as corners in pixels of the input, shape (n, 4); scores and classes, shape (n,); the best first."""

    boxes: NDArray[np.float64]
    scores: NDArray[np.float64]
    classes: NDArray[np.int64]


def solve(raw: RawInput, model: TaskModel) -> Solution:
    """The task; options ``min_score`` and ``max_overlap``, by default those of the model."""
    task = model.task
    min_score = share(raw, "min_score", task.min_score)
    max_overlap = share(raw, "max_overlap", task.max_overlap)
    inputs, placement = image_input(raw.data, model)
    outputs = yield inputs
    found = read_detections(outputs, len(task.labels), min_score, max_overlap)
    boxes = placement.to_picture(found.boxes)
    return {
        "detections": [
            {
                "label": label_of(int(index), task.labels),
                "index": int(index),
                "score": float(score),
                "box": [round(float(side), 2) for side in box],
            }
            for box, score, index in zip(boxes, found.scores, found.classes, strict=True)
        ],
        "picture": {"width": placement.width, "height": placement.height},
    }


def share(raw: RawInput, name: str, default: float) -> float:
    """Return an option that lies in 0..1.

    Raises:
        InvalidRequest: it does not.
    """
    given = raw.options.get(name)
    if given is None:
        return default
    try:
        value = float(given)
    except ValueError:
        value = float("nan")
    if not 0 <= value <= 1:
        raise InvalidRequest(f"{name} must be a number from 0 to 1, not {given[:32]!r}")
    return value


def read_detections(outputs: Tensors, labels: int, min_score: float, max_overlap: float) -> Detections:
    """Read what a detector gives; see the module for the layouts.

    Args:
        outputs: of one image.
        labels: how many the model has; 0 if that is not known.
        min_score: what scores less is left out.
        max_overlap: of two boxes of one class that overlap more only the better one stays.

    Raises:
        InvalidRequest: the outputs have another layout.
    """
    if {"boxes", "scores", "labels"} <= outputs.keys():
        return _read_apart(outputs, min_score)
    arrays = [array for array in outputs.values() if array.ndim == 3 and len(array) == 1]
    if len(arrays) != 1:
        shapes = ", ".join(f"{name} {list(array.shape)}" for name, array in outputs.items())
        raise InvalidRequest(
            f"the outputs {shapes} are none that task detection reads: boxes, scores and labels, or one of shape "
            "[1, 4 + classes, n]; send tensors to /v2/models/MODEL/infer"
        )
    return _read_together(arrays[0][0], labels, min_score, max_overlap)


def _read_apart(outputs: Tensors, min_score: float) -> Detections:
    scores = outputs["scores"].astype(np.float64).reshape(-1)
    boxes = outputs["boxes"].astype(np.float64).reshape(-1, 4)
    classes = outputs["labels"].astype(np.int64).reshape(-1)
    order = np.argsort(-scores, kind="stable")
    order = order[scores[order] >= min_score][:MAX_DETECTIONS]
    return Detections(boxes=boxes[order], scores=scores[order], classes=classes[order])


def _read_together(table: NDArray[Any], labels: int, min_score: float, max_overlap: float) -> Detections:
    rows = table if _is_row_by_candidate(table.shape, labels) else table.T
    scores = rows[:, 4:].astype(np.float64)
    if labels and scores.shape[1] == labels + 1:
        scores = scores[:, 1:] * scores[:, :1]
    classes, best = scores.argmax(axis=1), scores.max(axis=1)
    candidates = np.flatnonzero(best >= min_score)
    boxes = from_centers(rows[candidates, :4])
    kept = suppress(boxes, best[candidates], classes[candidates], max_overlap)[:MAX_DETECTIONS]
    chosen = candidates[kept]
    return Detections(boxes=boxes[kept], scores=best[chosen], classes=classes[chosen].astype(np.int64))


def _is_row_by_candidate(shape: tuple[int, ...], labels: int) -> bool:
    """Return whether each candidate is a row, by the number of classes, or else because there are more candidates."""
    if labels:
        return shape[1] in (4 + labels, 5 + labels)
    return shape[1] < shape[0]
