"""How many threads one inference uses, in whatever runtime."""

from __future__ import annotations

import torch


def use_threads(count: int) -> None:
    """Let one inference use ``count`` threads, in the whole process; parallel inferences bring their own."""
    torch.set_num_threads(count)


def inference_threads() -> int:
    """Return the threads of one inference."""
    return torch.get_num_threads()
