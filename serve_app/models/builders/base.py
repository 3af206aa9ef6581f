"""The kinds of builders: torchvision's classifiers, timm's models, and any factory function.

Each kind answers the same five questions, see ``Builder``. To add a kind, write such a class and name it in
``serve_app.models.builders.registry.resolve``.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from torch import nn

from serve_app.core.contract import Axis, TensorSpec
from serve_app.core.task import ImageInput, Interpolation, TaskSpec
from serve_app.errors import StoreError
from serve_app.models.sources.pretrained import Pretrained


@dataclass(frozen=True, slots=True, kw_only=True)
class Metadata:
    """What weights say about themselves: top-1 accuracy (0..1), and their task, with its labels and input preset.

    ``inputs`` and the limits of their free ``axes`` are what the model itself says of them; empty if it says nothing.
    """

    accuracy: float | None = None
    task: TaskSpec = field(default_factory=lambda: TaskSpec(kind="image-classification", image=ImageInput()))
    inputs: tuple[TensorSpec, ...] = ()
    axes: tuple[Axis, ...] = ()


class Builder(Protocol):
    """One architecture, by whatever library."""

    #: Children that only training uses; they are dropped after construction, and their weights are not stored.
    unused: tuple[str, ...]

    def pretrained_source(self) -> Pretrained | None:
        """Return where the file of pretrained weights comes from; None if ``pretrained`` needs no file."""

    def construct(self, weights: str) -> nn.Module:
        """Build a module of the structure that these weights expect, with initial values from the current seed."""

    def pretrained(self, file: Path | None) -> nn.Module:
        """Build a module with its pretrained weights, which are in ``file``."""

    def metadata(self) -> Metadata:
        """Return what is known about the pretrained weights without fetching them."""


def interpolation_named(name: str) -> Interpolation:
    """Check the interpolation that weights ask for, and return it.

    Raises:
        StoreError: images cannot be resized that way.
    """
    if name not in ("bilinear", "bicubic"):
        raise StoreError(f"the weights ask for interpolation {name!r}; name an 'input' with bilinear or bicubic")
    return "bicubic" if name == "bicubic" else "bilinear"


def rgb(values: Any) -> tuple[float, float, float]:
    """Convert to three floats, one per channel."""
    red, green, blue = (float(value) for value in values)
    return red, green, blue


def suggest(name: str, known: list[str]) -> str:
    """Return the end of a sentence that names the known names close to an unknown one; empty if there are none."""
    close = difflib.get_close_matches(name, known, n=3)
    return f"; did you mean {' or '.join(close)}?" if close else ""
