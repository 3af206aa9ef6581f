"""What a worker is configured with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerIdentity:
    """Location and replica of a worker."""

    location: str
    replica: str


@dataclass(frozen=True, slots=True, kw_only=True)
class RetentionRules:
    """What a worker holds beside what is worth it to its policy.

    Attributes:
        preload: models that are loaded in the background at the start.
        min_copies: models of which there must be a number of copies in the cluster.
        idle_unload_s: a model without a request for so long is unloaded; None: never.
        hand_over_s: how long a worker that is shut down waits for others to load its popular models.
    """

    preload: tuple[str, ...] = ()
    min_copies: Mapping[str, int] = field(default_factory=dict)
    idle_unload_s: float | None = None
    hand_over_s: float = 5.0
