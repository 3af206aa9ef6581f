"""Factories for tests of models that are no classifiers of images, with examples of their inputs."""

from __future__ import annotations

import ctypes
import dataclasses
import os
from typing import Any

import numpy as np
import torch
from torch import nn


class Tabular(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, 3))

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return self.layers(features)


def tabular_example() -> dict[str, np.ndarray]:
    return {"features": np.linspace(-1, 1, 40, dtype=np.float32).reshape(2, 20)}


def tabular_example_as_tuple() -> tuple[torch.Tensor]:
    return (torch.linspace(-1, 1, 20)[None],)


def text_example() -> dict[str, Any]:
    return {"features": "words"}


class UNet(nn.Module):
    """Two scales, one channel in, two classes out, images of any size that 4 divides."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.bottom = nn.Sequential(nn.MaxPool2d(4), nn.Conv2d(8, 8, 3, padding=1), nn.ReLU())
        self.up = nn.ConvTranspose2d(8, 8, 4, stride=4)
        self.head = nn.Conv2d(16, 2, 1)

    def forward(self, scan: torch.Tensor) -> dict[str, torch.Tensor]:
        fine = self.down(scan)
        return {"mask": self.head(torch.cat([fine, self.up(self.bottom(fine))], dim=1))}


@dataclasses.dataclass
class Found:
    scores: torch.Tensor
    best: torch.Tensor
    note: str = "no tensor"


class Ranker(nn.Module):
    """Integers and a scalar in; a dataclass with numbers of two types out."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(50, 8)

    def forward(self, items: torch.Tensor, temperature: torch.Tensor, mask: torch.Tensor) -> Found:
        scores = (self.table(items).sum(-1) / temperature).masked_fill(~mask, -100.0)
        return Found(scores=scores, best=scores.argmax(-1))


class Recurrent(nn.Module):
    """Carries its state in and out; the batch of the state is its second axis."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.GRU(4, 6, batch_first=True)

    def forward(self, frames: torch.Tensor, state: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        out, state = self.cell(frames, state)
        return out[:, -1], state


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 16, 3, stride=2), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return self.body(image)


class PadsFirst(nn.Conv2d):
    """As TensorFlow's convolutions and timm's Conv2dSame."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self._conv_forward(nn.functional.pad(x, (0, 1, 0, 1)), self.weight, self.bias)


class Padded(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = PadsFirst(3, 8, 3, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.norm.running_mean.uniform_(-1, 1)
        self.head = nn.Linear(8, 5)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.head(torch.relu(self.norm(self.conv(images))).mean((2, 3)))


class Takes(nn.Module):
    """Casts what it gets, of whatever type, and gives it back in another one."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(2.0))

    def forward(self, value: torch.Tensor) -> torch.Tensor:
        return value.double() * self.scale


def half() -> nn.Module:
    return Tabular().half()


def brain() -> nn.Module:
    return Tabular().bfloat16()


class CountsInABuffer(Tabular):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros(1))

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        self.count += 1
        return super().forward(features) + self.count


class CountsInAnAttribute(Tabular):
    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        self.count += 1
        return super().forward(features) + self.count


class DrawsNumbers(Tabular):
    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return super().forward(features) + torch.rand(3)


class TwoTypes(nn.Module):
    """The second half is in bfloat16, and its input is converted to that."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(20, 8), nn.Linear(8, 3).bfloat16()

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(features).bfloat16())


def double() -> nn.Module:
    return Tabular().double()


def scripted() -> nn.Module:
    return torch.jit.script(Tabular())


def compiled() -> nn.Module:
    return torch.compile(Tabular())  # type: ignore[return-value]


def compiled_in_place() -> nn.Module:
    module = Tabular()
    module.compile()
    return module


def quantized() -> nn.Module:
    return torch.ao.quantization.quantize_dynamic(Tabular(), {nn.Linear}, dtype=torch.qint8)


class Session:
    """Stands for a session of a library that runs models by itself."""


Session.__module__ = "onnxruntime.capi.onnxruntime_inference_collection"


class Wraps(Tabular):
    def __init__(self) -> None:
        super().__init__()
        self.session = Session()


def wrapped() -> nn.Module:
    return Wraps()


def exported() -> object:
    return torch.export.export(Tabular(), (torch.zeros(1, 20),))


class Hides(Tabular):
    """Keeps weights where nobody looks for them: 24 MB."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden = np.ones(6_000_000, dtype=np.float32)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return super().forward(features) + float(self.hidden[0])


class Collects(Tabular):
    """Keeps 4 MB of every execution."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[np.ndarray] = []

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        self.seen.append(np.ones(1_000_000, dtype=np.float32))
        return super().forward(features)


class Copies(Tabular):
    """Copies its weights into memory of its own with the first execution: 8 MB."""

    def __init__(self) -> None:
        super().__init__()
        self.big = nn.Linear(20, 100_000)
        self.copied: list[np.ndarray] = []

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        if not self.copied and not self.big.weight.is_meta:
            self.copied.append(self.big.weight.detach().numpy().copy())
        return super().forward(features) + float(self.copied[0][0, 0])


class CrashesApart(Tabular):
    """Ends its process natively unless that is the one of the publisher."""

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        if os.environ.get("EDGESERVE_TEST_PROCESS") not in (None, str(os.getpid())):
            ctypes.string_at(0)
        return super().forward(features)


class CrashesWhenTraced(nn.Module):
    """Ends its process natively when it is called with what is no tensor, as a wrapper of another runtime does."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(3)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        if not isinstance(images, torch.Tensor):
            ctypes.string_at(0)
        return self.norm(images).mean((2, 3))
