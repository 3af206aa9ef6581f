"""Boxes of detectors: rows (x1, y1, x2, y2) in pixels."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

#: Boxes that suppression looks at, best first: its time grows with their square.
_MOST = 4096


def from_centers(boxes: NDArray[np.floating]) -> NDArray[np.float64]:
    """Convert (center x, center y, width, height) to corners; shape (n, 4)."""
    half = boxes[:, 2:] / 2
    return np.concatenate([boxes[:, :2] - half, boxes[:, :2] + half], axis=1, dtype=np.float64)


def suppress(
    boxes: NDArray[np.float64], scores: NDArray[np.float64], classes: NDArray[np.integer], max_overlap: float
) -> NDArray[np.intp]:
    """Return the positions of the boxes that stay, best first: non-maximum suppression within each class.

    Args:
        boxes: shape (n, 4).
        scores: shape (n,).
        classes: shape (n,).
        max_overlap: of two boxes of one class whose intersection over union is larger, only the better one stays.
    """
    order = np.argsort(-scores, kind="stable")[:_MOST]
    kept: list[int] = []
    while order.size:
        best, rest = order[0], order[1:]
        kept.append(int(best))
        is_same = classes[rest] == classes[best]
        order = rest[~(is_same & (_overlap(boxes[best], boxes[rest]) > max_overlap))]
    return np.array(kept, np.intp)


def _overlap(box: NDArray[np.float64], others: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the intersection over union of one box with each of some others."""
    least, most = np.maximum(box[:2], others[:, :2]), np.minimum(box[2:], others[:, 2:])
    intersection = np.clip(most - least, 0, None).prod(axis=1)
    union = (box[2:] - box[:2]).prod() + (others[:, 2:] - others[:, :2]).prod(axis=1) - intersection
    result: NDArray[np.float64] = intersection / np.maximum(union, 1e-12)
    return result
