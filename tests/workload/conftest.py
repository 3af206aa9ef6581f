from __future__ import annotations

import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def traces() -> Path:
    """The folder of recorded traces, which are not part of the project."""
    named = os.environ.get("EDGESERVE_TRACES")
    if not named:
        pytest.skip("no recorded traces; name their folder in EDGESERVE_TRACES")
    return Path(named)
