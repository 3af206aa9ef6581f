"""Every pixel of a picture has a class."""

from __future__ import annotations

import base64
import dataclasses
import io

import numpy as np
import pytest
from PIL import Image
from task_support import answer, encoded, model_of, tensor

from serve_app.core.task import ImageInput, TaskSpec
from serve_app.errors import InvalidRequest


def segmenter(fit: str = "stretch", classes: int = 3):
    image = ImageInput(crop_px=32, mean=(0, 0, 0), std=(1, 1, 1), fit=fit)
    return model_of(
        TaskSpec(kind="segmentation", image=image, labels=("nothing", "red", "green")[:classes]),
        [tensor("x", "FP32", -1, 3, 32, 32)],
        [tensor("out", "FP32", -1, classes, 16, 16)],
    )


def by_color(inputs):
    """Class 1 where it is red, 2 where it is green, at half the resolution."""
    pixels = inputs["x"][:, :, ::2, ::2]
    return {"out": np.stack([np.full_like(pixels[:, 0], 0.6), pixels[:, 0], pixels[:, 1]], axis=1)}


def halves() -> bytes:
    image = Image.new("RGB", (64, 48), (255, 0, 0))
    image.paste((0, 255, 0), (48, 0, 64, 48))
    return encoded(image)


def mask_of(found) -> np.ndarray:
    assert found["mask"]["encoding"] == "png;base64"
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(found["mask"]["data"]))))


@pytest.mark.parametrize("fit", ["stretch", "letterbox"])
def test_the_mask_is_as_large_as_the_picture_and_the_shares_add_up(fit: str) -> None:
    found = answer(halves(), segmenter(fit), by_color)
    mask = mask_of(found)
    assert mask.shape == (48, 64)
    assert (mask[:, 2:46] == 1).all()
    assert (mask[:, 50:] == 2).all()
    assert [each["label"] for each in found["classes"]][:2] == ["red", "green"]
    assert found["classes"][0]["share"] == pytest.approx(0.75, abs=0.05)
    assert sum(each["share"] for each in found["classes"]) == pytest.approx(1)


def test_the_mask_may_be_left_out() -> None:
    assert "mask" not in answer(halves(), segmenter(), by_color, mask="false")
    with pytest.raises(InvalidRequest, match="mask must be true or false"):
        answer(halves(), segmenter(), by_color, mask="maybe")


def test_one_class_is_there_where_its_score_is_positive() -> None:
    found = answer(halves(), segmenter(classes=1), lambda inputs: {"out": inputs["x"][:, :1, ::2, ::2] - 0.5})
    assert set(np.unique(mask_of(found))) == {0, 1}
    assert (mask_of(found)[:, :46] == 1).all()


def test_one_class_of_probabilities_is_there_where_it_is_likely() -> None:
    model = segmenter(classes=1)
    likely = dataclasses.replace(model, task=dataclasses.replace(model.task, activation="none"))
    found = answer(halves(), likely, lambda inputs: {"out": inputs["x"][:, :1, ::2, ::2] * 0.4 + 0.2})
    assert (mask_of(found)[:, :46] == 1).all()
    assert (mask_of(found)[:, 50:] == 0).all()
