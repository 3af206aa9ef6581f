"""What all classifications share: scores to probabilities, and the best classes by their labels."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from serve_app.core.task import Activation
from serve_app.errors import InvalidRequest
from serve_app.tasks.base import Answer, RawInput, TaskModel
from serve_app.tasks.tensors import Tensors

MAX_TOP_K = 1000


@dataclass(frozen=True, slots=True, kw_only=True)
class Prediction:
    """One class of a classification."""

    label: str
    index: int
    probability: float


def label_count(value: str) -> int:
    """Check the option ``top_k``.

    Raises:
        InvalidRequest: it is not a whole number in range.
    """
    if re.fullmatch("[0-9]{1,4}", value) is None or not 1 <= int(value) <= MAX_TOP_K:
        raise InvalidRequest(f"top_k must be a whole number from 1 to {MAX_TOP_K}, not {value[:32]!r}")
    return int(value)


def wanted_labels(raw: RawInput) -> int:
    """Return the option ``top_k`` of a request, 5 by default.

    Raises:
        InvalidRequest: it is not a whole number in range.
    """
    return label_count(raw.options.get("top_k", "5"))


def probabilities(scores: NDArray[Any], activation: Activation | None) -> NDArray[np.float64]:
    """Return the probability of each class.

    A single score of a model without an activation is that of the second of two classes.

    Args:
        scores: shape (classes,).
        activation: softmax by default.
    """
    exact = scores.astype(np.float64)
    if exact.size == 1:
        positive = exact[0] if activation == "none" else _sigmoid(exact)[0]
        return np.array([1 - positive, positive])
    if activation == "none":
        return exact
    if activation == "sigmoid":
        return _sigmoid(exact)
    exponentials = np.exp(exact - np.max(exact))
    result: NDArray[np.float64] = exponentials / exponentials.sum()
    return result


def top_k(
    scores: NDArray[Any], labels: Sequence[str], k: int, activation: Activation | None = None
) -> tuple[Prediction, ...]:
    """Return the ``k`` most probable classes, best first; all of them if there are fewer.

    Args:
        scores: shape (classes,).
        labels: one per class; a class without a label is named by its number.
        k: at least 1.
        activation: what makes probabilities of scores; softmax by default.

    Raises:
        InvalidRequest: ``k`` is less than 1.
    """
    if k < 1:
        raise InvalidRequest(f"top_k must be at least 1, not {k}")
    found = probabilities(scores, activation)
    best = np.argsort(-found, kind="stable")[:k]
    return tuple(
        Prediction(label=label_of(int(index), labels), index=int(index), probability=float(found[index]))
        for index in best
    )


def label_of(index: int, labels: Sequence[str]) -> str:
    """Return the label of a class; its number if it has none."""
    return labels[index] if index < len(labels) else str(index)


def classification(outputs: Tensors, model: TaskModel, count: int) -> Answer:
    """Return the answer of a classification: its best classes, from the last output of one input."""
    scores = outputs[scores_output(model)].reshape(-1)
    return {"predictions": prediction_rows(top_k(scores, model.task.labels, count, model.task.activation))}


def prediction_rows(predictions: Sequence[Prediction]) -> list[dict[str, Any]]:
    """Return predictions as JSON has them."""
    return [{"label": each.label, "index": each.index, "probability": each.probability} for each in predictions]


def scores_output(model: TaskModel) -> str:
    """Return the name of the output with the scores: the first of floats, since some models name the best class too."""
    outputs = model.contract.outputs
    return next((spec.name for spec in outputs if spec.datatype.startswith(("FP", "BF"))), outputs[0].name)


def _sigmoid(values: NDArray[np.float64]) -> NDArray[np.float64]:
    # Of tanh, because exp overflows on large negative scores.
    result: NDArray[np.float64] = (1 + np.tanh(values / 2)) / 2
    return result
