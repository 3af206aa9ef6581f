"""The coordinator's directory: the last report of every live worker, and the deltas of it for distant readers."""

from __future__ import annotations

import dataclasses
from bisect import bisect_right
from collections.abc import Collection, Container

from serve_app.core.cluster.replica_index import ReplicaIndex
from serve_app.core.cluster.reports import ModelChange, WorkerChange, WorkerReport
from serve_app.core.vocabulary import ResidentModel


class _Derived:
    """Values that reads have worked out from an entry: no part of its state, so copies begin without them."""

    __slots__ = ("changes", "unevictable", "without_demand")

    def __init__(self) -> None:
        self.without_demand: WorkerReport | None = None
        #: By the number of recent versions that the reader knows.
        self.changes: dict[int, WorkerChange] = {}
        #: The published models that are unevictable.
        self.unevictable: frozenset[str] | None = None

    def __reduce__(self) -> tuple[type[_Derived], tuple[()]]:
        return _Derived, ()


class DirectoryEntry:
    """One worker: its last report, and what is published of it to readers at other locations.

    Published is what changes a decision: models that come and go, and changes of times and queues beyond noise.
    Otherwise a cluster of n workers would send n reports to n readers four times a second.

    Args:
        report: the first one.
        version: at which it came.
        changes_kept: how many changes of models are kept; readers that lack older ones get the whole report.

    Attributes:
        report: the last one.
        reported_version: at which it came.
        published: the last report that was published; measured times are published apart from it.
        published_version: at which it was.
        compacted_version: the oldest version from which a change can be built.
    """

    #: A change of a distant queue that is published, in seconds: routers trust no smaller differences from afar.
    QUEUE_S = 0.2
    #: A relative change of a measured time that is published.
    TIME_SHARE = 0.2
    #: All changes are published every so many reports, as a router's observations count until a younger report.
    EVERY_REPORTS = 8
    #: Changes are built once for all readers that know one of so many recent versions.
    SHARED_VERSIONS = 8

    __slots__ = (
        "_changes_kept", "_derived", "_exec_s", "_load_s", "_model_changes", "_recent_versions", "compacted_version",
        "published", "published_version", "report", "reported_version",
    )  # fmt: skip

    def __init__(self, report: WorkerReport, version: int, changes_kept: int) -> None:
        self._changes_kept = changes_kept
        self.report = self.published = report
        self.reported_version = self.published_version = self.compacted_version = version
        #: Times as published.
        self._exec_s, self._load_s = dict(report.exec_s), dict(report.load_s)
        #: The last published change of each model and its version, oldest first.
        self._model_changes: dict[str, tuple[int, ModelChange]] = {}
        self._recent_versions = [version]
        self._derived = _Derived()

    def record(self, report: WorkerReport, version: int) -> Collection[str]:
        """Take in the next report; returns the models that have come or gone, or whose published state changes."""
        self.report, self.reported_version = report, version
        self._derived.without_demand = None
        published = self.published
        is_due = report.sequence - published.sequence >= self.EVERY_REPORTS
        touched = self._moved(published, report)
        if is_due:
            touched |= self._remeasured(report)
        is_other = report.unusable != published.unusable
        if not (touched or is_due or is_other or self._is_notable(published, report)):
            return ()
        if is_other:
            # Rare, and not in changes: readers get a whole report.
            self.compacted_version = version
        self.published, self.published_version = report, version
        if touched or is_due:
            self._derived.unevictable = None
        for model_id in touched:
            for known, measured in ((self._exec_s, report.exec_s), (self._load_s, report.load_s)):
                if model_id in measured:
                    known[model_id] = measured[model_id]
            self._model_changes.pop(model_id, None)
            self._model_changes[model_id] = version, self._model_change(model_id)
        while len(self._model_changes) > self._changes_kept:
            self.compacted_version, _ = self._model_changes.pop(next(iter(self._model_changes)))
        self._recent_versions.append(version)
        del self._recent_versions[: -self.SHARED_VERSIONS]
        self._derived.changes.clear()
        return touched

    def without_demand(self) -> WorkerReport:
        """The last report as readers of the same location get it; demand is for the coordinator alone."""
        derived = self._derived
        if derived.without_demand is None:
            derived.without_demand = dataclasses.replace(self.report, demand=()) if self.report.demand else self.report
        return derived.without_demand

    def change(self, since: int) -> WorkerChange:
        """The published change for a reader that has version ``since`` of this worker."""
        known = bisect_right(self._recent_versions, since)
        change = self._derived.changes.get(known)
        if change is None:
            models = []
            for version, model in reversed(self._model_changes.values()):
                if version <= since:
                    break
                models.append(model)
            change = self._change(tuple(models))
            # Readers that know none of the recent versions may differ in what they know.
            if known:
                self._derived.changes[known] = change
        return change

    def change_of(self, model_id: str) -> WorkerChange:
        """All that is published of one model."""
        return self._change((self._model_change(model_id),))

    def summary(self, model_ids: Container[str] | None) -> WorkerReport:
        """All that is published, for a reader interested in some models, or in all."""
        published, derived = self.published, self._derived
        if derived.unevictable is None:
            derived.unevictable = frozenset(
                [model.model_id for model in published.models.values() if model.unevictable]
            )
        models = {
            model_id: _without_uses(model)
            for model_id, model in published.models.items()
            if model_ids is None or model_id in model_ids or model_id in derived.unevictable
        }
        return dataclasses.replace(
            published,
            models=models,
            exec_s={model_id: seconds for model_id, seconds in self._exec_s.items() if model_id in models},
            load_s={model_id: seconds for model_id, seconds in self._load_s.items() if model_id in models},
            outcomes={},
            demand=(),
            primary_for=published.primary_for.intersection(models),
        )

    def _change(self, models: tuple[ModelChange, ...]) -> WorkerChange:
        published = self.published
        return WorkerChange(
            replica=published.replica,
            sequence=published.sequence,
            capacity_bytes=published.capacity_bytes,
            used_bytes=published.used_bytes,
            workspace_bytes=published.workspace_bytes,
            unaccounted_bytes=published.unaccounted_bytes,
            loading=published.loading,
            queue_s=published.queue_s,
            leaving=published.leaving,
            models=models,
        )

    def _model_change(self, model_id: str) -> ModelChange:
        resident = self.published.models.get(model_id)
        return ModelChange(
            model_id=model_id,
            resident=None if resident is None else _without_uses(resident),
            primary_for=model_id in self.published.primary_for,
            exec_s=self._exec_s.get(model_id),
            load_s=self._load_s.get(model_id),
        )

    def _moved(self, published: WorkerReport, report: WorkerReport) -> set[str]:
        """The models that have come, gone or changed state, and those that the worker became or ceased primary for."""
        before, after = published.models, report.models
        # Mostly nothing has moved, not even in the order of the names, which is seen at once.
        moved = set() if list(after) == list(before) else set(after.keys() ^ before.keys())
        # While nothing loads, all models are ready; what is unevictable can wait until everything is published.
        if published.loading or report.loading or report.sequence - published.sequence >= self.EVERY_REPORTS:
            for model_id, model in after.items():
                known = before.get(model_id)
                if known is not None and (
                    known.state is not model.state
                    or known.unevictable != model.unevictable
                    or known.protected != model.protected
                ):
                    moved.add(model_id)
        if published.primary_for != report.primary_for:
            moved |= published.primary_for ^ report.primary_for
        return moved

    def _remeasured(self, report: WorkerReport) -> set[str]:
        """The models whose times differ from the published ones by more than noise."""
        return {
            model_id
            for known, measured in ((self._exec_s, report.exec_s), (self._load_s, report.load_s))
            for model_id, seconds in measured.items()
            if (known_s := known.get(model_id)) is None or abs(seconds - known_s) > self.TIME_SHARE * known_s
        }

    def _is_notable(self, published: WorkerReport, report: WorkerReport) -> bool:
        return (
            abs(report.queue_s - published.queue_s) > self.QUEUE_S
            or report.loading // report.load_slots != published.loading // published.load_slots
            or report.leaving != published.leaving
            or report.capacity_bytes != published.capacity_bytes
            or report.workspace_bytes != published.workspace_bytes
        )


def _without_uses(model: ResidentModel) -> ResidentModel:
    """As published: the number of uses changes all the time."""
    return dataclasses.replace(model, uses=0) if model.uses else model


class Directory(ReplicaIndex):
    """The last report of every live worker, its holders and locations, and what is published of it.

    Args:
        changes_kept: see ``DirectoryEntry``.

    Attributes:
        entries: by replica.
        membership_version: counts the replicas that have come and gone.
    """

    __slots__ = ("_changes_kept", "entries", "membership_version")

    def __init__(self, changes_kept: int = 256) -> None:
        super().__init__()
        self._changes_kept = changes_kept
        self.entries: dict[str, DirectoryEntry] = {}
        self.membership_version = 0

    def record(self, report: WorkerReport, version: int) -> Collection[str]:
        """Take in a worker's report; returns its models that have come or gone, or whose published state changes."""
        entry = self.entries.get(report.replica)
        if entry is None:
            self.entries[report.replica] = DirectoryEntry(report, version, self._changes_kept)
            self.membership_version += 1
            self.put(report)
            return report.models.keys()
        # The last published report names the same models as the last one: a difference is published at once.
        touched = entry.record(report, version)
        if touched:
            self.put(report, touched)
        else:
            self.workers[report.replica] = report
        return touched

    def deregister(self, replica: str) -> None:
        """Forget a worker that has gone."""
        del self.entries[replica]
        self.membership_version += 1
        self.remove(replica)
