"""The beginning and the end of a file say what it is."""

from __future__ import annotations

import numpy as np
import pytest
from task_support import answer, model_of, tensor

from serve_app.core.task import TaskSpec
from serve_app.errors import InvalidRequest
from serve_app.tasks.bytes_classification import features_of

MODEL = model_of(
    TaskSpec(kind="bytes-classification", labels=("text", "data"), activation="none"),
    [tensor("bytes", "INT32", -1, 8)],
    [tensor("scores", "FP32", -1, 2)],
)


def test_a_short_file_is_filled_up_at_its_end_and_at_its_beginning() -> None:
    assert features_of(b"  ab ", 4).tolist() == [97, 98, 32, 256, 32, 32, 97, 98]
    assert features_of(b"   ", 2).tolist() == [256, 256, 256, 256]


def test_of_a_long_file_both_ends_count() -> None:
    assert features_of(b"abc" + b"-" * 9000 + b"xyz", 3).tolist() == list(b"abcxyz")


def test_probabilities_of_the_model_are_the_answer() -> None:
    def run(inputs):
        assert inputs["bytes"].dtype == np.int32
        return {"scores": np.array([[0.25, 0.75]], np.float32)}

    found = answer(b"12345678", MODEL, run)
    assert found["predictions"][0] == {"label": "data", "index": 1, "probability": 0.75}


def test_a_few_bytes_are_refused() -> None:
    with pytest.raises(InvalidRequest, match="8 bytes or more, not 7"):
        answer(b"1234567", MODEL, dict)
