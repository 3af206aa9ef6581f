"""Models whose executions are short: tables and sentences."""

from __future__ import annotations

import torch
from torch import nn

FEATURES, CLASSES = 64, 8

_HIDDEN = 256
_WORDS, _WIDTH, _HEADS, _LAYERS = 2000, 384, 12, 6


def table() -> nn.Module:
    """A multilayer perceptron: ``loadtests.support.small_models:table``."""
    return nn.Sequential(
        nn.Linear(FEATURES, _HIDDEN), nn.ReLU(), nn.Linear(_HIDDEN, _HIDDEN), nn.ReLU(), nn.Linear(_HIDDEN, CLASSES)
    )


class Sentences(nn.Module):
    """An encoder of the shape of MiniLM-L6: mean of the last layer over the words."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(_WORDS, _WIDTH)
        layer = nn.TransformerEncoderLayer(_WIDTH, _HEADS, 4 * _WIDTH, dropout=0.0, batch_first=True)
        self.layers = nn.TransformerEncoder(layer, _LAYERS, enable_nested_tensor=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Vectors ``[N, 384]`` of numbers of words ``[N, sequence]``."""
        vectors: torch.Tensor = self.layers(self.words(ids)).mean(1)
        return vectors


def sentences() -> nn.Module:
    """The encoder: ``loadtests.support.small_models:sentences``."""
    return Sentences()
