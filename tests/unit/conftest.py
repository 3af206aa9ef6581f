from __future__ import annotations

import os
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def traces() -> Path:
    """The folder of recorded traces, which are not part of the project."""
    named = os.environ.get("EDGESERVE_TRACES")
    candidates = [Path(named)] if named else [REPOSITORY / "traces", REPOSITORY.parent / "shared" / "traces"]
    for folder in candidates:
        if folder.is_dir():
            return folder
    pytest.skip(f"no recorded traces in {' or '.join(map(str, candidates))}; name their folder in EDGESERVE_TRACES")
