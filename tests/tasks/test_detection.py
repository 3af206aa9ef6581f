"""Boxes of detectors, in pixels of the picture that was sent."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image
from task_support import answer, encoded, model_of, tensor

from serve_app.core.task import ImageInput, TaskSpec
from serve_app.errors import InvalidRequest
from serve_app.tasks.boxes import suppress

PRESET = ImageInput(crop_px=32, mean=(0, 0, 0), std=(1, 1, 1), fit="letterbox")
#: Twice as large as the input, which has a margin of 8 pixels above and below it.
PICTURE = encoded(Image.new("RGB", (64, 32)))


def detector(*labels: str, **fields):
    return model_of(
        TaskSpec(kind="detection", image=PRESET, labels=labels, **fields),
        [tensor("images", "FP32", -1, 3, 32, 32)],
        [tensor("output", "FP32", -1, -1, -1)],
    )


def yolo(*rows: tuple[float, ...]):
    table = np.array(rows, np.float32)
    return lambda inputs: {"output": table.T[None]}


FILLING = [(1, 1, 1, 1, 0.0, 0.0)] * 20


def test_a_box_is_in_pixels_of_the_picture() -> None:
    found = answer(PICTURE, detector("cat", "dog"), yolo((16, 16, 8, 4, 0.1, 0.9), *FILLING))
    assert found == {
        "detections": [{"label": "dog", "index": 1, "score": pytest.approx(0.9), "box": [24, 12, 40, 20]}],
        "picture": {"width": 64, "height": 32},
    }


def test_of_boxes_that_overlap_the_better_stays_within_a_class() -> None:
    rows = [(16, 16, 8, 4, 0.0, 0.7), (16.5, 16, 8, 4, 0.0, 0.9), (16, 16, 8, 4, 0.8, 0.0), (5, 12, 4, 4, 0.0, 0.6)]
    found = answer(PICTURE, detector("cat", "dog"), yolo(*rows, *FILLING))
    assert [(each["label"], round(each["score"], 2)) for each in found["detections"]] == [
        ("dog", 0.9), ("cat", 0.8), ("dog", 0.6)
    ]  # fmt: skip
    assert len(answer(PICTURE, detector("cat", "dog"), yolo(*rows, *FILLING), max_overlap="1")["detections"]) == 4


def test_rows_of_candidates_and_a_score_of_there_being_anything_are_understood() -> None:
    table = np.array([[16, 16, 8, 4, 0.5, 0.1, 0.9]] + [[0] * 7] * 5, np.float32)[None]
    found = answer(PICTURE, detector("cat", "dog"), lambda inputs: {"output": table}, min_score="0.4")
    assert [(each["label"], round(each["score"], 2)) for each in found["detections"]] == [("dog", 0.45)]


def test_boxes_apart_are_read_as_torchvision_gives_them() -> None:
    outputs = {
        "boxes": np.array([[0, 8, 16, 24], [0, 0, 99, 99]], np.float32),
        "labels": np.array([1, 2]),
        "scores": np.array([0.3, 0.8], np.float32),
    }
    found = answer(PICTURE, detector("background", "cat", "dog"), lambda inputs: outputs)["detections"]
    assert [(each["label"], each["box"]) for each in found] == [("dog", [0, 0, 64, 32]), ("cat", [0, 0, 32, 32])]
    assert not answer(PICTURE, detector(min_score=0.9), lambda inputs: outputs)["detections"]


def test_a_picture_of_nothing_has_no_detections() -> None:
    assert answer(PICTURE, detector("cat", "dog"), yolo(*FILLING))["detections"] == []


@pytest.mark.parametrize(("name", "value"), [("min_score", "2"), ("min_score", "nan"), ("max_overlap", "much")])
def test_an_option_outside_of_its_range_is_refused(name: str, value: str) -> None:
    with pytest.raises(InvalidRequest, match=f"{name} must be a number from 0 to 1"):
        answer(PICTURE, detector(), yolo(*FILLING), **{name: value})


def test_outputs_of_another_layout_are_refused_by_their_shapes() -> None:
    with pytest.raises(InvalidRequest, match=r"output \[1, 5\] are none that task detection reads"):
        answer(PICTURE, detector(), lambda inputs: {"output": np.zeros((1, 5))})


def test_suppression_keeps_boxes_that_only_touch() -> None:
    boxes = np.array([[0, 0, 2, 2], [2, 0, 4, 2], [0, 0, 2, 2]], np.float64)
    kept = suppress(boxes, np.array([0.5, 0.6, 0.4]), np.array([0, 0, 0]), 0.5)
    assert kept.tolist() == [1, 0]
