"""Task ``text-classification``: one text in, its best labels out.

A model that gives a vector for each token instead of scores classifies without having been trained for the labels: the
text belongs to the label whose own vector is the most like it. Labels are then words or sentences, and any will do.
"""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import NDArray

from serve_app.errors import InvalidRequest
from serve_app.tasks.base import RawInput, Solution, TaskModel
from serve_app.tasks.classes import classification, prediction_rows, scores_output, top_k, wanted_labels
from serve_app.tasks.embedding import text_vectors
from serve_app.tasks.text import encode, one_text, token_inputs

#: What cosines are multiplied by to be scores: with it, sentence transformers are trained.
_SCALE: Final = 20.0


def solve(raw: RawInput, model: TaskModel) -> Solution:
    """The task; option ``top_k``, 5 by default, and for models of vectors ``labels``, separated by commas."""
    count, text = wanted_labels(raw), one_text(raw)
    if _gives_vectors(model):
        return _compare(text, _labels(raw, model), count, model)
    return _classify(text, count, model)


def _classify(text: str, count: int, model: TaskModel) -> Solution:
    outputs = yield token_inputs(encode([text], model), model)
    return classification(outputs, model, count)


def _compare(text: str, labels: tuple[str, ...], count: int, model: TaskModel) -> Solution:
    vectors: NDArray[np.float64] = (yield from text_vectors([text, *labels], model))[0]
    vectors = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
    best = top_k(_SCALE * (vectors[1:] @ vectors[0]), labels, count)
    return {"predictions": prediction_rows(best)}


def _gives_vectors(model: TaskModel) -> bool:
    name = scores_output(model)
    return any(spec.name == name and len(spec.shape) == 3 for spec in model.contract.outputs)


def _labels(raw: RawInput, model: TaskModel) -> tuple[str, ...]:
    given = raw.options.get("labels")
    labels = model.task.labels if given is None else tuple(label.strip() for label in given.split(",") if label.strip())
    if len(labels) < 2:
        raise InvalidRequest(
            f"model {model.model_id!r} compares a text with labels; name two or more, such as labels=sport,music"
        )
    return labels
