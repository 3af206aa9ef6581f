"""What a ``ModelCache`` answers and shows: immutable values."""

from __future__ import annotations

import enum
from dataclasses import dataclass

from serve_app.core.catalog import ModelProfile


class RejectReason(enum.StrEnum):
    """Why a request cannot be taken."""

    TOO_LARGE = "too large"
    QUEUE_FULL = "queue full"
    LOAD_FAILED = "load failed"


@dataclass(frozen=True, slots=True)
class Hit:
    """The model is resident; it is pinned until ``finish``."""


@dataclass(frozen=True, slots=True)
class Join:
    """A load of the model is under way; it is pinned for this request too."""


@dataclass(frozen=True, slots=True)
class Load:
    """Unload ``victims`` (already out of the books), then load the model; its bytes are reserved."""

    victims: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Wait:
    """No feasible victim set exists now; a later ``Grant`` with this ticket brings the answer."""

    ticket: int


@dataclass(frozen=True, slots=True)
class Reject:
    """The request cannot be taken; nothing has changed."""

    reason: RejectReason
    detail: str
    retry_s: float = 0.0


Answer = Hit | Join | Load | Reject

#: They carry nothing, so one of each is enough.
HIT, JOIN = Hit(), Join()


@dataclass(frozen=True, slots=True)
class Preload:
    """Unload ``victims`` (already out of the books), then load ``model`` in the background; its bytes are reserved."""

    model: ModelProfile
    victims: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Grant:
    """The answer to a request that had to wait."""

    ticket: int
    model_id: str
    answer: Answer


@dataclass(frozen=True, slots=True)
class Shed:
    """Unload ``victims`` (already out of the books), then act on ``grants``."""

    victims: tuple[str, ...] = ()
    grants: tuple[Grant, ...] = ()
