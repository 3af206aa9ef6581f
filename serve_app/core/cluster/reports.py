"""What workers report to the coordinator, and the deltas that it answers with: immutable values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from serve_app.core.catalog import ModelProfile
from serve_app.core.cluster.commands import Command
from serve_app.core.links import Link
from serve_app.core.vocabulary import ResidentModel


@dataclass(frozen=True, slots=True, kw_only=True)
class Demand:
    """``count`` requests for ``model_id`` by users of ``location`` since the last report."""

    location: str
    model_id: str
    count: int


@dataclass(frozen=True, slots=True, kw_only=True)
class OutcomeCounts:
    """How the requests of one location ended up, since the reporting worker started."""

    requests: int = 0
    hits: int = 0
    joins: int = 0
    loads: int = 0
    forwards: int = 0

    def __add__(self, other: OutcomeCounts) -> OutcomeCounts:
        return OutcomeCounts(
            requests=self.requests + other.requests,
            hits=self.hits + other.hits,
            joins=self.joins + other.joins,
            loads=self.loads + other.loads,
            forwards=self.forwards + other.forwards,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerReport:
    """The state of one worker replica; sent about four times a second.

    ``loading`` counts the models that load or wait for their turn to, of which ``load_slots`` load at the same time.
    ``queue_s`` is the time until a request that arrives now begins to execute. ``exec_s`` and ``load_s`` are smoothed
    measurements per model, absent before the first measurement. ``outcomes`` is keyed by the location whose users
    sent the requests: those of other locations are forwards. ``primary_for`` are the models whose last copy the worker
    answers for (``primaries.py``). A worker that is ``leaving`` still serves, but others should be preferred.

    ``capacity_bytes`` is what the worker may take beyond ``base_bytes``, which the process took before its first model.
    ``workspace_bytes`` of the capacity are set aside for executions; models take ``used_bytes`` of the rest, and leave
    ``unaccounted_bytes`` to what the kernel sees of the process (``rss_bytes``) beyond base, models and workspace.

    ``unusable`` has, by key, why the worker could not load a model that requests may name.
    """

    location: str
    replica: str
    sequence: int
    capacity_bytes: int
    used_bytes: int
    rss_bytes: int
    base_bytes: int = 0
    workspace_bytes: int = 0
    unaccounted_bytes: int = 0
    models: Mapping[str, ResidentModel]
    exec_slots: int
    loading: int = 0
    load_slots: int = 1
    queue_s: float
    inflight: int
    exec_s: Mapping[str, float]
    load_s: Mapping[str, float]
    loads: int
    load_failures: int
    evictions: int
    preloads: int = 0
    wasted_preloads: int = 0
    outcomes: Mapping[str, OutcomeCounts]
    demand: tuple[Demand, ...] = ()
    primary_for: frozenset[str] = frozenset()
    leaving: bool = False
    unusable: Mapping[str, str] = field(default_factory=dict)

    @property
    def model_capacity_bytes(self) -> int:
        """What all models may take together."""
        return self.capacity_bytes - self.workspace_bytes

    def can_hold(self, model: ModelProfile, *, beside_protected: bool = False) -> bool:
        """Whether the model fits once everything that may go for a request has gone, or all of it but what is kept."""
        pinned_bytes = sum(
            other.size_bytes
            for other in self.models.values()
            if other.unevictable and (beside_protected or not other.protected) and other.model_id != model.model_id
        )
        return model.size_bytes <= self.model_capacity_bytes - pinned_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelChange:
    """The present state of one model at a worker; ``resident`` is None where it is not in memory."""

    model_id: str
    resident: ResidentModel | None
    primary_for: bool
    exec_s: float | None
    load_s: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerChange:
    """What has changed at a worker of which the reader has a report; fields as in ``WorkerReport``."""

    replica: str
    sequence: int
    capacity_bytes: int
    used_bytes: int
    workspace_bytes: int = 0
    unaccounted_bytes: int = 0
    loading: int
    queue_s: float
    leaving: bool
    models: tuple[ModelChange, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class ViewDelta:
    """What has changed in the cluster since the version that a reader has.

    Attributes:
        epoch: of the coordinator.
        version: that the reader has once it has applied this delta.
        full: replaces everything that the reader has.
        workers: whole reports.
        changes: what has changed in reports that the reader has.
        gone: replicas that have left the cluster.
        partial: covers only the workers that matter to the reader.
        unsubscribed: replicas that matter to the reader no more, but may be well.
        rates: requests per second of every model at every location, or at the reader's if partial. Complete whenever
            given, as rates fall by themselves; None: as before.
        links: measured links from the reader's location that have changed.
        commands: for the worker whose report this delta answers.
        may_leave: if that worker is leaving: nothing is left to hand over.
    """

    epoch: str
    version: int
    full: bool
    workers: tuple[WorkerReport, ...]
    gone: tuple[str, ...]
    rates: Mapping[str, Mapping[str, float]] | None
    links: Mapping[tuple[str, str], Link] = field(default_factory=dict)
    commands: tuple[Command, ...] = ()
    may_leave: bool = True
    partial: bool = False
    changes: tuple[WorkerChange, ...] = ()
    unsubscribed: tuple[str, ...] = ()
