"""The tasks by their names in the catalog."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from serve_app.core.task import TaskKind
from serve_app.errors import InvalidRequest
from serve_app.tasks import image_classification
from serve_app.tasks.base import RawInput, Solution, Solve, TaskModel

SOLVERS: Final[Mapping[TaskKind, Solve]] = {
    "image-classification": image_classification.solve,
}


def solve(raw: RawInput, model: TaskModel) -> Solution:
    """Begin the task of a model on what a user has sent.

    Raises:
        InvalidRequest: the task of the model takes no raw input; or, once started, the input is of no use to it.
    """
    solver = SOLVERS.get(model.task.kind)
    if solver is None:
        raise InvalidRequest(
            f"model {model.model_id!r} has the task {model.task.kind!r}, which takes no raw input; "
            f"send tensors to /v2/models/{model.model_id}/infer"
        )
    return solver(raw, model)
