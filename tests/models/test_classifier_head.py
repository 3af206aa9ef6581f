"""A factory's module counts as a classifier if it ends as one does; otherwise its entry must say what it gives."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from serve_app.core.catalog import ModelEntry
from serve_app.core.contract import BATCH, FREE, TensorSpec
from serve_app.core.task import TaskSpec
from serve_app.errors import StoreError
from serve_app.models.publishing.classifier_head import require_known_meaning


def numbers(count: int) -> tuple[TensorSpec, ...]:
    return (TensorSpec(name="logits", datatype="FP32", shape=(FREE, count), axes=(BATCH, "")),)


IMAGE = torch.linspace(-1, 1, 3 * 32 * 32).reshape(1, 3, 32, 32)

BODY = (nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())


class Last(nn.Module):
    """An encoder, and what its numbers go through last."""

    def __init__(self, *last: nn.Module, then: Callable[[Any], Any] = lambda x: x) -> None:
        super().__init__()
        self.layers, self.then = nn.Sequential(*BODY, *last).eval(), then

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.then(self.layers(images))


class Adapted(Last):
    """The last layer has an adapter, as LoRA has it."""

    def __init__(self) -> None:
        super().__init__()
        self.head, self.down, self.up = nn.Linear(8, 8), nn.Linear(8, 2, bias=False), nn.Linear(2, 8, bias=False)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        features = super().forward(images)
        return self.head(features) + 0.5 * self.up(self.down(features))


def judge(module: nn.Module, count: int = 128, **fields: Any) -> None:
    entry = ModelEntry(model_id="model", builder=f"{__name__}:Last", weights="pretrained", **fields)
    require_known_meaning(entry, numbers(count), lambda: module.eval()(IMAGE))


@pytest.mark.parametrize(
    "module",
    [
        Last(nn.Linear(8, 8)),
        Last(nn.Linear(8, 8, bias=False)),
        Last(nn.Dropout(), nn.Linear(8, 8), nn.Softmax(dim=1)),
        Last(nn.Linear(8, 8), then=lambda x: x / 0.07),
        Last(then=lambda x: (x @ torch.ones(8, 8))[:, :8]),
        Adapted(),
        # Computes nothing that would tell.
        nn.Flatten(),
    ],
)
def test_module_that_ends_in_a_linear_layer_gives_classes(module: nn.Module) -> None:
    judge(module)


@pytest.mark.parametrize(
    "module",
    [
        Last(),
        Last(nn.LayerNorm(8)),
        Last(nn.Linear(8, 8), nn.ReLU()),
        Last(nn.Linear(8, 8), nn.BatchNorm1d(8)),
        Last(nn.Linear(8, 8), then=lambda x: nn.functional.normalize(x)),
    ],
)
def test_module_that_ends_as_an_encoder_must_name_its_task(module: nn.Module) -> None:
    with pytest.raises(StoreError, match=r"its 128 numbers may be features .* add task: embedding, or task: image-cla"):
        judge(module)


def test_few_numbers_are_classes() -> None:
    judge(Last(), count=10)


def test_entry_that_says_what_the_numbers_are_is_believed() -> None:
    judge(Last(), task=TaskSpec(kind="image-classification"))
    judge(Last(), accuracy=0.7)


def test_libraries_of_classifiers_are_believed() -> None:
    entry = ModelEntry(model_id="model", builder="torchvision:squeezenet1_1")
    require_known_meaning(entry, numbers(128), lambda: Last()(IMAGE))
