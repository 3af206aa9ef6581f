"""The tasks by their names in the catalog."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from serve_app.core.task import TaskKind
from serve_app.tasks import (
    bytes_classification,
    detection,
    embedding,
    image_classification,
    json_tensors,
    segmentation,
    text_classification,
    voice_activity,
)
from serve_app.tasks.base import RawInput, Solution, Solve, TaskModel

SOLVERS: Final[Mapping[TaskKind, Solve]] = {
    "tensors": json_tensors.solve,
    "image-classification": image_classification.solve,
    "text-classification": text_classification.solve,
    "bytes-classification": bytes_classification.solve,
    "embedding": embedding.solve,
    "detection": detection.solve,
    "segmentation": segmentation.solve,
    "voice-activity": voice_activity.solve,
}


def solve(raw: RawInput, model: TaskModel) -> Solution:
    """Begin the task of a model on what a user has sent; ``next`` raises ``InvalidRequest`` if it is of no use."""
    return SOLVERS[model.task.kind](raw, model)
