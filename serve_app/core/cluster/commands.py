"""Commands of placement to workers: advice, as each worker is the authority on its own cache."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class PreloadAt:
    """Load a model in the background; if it is ``required``, whatever it is worth to the worker's policy."""

    location: str
    replica: str
    model_id: str
    required: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class WithdrawAt:
    """Withdraw a model: to make room for the model of the next command, or because it is a copy too many."""

    location: str
    replica: str
    model_id: str


Command = PreloadAt | WithdrawAt
