"""The interface of a task: from the bytes of a user to tensors, and from tensors to an answer for people.

A task is a generator function. It yields the inputs of one execution and is sent its outputs, as often as it needs, and
returns the answer. What it does before the first ``yield`` happens before anything is loaded, so that bad input never
displaces a good model::

    def classify(raw: RawInput, model: TaskModel) -> Solution:
        pixels = preprocess(decode(raw.data), model.task.image)
        outputs = yield {model.contract.inputs[0].name: pixels[None]}
        return {"predictions": top_k(outputs[model.contract.outputs[0].name][0], model.task.labels, raw.top_k)}

To add a task, write such a function, and name it in ``registry``.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from serve_app.core.contract import Contract
from serve_app.core.task import TaskSpec
from serve_app.tasks.tensors import Tensors

#: What a task returns: an object that JSON can carry.
Answer = dict[str, Any]

#: Yields inputs, is sent outputs, returns the answer.
Solution = Generator[Tensors, Tensors, Answer]


@dataclass(frozen=True, slots=True, kw_only=True)
class RawInput:
    """What a user sends to a task.

    Attributes:
        data: an image file, text, a WAV file or JSON.
        content_type: of ``data``, in lower case without parameters; empty if the user names none.
        options: of the request, by name, such as ``top_k``; each task checks its own.
    """

    data: bytes
    content_type: str = ""
    options: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskModel:
    """What a task knows of its model.

    Attributes:
        max_pixels: of an image that is decoded.
        tokenizer: the file of the tokenizer; None if the task has none.
    """

    model_id: str
    contract: Contract
    task: TaskSpec
    max_pixels: int
    tokenizer: Path | None = None


#: One task; raises ``InvalidRequest`` before its first ``yield`` for input that it cannot use.
Solve = Callable[[RawInput, TaskModel], Solution]
