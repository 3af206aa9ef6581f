"""A module that says what it takes, and carries what a worker needs to build it again without its weights."""

from __future__ import annotations

import torch
from torch import nn

from serve_app.models.builders.base import Metadata


class DescribedModule(nn.Module):
    """A module that a builder wraps around what it has read from a file.

    Attributes:
        metadata: what the file says of the model.
        structure: the structure without the weights; it is stored beside them.
    """

    metadata: Metadata
    structure: bytes

    def train(self, mode: bool = True) -> DescribedModule:
        """Stay in the mode that the module was made in; exported programs have no other."""
        return self


def constants_as_buffers(module: nn.Module) -> None:
    """Make plain tensors of a module buffers, in place, so that they are stored and given back."""
    for part in module.modules():
        for name, value in list(vars(part).items()):
            if isinstance(value, torch.Tensor):
                delattr(part, name)
                part.register_buffer(name, value, persistent=False)
