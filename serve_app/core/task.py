"""What people mean by a model's tensors: its task, as the catalog names it and the store has published it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, get_args

TaskKind = Literal[
    "tensors",
    "image-classification",
    "text-classification",
    "bytes-classification",
    "embedding",
    "detection",
    "segmentation",
    "voice-activity",
]

TASK_KINDS: tuple[str, ...] = get_args(TaskKind)

Interpolation = Literal["bilinear", "bicubic"]

#: How an image is brought to the size of the model: resized by its shorter side and cut, resized whole within a margin
#: of one color, resized without keeping its proportions, or left as it is as far as the model takes its size.
Fit = Literal["crop", "letterbox", "stretch", "native"]

#: What a text embedding is taken from: the mean over its tokens, the first token, or an output that is pooled already.
Pooling = Literal["mean", "first", "none"]

#: What makes probabilities of the scores of a classifier; ``none``: the model gives probabilities already.
Activation = Literal["softmax", "sigmoid", "none"]


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageInput:
    """How an image becomes the input tensor of a model.

    With ``fit: crop`` the shorter side is resized to ``resize_px`` (antialiased), the center ``crop_px`` square is cut
    out, values are scaled to 0..1 and normalized per channel: torchvision's ``ImageClassification`` preset. The others
    resize in one step. ``stretch`` and ``letterbox`` make a square of ``crop_px``; where height and width of the model
    are free, the longer side of a letterbox is ``crop_px``, and its margin as small as the limits of the axes allow.
    ``native`` needs free axes, and uses neither ``crop_px`` nor ``resize_px``.
    """

    resize_px: int = 256
    crop_px: int = 224
    interpolation: Interpolation = "bilinear"
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    fit: Fit = "crop"

    def __post_init__(self) -> None:
        _require(self.crop_px > 0, f"crop_px must be positive, not {self.crop_px}")
        _require(self.resize_px > 0, f"resize_px must be positive, not {self.resize_px}")
        _require(self.interpolation in ("bilinear", "bicubic"), f"unknown interpolation {self.interpolation!r}")
        _require(self.fit in get_args(Fit), f"unknown fit {self.fit!r}")
        _require(all(value > 0 for value in self.std), f"std must be positive, not {self.std}")
        _require(
            len(self.mean) == len(self.std) and len(self.mean) in (1, 3),
            f"mean and std must have one value for each of 1 or 3 channels, not {self.mean} and {self.std}",
        )

    @property
    def channels(self) -> int:
        """1 for gray, 3 for RGB."""
        return len(self.mean)


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskSpec:
    """How raw inputs become tensors, and output tensors become an answer for people.

    Attributes:
        kind: the task.
        image: of tasks that take images; None: the weights' own preset.
        tokenizer: of tasks that take text: a ``tokenizer.json`` of the library tokenizers. In the catalog, where to
            find it; of a published model, the name of its file in the store.
        labels: one for each class, in order; empty: classes are known by their numbers.
        labels_from: a reference to a file with one label a line, which is read when the model is published.
        activation: of classifications; None: what publishing has found out. A segmentation with one class and without
            activation gives probabilities, else scores above or below 0.
        pooling, normalize: of ``embedding``; a normalized embedding has length 1.
        min_score: of ``detection``: what scores less is left out.
        max_overlap: of ``detection``: of two boxes of one class whose intersection over union is larger, only the
            better one stays.
        sample_rate: of ``voice-activity``: samples a second that the model takes.
        context: of ``voice-activity``: each window begins with so many samples of the one before.
    """

    kind: TaskKind = "tensors"
    image: ImageInput | None = None
    tokenizer: str | None = None
    labels: tuple[str, ...] = field(default=(), repr=False)
    labels_from: str | None = None
    activation: Activation | None = None
    pooling: Pooling = "mean"
    normalize: bool = True
    min_score: float = 0.25
    max_overlap: float = 0.45
    sample_rate: int = 16000
    context: int = 64

    def __post_init__(self) -> None:
        _require(self.kind in TASK_KINDS, f"task must be one of {', '.join(TASK_KINDS)}, not {self.kind!r}")
        _require(0 <= self.min_score <= 1, f"min_score must lie in 0..1, not {self.min_score}")
        _require(0 <= self.max_overlap <= 1, f"max_overlap must lie in 0..1, not {self.max_overlap}")
        _require(self.sample_rate > 0, f"sample_rate must be positive, not {self.sample_rate}")
        _require(self.context >= 0, f"context must be 0 samples or more, not {self.context}")
