"""The cluster as a reader of the coordinator knows it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import ClassVar, TypeVar

from serve_app.core.cluster.replica_index import ReplicaIndex
from serve_app.core.cluster.reports import ViewDelta, WorkerChange, WorkerReport
from serve_app.core.links import Link

_T = TypeVar("_T")


@dataclass(slots=True)
class ClusterView(ReplicaIndex):
    """One participant's copy of the cluster, kept current by deltas. A hint, never the truth.

    Attributes:
        epoch: of the coordinator that sent the last delta.
        version: of the last delta.
        updated_s: when the last delta came; None before the first.
        rates: requests per second, by location and model.
        links: measured ones, by the two locations.
        partial: whether only the workers that matter to the reader are in it.
    """

    epoch: str = ""
    version: int = 0
    updated_s: float | None = None
    rates: dict[str, Mapping[str, float]] = field(default_factory=dict)
    links: dict[tuple[str, str], Link] = field(default_factory=dict)
    partial: bool = False
    #: Replicas known from an earlier coordinator, and until when they count unless the present one confirms them.
    _carried: dict[str, float] = field(default_factory=dict)

    #: Within this many seconds a coordinator that has just started has a report of every live worker. Until then, what
    #: its predecessor knew still counts: otherwise all would send everything to the replicas that reported first.
    CARRY_S: ClassVar[float] = 2.0

    def apply(self, delta: ViewDelta, now: float) -> tuple[str, ...]:
        """Bring this copy up to date; returns the replicas that are known to be gone since."""
        gone = set(delta.gone)
        unsubscribed = set(delta.unsubscribed)
        if delta.full and delta.epoch == self.epoch:
            # A replica that a partial view leaves out may be well, but does not matter to the reader any more.
            missing = unsubscribed if delta.partial else gone
            missing |= self.workers.keys() - {report.replica for report in delta.workers}
        elif delta.full:
            self._carried = dict.fromkeys(self.workers, now + self.CARRY_S)
        for report in delta.workers:
            self._carried.pop(report.replica, None)
            self.put(report)
        for change in delta.changes:
            known = self.workers.get(change.replica)
            if known is not None:
                self._carried.pop(change.replica, None)
                self.put(_changed(known, change))
        gone |= {replica for replica, until_s in self._carried.items() if now >= until_s}
        gone = {replica for replica in gone if self._forget(replica)}
        for replica in unsubscribed:
            self._forget(replica)
        if delta.rates is not None:
            self.rates = dict(delta.rates)
        # Links that an earlier coordinator knew still count until the present one knows them.
        self.links |= delta.links
        self.epoch, self.version, self.updated_s, self.partial = delta.epoch, delta.version, now, delta.partial
        return tuple(sorted(gone))

    def _forget(self, replica: str) -> bool:
        """Whether it was known."""
        self._carried.pop(replica, None)
        return self.remove(replica) is not None

    def rate(self, location: str, model_id: str) -> float:
        """Requests per second for a model by users of a location."""
        return self.rates.get(location, {}).get(model_id, 0.0)

    def age_s(self, now: float) -> float | None:
        """Seconds since the last delta; None before the first."""
        return None if self.updated_s is None else max(0.0, now - self.updated_s)


def _replace(known: dict[str, _T], name: str, value: _T | None) -> None:
    if value is None:
        known.pop(name, None)
    else:
        known[name] = value


def _changed(report: WorkerReport, change: WorkerChange) -> WorkerReport:
    models, exec_s, load_s = dict(report.models), dict(report.exec_s), dict(report.load_s)
    primary_for = set(report.primary_for)
    for model in change.models:
        _replace(models, model.model_id, model.resident)
        _replace(exec_s, model.model_id, model.exec_s)
        _replace(load_s, model.model_id, model.load_s)
        (primary_for.add if model.primary_for else primary_for.discard)(model.model_id)
    return replace(
        report,
        sequence=change.sequence,
        capacity_bytes=change.capacity_bytes,
        used_bytes=change.used_bytes,
        workspace_bytes=change.workspace_bytes,
        unaccounted_bytes=change.unaccounted_bytes,
        loading=change.loading,
        queue_s=change.queue_s,
        leaving=change.leaving,
        models=models,
        exec_s=exec_s,
        load_s=load_s,
        primary_for=frozenset(primary_for),
    )
