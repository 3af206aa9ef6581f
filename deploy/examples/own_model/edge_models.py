"""Models of your own: functions without arguments that return a ``torch.nn.Module``.

Run it from this folder, so that Python finds this module here and in every worker::

    cd deploy/examples/own_model
    export PYTHONPATH=$PWD
    edgeserve up local.yaml
    edgeserve infer stripes photo.jpg --url http://127.0.0.1:8000

``catalog.yaml`` names the functions, ``edge.yaml`` the locations, ``local.yaml`` the address. A module takes float32
images of shape (N, 3, H, W) and returns logits of shape (N, classes). All that it computes with is in parameters and
buffers.
"""

from __future__ import annotations

import torch
from torch import nn


class SmallClassifier(nn.Module):
    """A few convolutions; publishing folds the norms into them."""

    def __init__(self, width: int, classes: int = 4) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, width, 3, stride=2, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Conv2d(width, 2 * width, 3, stride=2, bias=False),
            nn.BatchNorm2d(2 * width),
            nn.ReLU(),
        )
        self.head = nn.Linear(2 * width, classes)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Logits of shape (N, classes) for images of shape (N, 3, H, W)."""
        return self.head(self.features(images).mean((2, 3)))


def small() -> nn.Module:
    """A model of 20 kB."""
    return SmallClassifier(width=16)


def large() -> nn.Module:
    """The same with eight times the width."""
    return SmallClassifier(width=128)
