"""A factory that works where models are published, and nowhere else once its file is gone."""

from __future__ import annotations

import os
from pathlib import Path

from tiny_models import Tied
from torch import nn


def needs_file() -> nn.Module:
    path = Path(os.environ["SOMETIMES_FILE"])
    if not path.is_file():
        raise FileNotFoundError(f"{path.name} was moved")
    return Tied()
