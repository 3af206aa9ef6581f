"""Values that all parts speak in."""

from __future__ import annotations

import enum
from dataclasses import dataclass


class ModelState(enum.StrEnum):
    """Where a model is on its way through one worker."""

    LOADING = "loading"
    READY = "ready"


@dataclass(frozen=True, slots=True, kw_only=True)
class ResidentModel:
    """What a worker reports of one model in memory.

    A ``protected`` one is ``unevictable`` until a request cannot be served otherwise.
    """

    model_id: str
    state: ModelState
    size_bytes: int
    uses: int
    unevictable: bool
    protected: bool = False


class Outcome(enum.StrEnum):
    """How a request was served, as its reply says."""

    HIT = "hit"
    JOIN = "join"
    LOAD = "load"
    FORWARD = "forward"


class Forwarding(enum.StrEnum):
    """Whether a request may run at another location."""

    AUTO = "auto"
    #: Only where it was sent.
    NEVER = "never"
    #: Wherever the model is, if it is anywhere: loaded only if no worker has it.
    PREFER = "prefer"
