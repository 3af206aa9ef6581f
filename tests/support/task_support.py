"""Run a task as a worker does, on a model that is a function of numpy arrays."""

from __future__ import annotations

import io
import wave
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from serve_app.core.contract import Axis, Contract, TensorSpec
from serve_app.core.task import TaskSpec
from serve_app.tasks.base import RawInput, TaskModel
from serve_app.tasks.registry import solve
from serve_app.tasks.tensors import Tensors, complete

Run = Callable[[Tensors], dict[str, np.ndarray]]


def tensor(name: str, datatype: str, *shape: int, **options: Any) -> TensorSpec:
    return TensorSpec(name=name, datatype=datatype, shape=shape, **options)


def model_of(
    task: TaskSpec, inputs: list[TensorSpec], outputs: list[TensorSpec], *axes: Axis, tokenizer: Path | None = None
) -> TaskModel:
    free = dict.fromkeys(axis for spec in inputs for axis in spec.axes if axis)
    limits = {axis.name: axis for axis in axes}
    return TaskModel(
        model_id="model",
        contract=Contract(
            inputs=tuple(inputs),
            outputs=tuple(outputs),
            axes=tuple(limits.get(name, Axis(name=name, most=32)) for name in free),
        ),
        task=task,
        max_pixels=1_000_000,
        tokenizer=tokenizer,
    )


def answer(data: bytes, model: TaskModel, run: Run, content_type: str = "", **options: str) -> dict[str, Any]:
    """The answer of a task; every input of every execution is checked by the contract, as workers do."""
    solution = solve(RawInput(data=data, content_type=content_type, options=options), model)
    wanted = next(solution)
    while True:
        try:
            wanted = solution.send(run(complete(wanted, model.contract)[0]))
        except StopIteration as done:
            return done.value


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def wav(samples: np.ndarray, rate: int, width: int = 2) -> bytes:
    """``samples`` of shape (frames, channels) in -1..1."""
    numbers = np.round(samples * (2 ** (8 * width - 1) - 1)).astype("<i4")
    if width == 1:
        content = (numbers + 128).astype(np.uint8).tobytes()
    else:
        content = numbers[..., None].view(np.uint8)[..., :width].tobytes()
    buffer = io.BytesIO()
    with wave.open(buffer, "wb") as file:
        file.setnchannels(samples.shape[1])
        file.setsampwidth(width)
        file.setframerate(rate)
        file.writeframes(content)
    return buffer.getvalue()
