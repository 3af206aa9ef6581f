"""Versions of a model: what names them, and which of them answers requests that name none.

Caches, policies and placement know models by keys alone. Version 1 of a model has the model's own name as its key, and
every later version the name, ``@`` and its number, which no name has: a key never stands for two contents.
"""

from __future__ import annotations

from dataclasses import dataclass

FIRST_VERSION = 1


def version_key(name: str, version: int) -> str:
    """Return the key of one version of a model."""
    return name if version == FIRST_VERSION else f"{name}@{version}"


def split_key(key: str) -> tuple[str, int]:
    """Return the name and the version that a key stands for."""
    name, _, version = key.partition("@")
    return name, int(version) if version else FIRST_VERSION


@dataclass(frozen=True, slots=True, kw_only=True)
class VersionRoute:
    """Which versions of one model answer requests that name none.

    Attributes:
        current: the version that answers.
        at_once: it answers at once, as after a rollback; otherwise as soon as it is loaded where the one before is.
        canary: a version that answers a share of the requests in its place.
        canary_share: of the requests, 0..1.
    """

    current: int
    at_once: bool = False
    canary: int | None = None
    canary_share: float = 0.0

    def __post_init__(self) -> None:
        if not 0.0 <= self.canary_share <= 1.0:
            raise ValueError(f"the share of a canary must lie in 0..1, not {self.canary_share}")
