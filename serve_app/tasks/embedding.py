"""Task ``embedding``: texts or an image in, vectors out whose angles say how alike they are."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from serve_app.core.task import Pooling
from serve_app.errors import InvalidRequest
from serve_app.tasks.base import RawInput, Solution, TaskModel
from serve_app.tasks.images import image_input
from serve_app.tasks.tensors import Tensors
from serve_app.tasks.text import encode, texts_of, token_inputs

#: Texts of one request.
MAX_TEXTS = 2048


def solve(raw: RawInput, model: TaskModel) -> Solution:
    """The task: an image, or one or several texts."""
    if model.task.tokenizer is None and model.task.image is not None:
        return _solve_image(raw, model)
    return _solve_texts(raw, model)


def _solve_image(raw: RawInput, model: TaskModel) -> Solution:
    inputs, _ = image_input(raw.data, model)
    outputs = yield inputs
    vectors = _vectors(outputs, None, model)
    if model.task.normalize:
        vectors = _normalized(vectors)
    return {"embeddings": vectors.tolist(), "dimensions": vectors.shape[1]}


def _solve_texts(raw: RawInput, model: TaskModel) -> Solution:
    texts = texts_of(raw)
    if len(texts) > MAX_TEXTS:
        raise InvalidRequest(f"there may be {MAX_TEXTS} texts in a request, not {len(texts)}")
    vectors, tokens = yield from text_vectors(texts, model)
    if model.task.normalize:
        vectors = _normalized(vectors)
    return {"embeddings": vectors.tolist(), "dimensions": vectors.shape[1], "tokens": tokens}


def text_vectors(
    texts: Sequence[str], model: TaskModel
) -> Generator[Tensors, Tensors, tuple[NDArray[np.float64], int]]:
    """Return the vector of each text, and the tokens of all of them, by as few executions as the model allows.

    Raises:
        InvalidRequest: a text has more tokens than the model takes.
    """
    encoded = encode(texts, model)
    # The longest first: the memory of a request is counted by its first execution. Texts of one length are executed
    # together, as far as the model takes a batch.
    order = sorted(range(len(texts)), key=lambda position: -encoded[position].length)
    batch = model.contract.batch
    rows = batch.most if batch is not None else 1
    found: dict[int, NDArray[np.float64]] = {}
    for start in range(0, len(order), rows):
        positions = order[start : start + rows]
        inputs = token_inputs([encoded[position] for position in positions], model)
        outputs = yield inputs
        found.update(zip(positions, _vectors(outputs, inputs.get("attention_mask"), model), strict=True))
    return np.stack([found[position] for position in range(len(texts))]), sum(each.length for each in encoded)


def _vectors(outputs: Tensors, mask: NDArray[Any] | None, model: TaskModel) -> NDArray[np.float64]:
    values = outputs[_output(model)].astype(np.float64)
    return pooled(values, mask, model.task.pooling)


def _normalized(vectors: NDArray[np.float64]) -> NDArray[np.float64]:
    result: NDArray[np.float64] = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
    return result


def _output(model: TaskModel) -> str:
    """Return the output that vectors are taken from: pooled ones if the model has them and they are asked for."""
    outputs = model.contract.outputs
    rank = 2 if model.task.pooling == "none" else 3
    return next((spec.name for spec in outputs if len(spec.shape) == rank), outputs[0].name)


def pooled(values: NDArray[np.float64], mask: NDArray[Any] | None, pooling: Pooling) -> NDArray[np.float64]:
    """Return one vector a row.

    Args:
        values: shape (rows, tokens, dimensions), or (rows, ...) where the model pools itself.
        mask: shape (rows, tokens), 1 for a token and 0 for filling; None: all are tokens.
        pooling: how.
    """
    if values.ndim != 3 or pooling == "none":
        return values.reshape(len(values), -1)
    if pooling == "first":
        return values[:, 0]
    weights = np.ones(values.shape[:2]) if mask is None else mask.astype(np.float64)
    total = np.einsum("rtd,rt->rd", values, weights)
    result: NDArray[np.float64] = total / np.maximum(weights.sum(axis=1, keepdims=True), 1e-9)
    return result
