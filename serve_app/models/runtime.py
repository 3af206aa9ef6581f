"""Process-wide settings of torch."""

from __future__ import annotations

import torch


def use_threads(count: int) -> None:
    """Let one inference use ``count`` threads; parallel inferences bring their own."""
    torch.set_num_threads(count)
