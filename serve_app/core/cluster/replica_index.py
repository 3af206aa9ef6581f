"""The last report of every replica, indexed by model and by location."""

from __future__ import annotations

from collections.abc import Collection, KeysView
from dataclasses import dataclass, field

from serve_app.core.cluster.reports import WorkerReport


@dataclass(slots=True)
class ReplicaIndex:
    """Reports by replica, holders by model, replicas by location; holders and replicas are in the order they came in.

    Attributes:
        workers: the last report of every replica; only ``put`` and ``remove`` may write to it.
    """

    workers: dict[str, WorkerReport] = field(default_factory=dict)
    #: How often holders, or whether they are leaving, have changed: in all, and at each location.
    _changes: int = field(default=0, compare=False)
    _changes_at: dict[str, int] = field(default_factory=dict, compare=False)
    _holders: dict[str, dict[str, None]] = field(default_factory=dict, compare=False)
    _locations: dict[str, dict[str, None]] = field(default_factory=dict, compare=False)

    def holders(self, model_id: str) -> KeysView[str]:
        """The replicas that hold a model or are loading it, by their own word."""
        return self._holders.get(model_id, _NO_REPLICAS).keys()

    def held_models(self) -> KeysView[str]:
        """Every model that has a holder."""
        return self._holders.keys()

    def replicas_at(self, location: str) -> KeysView[str]:
        """The replicas of a location."""
        return self._locations.get(location, _NO_REPLICAS).keys()

    def version_elsewhere(self, location: str) -> int:
        """A number that changes whenever holders at other locations, or whether they are leaving, may have changed."""
        return self._changes - self._changes_at.get(location, 0)

    def put(self, report: WorkerReport, changed: Collection[str] | None = None) -> None:
        """Replace the last report of a replica.

        Args:
            report: the new one.
            changed: every model that only one of the two reports has, and perhaps others; None: unknown.
        """
        replica, models = report.replica, report.models
        before = self.workers.get(replica)
        self.workers[replica] = report
        if before is None:
            self._locations.setdefault(report.location, {})[replica] = None
            changed = models
        else:
            if changed is None:
                changed = before.models.keys() ^ models.keys()
            if not changed and before.leaving == report.leaving:
                return
        self._count_change(report.location)
        for model_id in changed:
            if model_id in models:
                self._holders.setdefault(model_id, {})[replica] = None
            else:
                self._remove_holder(model_id, replica)

    def remove(self, replica: str) -> WorkerReport | None:
        """Forget a replica; returns its last report, or None if it was unknown."""
        report = self.workers.pop(replica, None)
        if report is None:
            return None
        self._count_change(report.location)
        for model_id in report.models:
            self._remove_holder(model_id, replica)
        replicas = self._locations[report.location]
        del replicas[replica]
        if not replicas:
            del self._locations[report.location]
        return report

    def _count_change(self, location: str) -> None:
        self._changes += 1
        self._changes_at[location] = self._changes_at.get(location, 0) + 1

    def _remove_holder(self, model_id: str, replica: str) -> None:
        holders = self._holders.get(model_id)
        if holders is not None:
            holders.pop(replica, None)
            if not holders:
                del self._holders[model_id]


_NO_REPLICAS: dict[str, None] = {}
