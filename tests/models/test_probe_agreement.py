"""When two answers to one input agree, and what models are compared on."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from fakes import published

from serve_app.core.catalog import PublishedModel
from serve_app.core.contract import BATCH, Axis, Contract, TensorSpec, ValueRange
from serve_app.core.task import ImageInput, TaskKind, TaskSpec
from serve_app.errors import StoreError
from serve_app.models.profiling.photographs import find_photographs, random_squares
from serve_app.models.publishing.probe_agreement import probes, share_alike
from serve_app.store.forms import Refusal
from serve_app.store.manifest import Agreement, ManifestKey
from serve_app.store.model_store import ModelStore


def model(kind: TaskKind, output: tuple[int, ...], given: TensorSpec | None = None) -> PublishedModel:
    given = given or TensorSpec(name="x", datatype="FP32", shape=(-1, 3, 8, 8), axes=(BATCH, "", "", ""))
    answer = TensorSpec(name="y", datatype="FP32", shape=output, axes=(BATCH, *[""] * (len(output) - 1)))
    contract = Contract(inputs=(given,), outputs=(answer,), axes=(Axis(name=BATCH, most=4),))
    return replace(published("m"), contract=contract, task=TaskSpec(kind=kind))


def test_classifications_agree_where_the_best_class_is_the_same() -> None:
    classifier = model("image-classification", (-1, 3))
    expected = {"y": np.array([[0.1, 0.5, 0.4]], np.float32)}
    assert share_alike(classifier, expected, {"y": np.array([[0.0, 9.0, 8.0]], np.float32)}) == 1.0
    assert share_alike(classifier, expected, {"y": np.array([[0.1, 0.4, 0.5]], np.float32)}) == 0.0
    assert share_alike(classifier, expected, {"y": np.array([[np.nan, 0.5, 0.4]], np.float32)}) == 0.0


def test_of_segmentations_the_share_of_pixels_counts() -> None:
    segmentation = model("segmentation", (-1, 2, 2, 2))
    expected = np.zeros((1, 2, 2, 2), np.float32)
    expected[:, 1] = 1
    actual = expected.copy()
    actual[0, 0, 0, 0] = 2
    assert share_alike(segmentation, {"y": expected}, {"y": actual}) == 0.75


@pytest.mark.parametrize(("kind", "width"), [("tensors", 3), ("embedding", 3), ("image-classification", 1)])
def test_other_answers_agree_where_they_differ_by_a_fiftieth_of_their_length_at_most(
    kind: TaskKind, width: int
) -> None:
    tensors = model(kind, (-1, width))
    expected = np.full((1, width), 2.0, np.float32)
    assert share_alike(tensors, {"y": expected}, {"y": expected * 1.019}) == 1.0
    assert share_alike(tensors, {"y": expected}, {"y": expected * 1.021}) == 0.0
    assert share_alike(tensors, {"y": expected}, {"y": expected * np.nan}) == 0.0


def test_models_of_images_are_compared_on_photographs_and_others_on_numbers() -> None:
    classifier = model("image-classification", (-1, 3))
    pictures = list(probes(replace(classifier, task=TaskSpec(kind="image-classification", image=SMALL)), 12))
    assert [inputs["x"].shape for inputs in pictures] == [(1, 3, 8, 8)] * 12
    assert len({inputs["x"].tobytes() for inputs in pictures}) == 12
    numbers = list(probes(classifier, 12))
    assert len({inputs["x"].tobytes() for inputs in numbers}) == 12


def test_whole_numbers_that_may_be_anything_are_nothing_to_compare_on() -> None:
    ids = TensorSpec(name="ids", datatype="INT64", shape=(-1, 8), axes=(BATCH, ""))
    with pytest.raises(StoreError, match=r"'ids' is not known.*declare its values"):
        next(probes(model("embedding", (-1, 3), ids), 1))
    known = replace(ids, values=ValueRange(least=0, most=100))
    assert next(probes(model("embedding", (-1, 3), known), 1))["ids"].max() > 1


def test_squares_are_of_all_photographs_alike_and_the_same_every_time() -> None:
    paths = find_photographs(None)
    squares = list(random_squares(paths, 2 * len(paths) + 1, 3, 0))
    assert len(squares) == 2 * len(paths) + 1
    assert all(square.width == square.height for square in squares)
    again = random_squares(paths, 2 * len(paths) + 1, 3, 0)
    assert [square.tobytes() for square in squares] == [square.tobytes() for square in again]
    others = random_squares(paths, 2 * len(paths) + 1, 3, 1)
    assert [square.tobytes() for square in squares] != [square.tobytes() for square in others]


def test_a_refusal_is_remembered_with_its_agreement_and_those_of_earlier_versions_are_read(tmp_path: Path) -> None:
    forms, key = ModelStore(tmp_path).forms, ManifestKey(name="m", stem="0-0", form="openvino-bfloat16-0")
    assert forms.refusal(key) is None
    agreement = Agreement(share=0.97, probes=396, inputs="squares of 9 photographs", criterion="the same best class")
    forms.refuse(key, Refusal(reason="it differs", agreement=agreement))
    assert forms.refusal(key) == Refusal(reason="it differs", agreement=agreement)
    forms.path(key).with_suffix(".refused").write_text("it crashes")
    assert forms.refusal(key) == Refusal(reason="it crashes")


SMALL = ImageInput(resize_px=8, crop_px=8)
