"""Decisions are tested without Ray: it cannot even be imported here."""

from __future__ import annotations

import sys

import pytest


@pytest.fixture(autouse=True)
def no_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    """``import ray`` fails, so that no test here can start it."""
    monkeypatch.setitem(sys.modules, "ray", None)
