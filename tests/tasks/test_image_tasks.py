"""Images are classified and embedded, in color and gray, in float and whole numbers."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image
from task_support import answer, encoded, model_of, tensor

from serve_app.core.task import ImageInput, TaskSpec
from serve_app.errors import InvalidRequest

GRAY = ImageInput(resize_px=8, crop_px=8, mean=(0.5,), std=(0.5,))
COLOR = ImageInput(resize_px=8, crop_px=8, mean=(0, 0, 0), std=(1, 1, 1))


def test_a_gray_image_of_sixteen_bits_is_classified() -> None:
    task = TaskSpec(kind="image-classification", image=GRAY, labels=("dark", "light"), activation="none")
    model = model_of(task, [tensor("x", "FP32", -1, 1, 8, 8)], [tensor("y", "FP32", -1, 2)])
    image = Image.fromarray(np.full((20, 10), 65535, np.uint16))

    def run(inputs):
        assert inputs["x"].shape == (1, 1, 8, 8)
        light = (inputs["x"].mean() + 1) / 2
        return {"y": np.array([[1 - light, light]], np.float32)}

    assert answer(encoded(image), model, run, top_k="1")["predictions"][0]["label"] == "light"


def test_an_image_has_one_vector() -> None:
    task = TaskSpec(kind="embedding", image=COLOR, pooling="none", normalize=False)
    model = model_of(task, [tensor("x", "FP32", -1, 3, 8, 8)], [tensor("y", "FP32", -1, 3)])
    found = answer(
        encoded(Image.new("RGB", (9, 9), (255, 0, 51))), model, lambda inputs: {"y": inputs["x"].mean(axis=(2, 3))}
    )
    assert found == {"embeddings": [[1, 0, pytest.approx(0.2)]], "dimensions": 3}


def test_a_model_without_an_image_refuses_one() -> None:
    task = TaskSpec(kind="image-classification", image=COLOR)
    model = model_of(task, [tensor("x", "FP32", -1, 4)], [tensor("y", "FP32", -1, 2)])
    with pytest.raises(InvalidRequest, match=r"takes 'x' of shape \[-1, 4\], which is not an image"):
        answer(encoded(Image.new("RGB", (9, 9))), model, dict)
