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


class Convolved(nn.Module):
    """Convolutions with batch norms that have seen something, called in another order than they are defined."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(8, 5)
        self.second = nn.Conv2d(8, 8, 3, groups=2, bias=True)
        self.first = nn.Conv2d(3, 8, 3, bias=False)
        self.second_norm = nn.BatchNorm2d(8)
        self.first_norm = nn.BatchNorm2d(8)
        for norm in (self.first_norm, self.second_norm):
            norm.running_mean.uniform_(-1, 1)
            norm.running_var.uniform_(0.5, 2)
            nn.init.uniform_(norm.weight, 0.5, 2)
            nn.init.uniform_(norm.bias, -1, 1)

    def features(self, images: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.second_norm(self.second(torch.relu(self.first_norm(self.first(images))))))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.head(self.features(images).mean((2, 3)))


class NeedsContiguous(Convolved):
    """Takes the memory layout of its features for granted."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        features = self.features(images)
        return self.head(features.view(-1)[: features.numel()].view(features.shape).mean((2, 3)))


class LooksAtValues(Convolved):
    """What it runs depends on the image, which no trace can follow."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return super().forward(images) if bool(images.sum() < 1e9) else self.head(self.second_norm.bias[None])


class ReadsItsConvolution(Convolved):
    """Uses the weights of a convolution in another way as well."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return super().forward(images) * self.first.weight.mean()


class ConvolvesTwice(Convolved):
    """Uses its second convolution and norm for two things."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        features = self.second_norm(self.second(self.features(images)))
        return self.head(features.mean((2, 3)))


class SharedNorm(Convolved):
    """One batch norm behind both convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.second_norm = self.first_norm


class Branching(Convolved):
    """Uses what is between a convolution and its norm."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        raw = self.first(images)
        return self.head(self.second_norm(self.second(self.first_norm(raw) + raw)).mean((2, 3)))


class TiedConvolutions(Convolved):
    """Two convolutions with one weight, each with a norm of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.third = nn.Conv2d(8, 8, 3, groups=2, bias=False)
        self.third.weight = self.second.weight
        self.third_norm = nn.BatchNorm2d(8)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.head(self.third_norm(self.third(self.features(images))).mean((2, 3)))


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


class Deep(nn.Module):
    """Convolutions that take long enough for lower precision to be faster, whose classes are far from each other."""

    #: How far the weights of the classes are from each other, in parts of their size.
    apart = 1.0

    def __init__(self) -> None:
        super().__init__()
        width = 64
        self.first = nn.Conv2d(3, width, 3, padding=1)
        self.more = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1) for _ in range(4))
        self.head = nn.Linear(width, 16)
        with torch.no_grad():
            self.head.weight.copy_(torch.randn(width) + self.apart * torch.randn(16, width))
            self.head.bias.zero_()

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        features = torch.relu(self.first(images))
        for convolution in self.more:
            features = features + torch.relu(convolution(features))
        return self.head(features.mean((2, 3)))


class Undecided(Deep):
    """Classes so close to each other that rounding decides between them."""

    apart = 1e-3
