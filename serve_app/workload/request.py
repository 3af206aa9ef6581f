"""One request of a stream."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """A user of ``location`` requests ``model_id``, ``arrival_s`` seconds after the beginning of the stream."""

    arrival_s: float
    model_id: str
    location: str
