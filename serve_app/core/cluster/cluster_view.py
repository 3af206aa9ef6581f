"""The cluster as a reader of the coordinator knows it."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Set
from dataclasses import dataclass, field, replace
from typing import ClassVar, TypeVar

from serve_app.core.cluster.reports import ViewDelta, WorkerChange, WorkerReport
from serve_app.core.links import Link

_T = TypeVar("_T")


@dataclass(slots=True)
class ClusterView:
    """One participant's copy of the cluster, kept current by deltas. A hint, never the truth."""

    epoch: str = ""
    version: int = 0
    updated_s: float | None = None
    workers: dict[str, WorkerReport] = field(default_factory=dict)
    rates: dict[str, Mapping[str, float]] = field(default_factory=dict)
    links: dict[tuple[str, str], Link] = field(default_factory=dict)
    #: Whether only the workers that matter to the reader are in it.
    scoped: bool = False
    #: Changes whenever the answer to "which locations can serve this model" may.
    holders_version: int = field(default=0, compare=False)
    _carried: dict[str, float] = field(default_factory=dict)
    #: What ``workers`` says, by model and by location.
    _holders: dict[str, dict[str, None]] = field(default_factory=dict, compare=False)
    _locations: dict[str, dict[str, None]] = field(default_factory=dict, compare=False)

    #: A coordinator that has just started has heard of every live worker within this many seconds. Until then, what
    #: its predecessor knew still counts: otherwise everybody would send everything to whoever reported first.
    CARRY_S: ClassVar[float] = 2.0

    def apply(self, delta: ViewDelta, now: float) -> tuple[str, ...]:
        """Bring this copy up to date; returns the replicas that are known to be gone since."""
        gone = set(delta.gone)
        unknown = set(delta.beyond)
        if delta.full and delta.epoch == self.epoch:
            # Of a scoped view, who is not in it may be well, but does not matter here any more.
            missing = unknown if delta.scoped else gone
            missing |= self.workers.keys() - {report.replica for report in delta.workers}
        elif delta.full:
            self._carried = dict.fromkeys(self.workers, now + self.CARRY_S)
        for report in delta.workers:
            self._learn(report)
        for change in delta.changes:
            known = self.workers.get(change.replica)
            if known is not None:
                self._learn(_changed(known, change))
        gone |= {replica for replica, until_s in self._carried.items() if now >= until_s}
        gone = {replica for replica in gone if self._forget(replica)}
        for replica in unknown:
            self._forget(replica)
        if delta.rates is not None:
            self.rates = dict(delta.rates)
        # Those of a coordinator that has gone still count until the new one has been told of them.
        self.links |= delta.links
        self.epoch, self.version, self.updated_s, self.scoped = delta.epoch, delta.version, now, delta.scoped
        return tuple(sorted(gone))

    def holders(self, model_id: str) -> Set[str]:
        """The replicas that have said to hold a model, or to be loading it."""
        return self._holders.get(model_id, {}).keys()

    def at(self, location: str) -> Collection[str]:
        """The replicas of a location."""
        return self._locations.get(location, {}).keys()

    def _learn(self, report: WorkerReport) -> None:
        replica = report.replica
        self._carried.pop(replica, None)
        before = self.workers.get(replica)
        self.workers[replica] = report
        if before is None:
            self._locations.setdefault(report.location, {})[replica] = None
            held: Collection[str] = ()
        else:
            held = before.models.keys()
            if held == report.models.keys() and before.leaving == report.leaving:
                return
            for model_id in held - report.models.keys():
                self._let_go(model_id, replica)
        self.holders_version += 1
        for model_id in report.models.keys() - held:
            self._holders.setdefault(model_id, {})[replica] = None

    def _forget(self, replica: str) -> bool:
        """Whether it was known."""
        report = self.workers.pop(replica, None)
        self._carried.pop(replica, None)
        if report is None:
            return False
        self.holders_version += 1
        for model_id in report.models:
            self._let_go(model_id, replica)
        del self._locations[report.location][replica]
        return True

    def _let_go(self, model_id: str, replica: str) -> None:
        holders = self._holders[model_id]
        del holders[replica]
        if not holders:
            del self._holders[model_id]

    def rate(self, location: str, model_id: str) -> float:
        """Requests per second for a model by users of a location."""
        return self.rates.get(location, {}).get(model_id, 0.0)

    def age_s(self, now: float) -> float | None:
        """Seconds since the last word of the coordinator; None before the first."""
        return None if self.updated_s is None else max(0.0, now - self.updated_s)


def _replace(known: dict[str, _T], name: str, news: _T | None) -> None:
    if news is None:
        known.pop(name, None)
    else:
        known[name] = news


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
        unaccounted_bytes=change.unaccounted_bytes,
        loading=change.loading,
        queue_s=change.queue_s,
        leaving=change.leaving,
        models=models,
        exec_s=exec_s,
        load_s=load_s,
        primary_for=frozenset(primary_for),
    )
