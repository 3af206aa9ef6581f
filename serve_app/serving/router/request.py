"""A request of a user to a router, and its response."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from serve_app.core.catalog import PublishedModel
from serve_app.core.vocabulary import Forwarding, Outcome
from serve_app.tasks.base import RawInput
from serve_app.tasks.tensors import Tensors, total_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class InferenceRequest:
    """What a user asks of one location: run ``name``, a model or a family, on ``payload``.

    ``fits`` says which members of a family take the payload's shape.
    """

    name: str
    location: str
    payload: Tensors | RawInput
    deadline_s: float | None = None
    min_accuracy: float | None = None
    forwarding: Forwarding = Forwarding.AUTO
    fits: Callable[[PublishedModel], bool] = field(default=lambda model: True)

    @property
    def payload_bytes(self) -> int:
        """Bytes that go to the worker."""
        return len(self.payload.data) if isinstance(self.payload, RawInput) else total_bytes(self.payload)


@dataclass(frozen=True, slots=True, kw_only=True)
class InferenceResponse:
    """The answer to a request: which model ran where, in which form, how, and the seconds that each part took."""

    model: PublishedModel
    form: str
    location: str
    outcome: Outcome
    outputs: Tensors
    answer: dict[str, Any] | None
    queue_s: float
    load_s: float
    decode_s: float
    exec_s: float
    forward_s: float
