"""Task ``image-classification``: one image in, its best labels out."""

from __future__ import annotations

from serve_app.tasks.base import RawInput, Solution, TaskModel
from serve_app.tasks.classes import classification, wanted_labels
from serve_app.tasks.images import image_input


def solve(raw: RawInput, model: TaskModel) -> Solution:
    """The task; option ``top_k``, 5 by default."""
    count = wanted_labels(raw)
    inputs, _ = image_input(raw.data, model)
    outputs = yield inputs
    return classification(outputs, model, count)
