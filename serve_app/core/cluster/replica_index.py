"""The last report of every replica, indexed by model and by location."""

from __future__ import annotations

from collections.abc import Iterable, KeysView
from dataclasses import dataclass, field

from serve_app.core.cluster.reports import WorkerReport


@dataclass(slots=True)
class ReplicaIndex:
    """Reports by replica, holders by model, replicas by location; holders and replicas are in the order they came in.

    Attributes:
        workers: the last report of every replica; only ``put`` and ``remove`` may write to it.
        holders_version: changes whenever holders or their willingness to serve may have.
    """

    workers: dict[str, WorkerReport] = field(default_factory=dict)
    holders_version: int = field(default=0, compare=False)
    _holders: dict[str, dict[str, None]] = field(default_factory=dict, compare=False)
    _locations: dict[str, dict[str, None]] = field(default_factory=dict, compare=False)

    def holders(self, model_id: str) -> KeysView[str]:
        """The replicas that hold a model or are loading it, by their own word."""
        return self._holders.get(model_id, _NO_REPLICAS).keys()

    def held(self) -> KeysView[str]:
        """Every model that has a holder."""
        return self._holders.keys()

    def at(self, location: str) -> KeysView[str]:
        """The replicas of a location."""
        return self._locations.get(location, _NO_REPLICAS).keys()

    def put(self, report: WorkerReport, changed: Iterable[str] | None = None) -> None:
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
        elif changed is None:
            if before.models.keys() == models.keys() and before.leaving == report.leaving:
                return
            changed = before.models.keys() ^ models.keys()
        self.holders_version += 1
        for model_id in changed:
            if model_id in models:
                self._holders.setdefault(model_id, {})[replica] = None
            else:
                self._let_go(model_id, replica)

    def remove(self, replica: str) -> WorkerReport | None:
        """Forget a replica; returns its last report, or None if it was unknown."""
        report = self.workers.pop(replica, None)
        if report is None:
            return None
        self.holders_version += 1
        for model_id in report.models:
            self._let_go(model_id, replica)
        replicas = self._locations[report.location]
        del replicas[replica]
        if not replicas:
            del self._locations[report.location]
        return report

    def _let_go(self, model_id: str, replica: str) -> None:
        holders = self._holders.get(model_id)
        if holders is not None:
            holders.pop(replica, None)
            if not holders:
                del self._holders[model_id]


_NO_REPLICAS: dict[str, None] = {}
