"""Task ``text-classification``: one text in, its best labels out."""

from __future__ import annotations

from serve_app.tasks.base import RawInput, Solution, TaskModel
from serve_app.tasks.classes import classification, wanted_labels
from serve_app.tasks.text import one_text, token_inputs


def solve(raw: RawInput, model: TaskModel) -> Solution:
    """The task; option ``top_k``, 5 by default."""
    count = wanted_labels(raw)
    outputs = yield token_inputs([one_text(raw)], model)
    return classification(outputs, model, count)
