"""A model that does next to nothing: what is measured with it is everything else."""

from __future__ import annotations

import torch
from torch import nn

OUTPUTS = 10


class FirstTen(nn.Module):
    """The first ten numbers of each input."""

    def __init__(self) -> None:
        super().__init__()
        #: A model without any tensors is none.
        self.scale = nn.Parameter(torch.ones(1), requires_grad=False)

    def forward(self, batch: torch.Tensor) -> torch.Tensor:
        """Logits ``[N, 10]`` of ``[N, 3, H, W]``."""
        return batch.flatten(1)[:, :OUTPUTS] * self.scale


def first_ten() -> nn.Module:
    """The model, for a catalog: ``loadtests.support.tiny:first_ten``."""
    return FirstTen()
