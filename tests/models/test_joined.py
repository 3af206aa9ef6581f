"""Publishing finds out which models answer several requests faster at once."""

from __future__ import annotations

import time
from typing import Any

import pytest
from numpy.typing import NDArray

from serve_app.core.contract import Axis, Contract, TensorSpec
from serve_app.models.profiling.joined import joined_elements
from serve_app.tasks.tensors import Tensors

CONTRACT = Contract(
    inputs=(TensorSpec(name="x", datatype="FP32", shape=(-1, 4)),),
    outputs=(TensorSpec(name="y", datatype="FP32", shape=(-1, 4)),),
    axes=(Axis(name="batch", most=16),),
)


class Sum:
    """Takes as long whatever the batch."""

    model_id, weights_bytes = "sum", 0

    def run(self, inputs: Tensors, threads: int = 0) -> dict[str, NDArray[Any]]:
        until = time.thread_time() + 0.001
        while time.thread_time() < until:
            pass
        return {"y": inputs["x"] + 1}

    def unload(self) -> None:
        return None


class RowByRow(Sum):
    """Takes twice as long for two."""

    def run(self, inputs: Tensors, threads: int = 0) -> dict[str, NDArray[Any]]:
        for _ in inputs["x"]:
            answer = super().run(inputs)
        return answer


class Centered(Sum):
    """Answers a row according to the others of its batch."""

    def run(self, inputs: Tensors, threads: int = 0) -> dict[str, NDArray[Any]]:
        return {"y": super().run(inputs)["y"] - inputs["x"].mean(0)}


class Cut(Sum):
    """Answers only the first row."""

    def run(self, inputs: Tensors, threads: int = 0) -> dict[str, NDArray[Any]]:
        return {"y": super().run(inputs)["y"][:1]}


pytestmark = pytest.mark.slow


def test_a_model_of_a_fixed_cost_is_executed_for_as_many_as_its_batch_allows() -> None:
    assert joined_elements(Sum(), CONTRACT, {}) == 16 * 4


@pytest.mark.parametrize("model", [RowByRow(), Centered(), Cut()], ids=lambda model: type(model).__name__)
def test_a_model_that_gains_nothing_or_answers_otherwise_is_executed_for_one_at_a_time(model: Sum) -> None:
    assert joined_elements(model, CONTRACT, {}) == 0


def test_requests_whose_outputs_have_sizes_of_their_own_are_never_joined() -> None:
    found = TensorSpec(name="boxes", datatype="FP32", shape=(-1, -1), axes=("batch", "found"))
    contract = Contract(inputs=CONTRACT.inputs, outputs=(found,), axes=CONTRACT.axes)
    assert joined_elements(Sum(), contract, {}) == 0
