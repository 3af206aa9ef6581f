"""Request streams: what users of the locations ask for, and when. Every stream has a seed and repeats exactly."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """A user of ``location`` asks for ``model_id``, ``arrival_s`` seconds after the stream's beginning."""

    arrival_s: float
    model_id: str
    location: str
