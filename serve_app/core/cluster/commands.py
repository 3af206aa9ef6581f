"""What placement tells workers to do: advice, as each worker is the authority on its own cache."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class PreloadAt:
    """A worker should load a model in the background; if it is ``required``, whatever its policy finds it worth."""

    location: str
    replica: str
    model_id: str
    required: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class EvictAt:
    """A worker should unload a model, to make room for one that it is advised to load next, or as one copy too many."""

    location: str
    replica: str
    model_id: str


Command = PreloadAt | EvictAt
