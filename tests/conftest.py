"""Markers by folder, so that one command runs the fast part: ``pytest -m 'not slow'``."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest

#: Folder below ``tests`` -> what its tests are.
MARKERS = {"e2e": ("ray", "slow"), "cluster": ("cluster", "ray", "slow"), "packaging": ("ray", "slow")}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        folder = item.path.relative_to(Path(__file__).parent).parts[0]
        for marker in MARKERS.get(folder, ()):
            item.add_marker(marker)


@pytest.fixture(autouse=True)
def log_as_before() -> Iterator[None]:
    """The command line and the replicas each set up the log of their process, which all tests share."""
    ours = logging.getLogger("serve_app")
    level, propagate = ours.level, ours.propagate
    yield
    ours.setLevel(level)
    ours.propagate = propagate
