"""A request of a user to a router, and its response."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from serve_app.core.catalog import PublishedModel
from serve_app.core.vocabulary import Forwarding, Outcome
from serve_app.serving.transport.messages import FloatArray


@dataclass(frozen=True, slots=True, kw_only=True)
class InferenceRequest:
    """What a user asks of one location: run ``name``, a model or a family, on ``payload``.

    ``fits`` says which members of a family take the payload's shape.
    """

    name: str
    location: str
    payload: FloatArray | bytes
    deadline_s: float | None = None
    min_accuracy: float | None = None
    forwarding: Forwarding = Forwarding.AUTO
    fits: Callable[[PublishedModel], bool] = field(default=lambda model: True)

    @property
    def payload_bytes(self) -> int:
        """Bytes that go to the worker."""
        return len(self.payload) if isinstance(self.payload, bytes) else self.payload.nbytes


@dataclass(frozen=True, slots=True, kw_only=True)
class InferenceResponse:
    """The answer to a request: which model ran where, how, and the seconds that each part took."""

    model: PublishedModel
    location: str
    outcome: Outcome
    logits: FloatArray
    queue_s: float
    load_s: float
    decode_s: float
    exec_s: float
    forward_s: float
