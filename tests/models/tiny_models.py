"""Factories for tests: small classifiers, each with one peculiarity."""

from __future__ import annotations

import torch
from torch import nn

PIXELS = 3 * 32 * 32


class Tied(nn.Module):
    """Two names for one matrix, a non-persistent buffer that matters, and buffers of several types."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.first = nn.Linear(PIXELS, width)
        self.second = nn.Linear(width, width)
        self.third = nn.Linear(width, width)
        self.third.weight = self.second.weight
        self.norm = nn.BatchNorm1d(width)
        self.head = nn.Linear(width, 5)
        self.scale: torch.Tensor
        self.register_buffer("scale", torch.rand(width), persistent=False)
        self.register_buffer("flags", torch.tensor([True, False]))
        self.register_buffer("nothing", torch.zeros(0))
        self.register_buffer("scalar", torch.tensor(0.5))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        hidden = torch.relu(self.first(images.flatten(1))) * self.scale
        return self.head(self.norm(self.third(torch.relu(self.second(hidden)))) * self.scalar)


class ConstantBuffer(nn.Module):
    """Answers with a view of one of its buffers: the result must outlive the model."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("answer", torch.arange(5.0).reshape(1, 5))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.answer.expand(len(images), 5)


class PlainTensor(Tied):
    """Keeps a tensor that is neither parameter nor buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.table = [torch.ones(5)]

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return super().forward(images) * self.table[0]


class HiddenState(Tied):
    """Keeps a number that only the constructor of the real module knows."""

    def __init__(self) -> None:
        super().__init__()
        self.factor = 1.0 if self.head.weight.is_meta else 2.0

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return super().forward(images) * self.factor


class LastBits(HiddenState):
    """Logits of a billion, of which only the last bits depend on hidden state."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return 1e9 + 1e3 * super().forward(images)


class ReadsValues(Tied):
    """Its constructor reads the values of a tensor, which the meta device cannot."""

    def __init__(self) -> None:
        super().__init__()
        self.steps = torch.linspace(0, 1, 3).tolist()

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return super().forward(images) + self.steps[1]


class Tuple(Tied):
    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:  # type: ignore[override]
        logits = super().forward(images)
        return logits, logits


class NotFinite(Tied):
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return super().forward(images) / 0


def wide() -> nn.Module:
    """About 17 MB."""
    return Tied(width=1024)


def not_a_module() -> object:
    return 42


def broken() -> nn.Module:
    raise OSError("the factory's own file is missing")
