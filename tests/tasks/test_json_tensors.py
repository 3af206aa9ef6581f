"""Numbers of a table come as JSON and go as JSON."""

from __future__ import annotations

import json

import numpy as np
import pytest
from task_support import answer, model_of, tensor

from serve_app.core.task import TaskSpec
from serve_app.errors import InvalidRequest

IRIS = model_of(
    TaskSpec(labels=("setosa", "versicolor", "virginica")),
    [tensor("X", "FP32", -1, 4)],
    [tensor("label", "INT64", -1), tensor("probabilities", "FP32", -1, 3)],
)
ROW = [5.1, 3.5, 1.4, 0.2]


def classify(inputs):
    rows = len(inputs["X"])
    assert inputs["X"].dtype == np.float32
    return {"label": np.zeros(rows, np.int64), "probabilities": np.tile(np.array([1, 0, 0], np.float32), (rows, 1))}


@pytest.mark.parametrize("body", [{"X": [ROW]}, {"X": ROW}, [ROW], ROW])
def test_a_row_of_a_table_is_answered_with_its_label(body) -> None:
    found = answer(json.dumps(body).encode(), IRIS, classify)
    assert found == {"outputs": {"label": [0], "probabilities": [[1, 0, 0]]}, "labels": ["setosa"]}


@pytest.mark.parametrize(
    ("body", "sentence"),
    [
        ("", "not JSON"),
        ("{", "not JSON"),
        ("3", r"the body is a JSON int; send .\"X\": \[\.\.\.\]"),
        ("{}", "input 'X' is missing"),
        ('{"Y": [1]}', "no input 'Y'; its inputs are X"),
        ('{"X": [[1, 2], [1]]}', "different lengths"),
        ('{"X": [["a", 2, 3, 4]]}', "FP32 of shape .-1, 4.; what was given is not all of that type"),
        ('{"X": [[null, 2, 3, 4]]}', "not all of that type"),
        ('{"X": [[NaN, 2, 3, 4]]}', "NaN is no number of JSON"),
        ('{"X": [[1e999, 2, 3, 4]]}', "a number is too large"),
        ('{"X": [[true, true, true, true]]}', "not all of that type"),
        ('{"X": [[1, 2, 3]]}', r"input 'X' takes shape \[-1, 4\]"),
        ('{"X": []}', "takes shape"),
    ],
)
def test_a_wrong_body_is_refused_with_the_input_and_what_it_takes(body: str, sentence: str) -> None:
    with pytest.raises(InvalidRequest, match=sentence):
        answer(body.encode(), IRIS, classify)


@pytest.mark.parametrize(("value", "is_right"), [(255, True), (256, False), (-1, False), (1.5, False), (2**70, False)])
def test_whole_numbers_must_be_in_the_range_of_their_type(value: float, is_right: bool) -> None:
    model = model_of(TaskSpec(), [tensor("x", "UINT8", 2)], [tensor("y", "UINT8", 2)])
    body = json.dumps({"x": [value, 7]}).encode()
    if is_right:
        assert answer(body, model, lambda inputs: {"y": inputs["x"]})["outputs"] == {"y": [value, 7]}
    else:
        with pytest.raises(InvalidRequest, match=r"whole numbers in its range|not all of that type"):
            answer(body, model, dict)


def test_texts_and_scalars_pass_and_what_is_not_finite_is_null() -> None:
    model = model_of(
        TaskSpec(),
        [tensor("name", "BYTES", -1), tensor("on", "BOOL"), tensor("rate", "FP32", default=2.0)],
        [tensor("out", "BYTES", -1), tensor("score", "FP32", 2)],
    )

    def run(inputs):
        assert (inputs["on"].shape, bool(inputs["on"]), float(inputs["rate"])) == ((), True, 2)
        return {"out": inputs["name"], "score": np.array([np.nan, 1], np.float32)}

    found = answer(b'{"name": ["J\xc3\xbcrgen"], "on": true}', model, run)
    assert found["outputs"] == {"out": ["Jürgen"], "score": [None, 1]}


WORDS = model_of(TaskSpec(), [tensor("t", "BYTES", -1, -1)], [tensor("out", "BYTES", -1, -1)])


def test_texts_are_taken_as_they_are() -> None:
    texts = [["a\0", "", "é" * 1000]]
    assert answer(json.dumps(texts).encode(), WORDS, lambda inputs: {"out": inputs["t"]}) == {"outputs": {"out": texts}}


@pytest.mark.parametrize(
    ("body", "sentence"),
    [
        ('[["a", 1]]', "BYTES of shape .-1, -1.; send strings"),
        ('[["a", null]]', "send strings"),
        ('[["a"], ["a", "b"]]', "different lengths"),
        ('[["\\ud800"]]', "half of a surrogate pair"),
    ],
)
def test_what_is_no_text_is_refused(body: str, sentence: str) -> None:
    with pytest.raises(InvalidRequest, match=sentence):
        answer(body.encode(), WORDS, lambda inputs: {"out": inputs["t"]})
