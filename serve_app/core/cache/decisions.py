"""What a ``ModelCache`` decides: the answer to a request, and the actions that the caller carries out in order."""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import Literal

from serve_app.core.catalog import ModelProfile

#: Why a model leaves: room for a request's load, room for a preload, an operator, placement, no use for long, another
#: configuration, or unaccounted bytes.
EvictionReason = Literal["capacity", "preload", "unload", "placement", "idle", "reconfigure", "memory", "changed"]


class RejectReason(enum.StrEnum):
    """Why a request is rejected."""

    TOO_LARGE = "too large"
    QUEUE_FULL = "queue full"
    LOAD_FAILED = "load failed"


# Answers to requests


@dataclass(frozen=True, slots=True)
class Hit:
    """The model is resident; it is pinned until ``finish``."""


@dataclass(frozen=True, slots=True)
class Join:
    """A load of the model is under way; it is pinned for this request too."""


@dataclass(frozen=True, slots=True)
class Load:
    """The request loads the model, whose bytes are reserved, in the place of ``victims``.

    The models of ``shrunk`` make room as well: they go over to these smaller forms.
    """

    victims: tuple[str, ...]
    shrunk: tuple[ModelProfile, ...] = ()

    def actions(self, model: ModelProfile) -> tuple[Action, ...]:
        """What the caller does for a request for ``model`` that was answered so at once."""
        room = Displaced(self.victims, self.shrunk).actions("capacity")
        return (*room, StartLoad(model, background=False))


@dataclass(frozen=True, slots=True)
class Wait:
    """No feasible victim set exists now; a later ``Grant`` with this ticket brings the answer."""

    ticket: int


@dataclass(frozen=True, slots=True)
class Reject:
    """The request is rejected; nothing has changed."""

    reason: RejectReason
    detail: str
    retry_s: float = 0.0


Answer = Hit | Join | Load | Reject

#: They carry nothing, so one of each is enough.
HIT, JOIN = Hit(), Join()


# Actions


@dataclass(frozen=True, slots=True)
class Evict:
    """Any removal of a model from memory, with its reason.

    A load that is under way is canceled, and then reports no end.
    """

    model_id: str
    reason: EvictionReason


@dataclass(frozen=True, slots=True)
class StartLoad:
    """Load a model, whose bytes are reserved; ``background``: no request waits for it."""

    model: ModelProfile
    background: bool


@dataclass(frozen=True, slots=True)
class StartExchange:
    """Load another form of a model that is in memory, whose bytes are reserved, and use it from then on."""

    model: ModelProfile


@dataclass(frozen=True, slots=True)
class StartShrink:
    """Unload a model and load this smaller form of it in its place; requests join that load.

    The model is idle. Both forms together might not fit, so the larger one goes first. The load ends like any other.
    """

    model: ModelProfile


@dataclass(frozen=True, slots=True)
class Grant:
    """Answer a request that had to wait. The actions of a ``Load`` stand before the grant."""

    ticket: int
    model_id: str
    answer: Answer


Action = Evict | StartLoad | StartExchange | StartShrink | Grant


@dataclass(frozen=True, slots=True)
class Displaced:
    """What has made room: models that are evicted, and models that go over to these smaller forms."""

    evicted: tuple[str, ...]
    shrunk: tuple[ModelProfile, ...] = ()

    def actions(self, reason: EvictionReason) -> tuple[Action, ...]:
        """What the caller does to make the room."""
        return (*(Evict(model_id, reason) for model_id in self.evicted), *map(StartShrink, self.shrunk))
