"""The coordinator's directory: every live worker's last report, and what is new of it for whom."""

from __future__ import annotations

import dataclasses
from bisect import bisect_right
from collections.abc import Collection, Iterator, KeysView, Mapping

from serve_app.core.cluster.reports import ModelChange, WorkerChange, WorkerReport
from serve_app.core.vocabulary import ResidentModel


class DirectoryEntry:
    """One worker: its last report, and what distant readers are told of it.

    Those are told what changes a decision: which models come and go, and of times and queues what is more than noise.
    Otherwise a cluster of n workers would send n reports to n readers four times a second.

    Args:
        report: the first one.
        version: as of which it is known.
    """

    #: A queue at a distant worker is told to so many seconds: routers do not believe less from afar anyway.
    QUEUE_S = 0.2
    #: And a measured time, if it has changed by such a share.
    TIME_SHARE = 0.2
    #: Whatever has changed, every so many reports: what routers have seen themselves counts until a younger report.
    EVERY_REPORTS = 8

    #: So many changes of models are remembered; who is further behind is told everything.
    REMEMBERED = 256

    #: News to readers that know what was told up to so many times ago are worked out once for all of them.
    SHARED = 8

    __slots__ = (
        "_changes", "_exec_s", "_load_s", "_pinned", "_plain", "_times_told", "_touched", "changed", "read_s", "report",
        "told", "told_at", "whole_at",
    )  # fmt: skip

    def __init__(self, report: WorkerReport, version: int) -> None:
        #: Versions of the last report, of what was told last, and as of which changes are enough.
        self.changed = self.told_at = self.whole_at = version
        #: The last report, and the last that distant readers know of; times as they know them.
        self.report = self.told = report
        self._exec_s, self._load_s = dict(report.exec_s), dict(report.load_s)
        #: What was told of models since it joined and as of which version, the last ones last.
        self._touched: dict[str, tuple[int, ModelChange]] = {}
        #: Versions as of which something was told lately; and by those of them that a reader knows, what it does not.
        self._times_told = [version]
        self._changes: dict[int, WorkerChange] = {}
        self._plain: WorkerReport | None = None
        #: Those of its models that are; worked out when somebody needs them.
        self._pinned: frozenset[str] | None = None
        #: When the worker was told of others last.
        self.read_s: float | None = None

    def hear(self, report: WorkerReport, version: int) -> Collection[str]:
        """Take in the next report; returns the models that have come or gone, or are news otherwise."""
        self.report, self.changed, self._plain = report, version, None
        told = self.told
        is_due = report.sequence - told.sequence >= self.EVERY_REPORTS
        touched = self._moved(told, report)
        if is_due:
            touched |= self._remeasured(report)
        if not (touched or is_due or self._is_notable(told, report)):
            return ()
        self.told_at, self.told = version, report
        if touched or is_due:
            self._pinned = None
        for model_id in touched:
            for said, measured in ((self._exec_s, report.exec_s), (self._load_s, report.load_s)):
                if model_id in measured:
                    said[model_id] = measured[model_id]
            self._touched.pop(model_id, None)
            self._touched[model_id] = version, self._model(model_id)
        while len(self._touched) > self.REMEMBERED:
            self.whole_at, _ = self._touched.pop(next(iter(self._touched)))
        self._times_told.append(version)
        del self._times_told[: -self.SHARED]
        self._changes.clear()
        return touched

    def plain(self) -> WorkerReport:
        """The last report as it is passed on; what users have asked for is not."""
        if self._plain is None:
            self._plain = dataclasses.replace(self.report, demand=()) if self.report.demand else self.report
        return self._plain

    def change(self, since: int) -> WorkerChange:
        """What a reader does not know that knows the worker as of version ``since``."""
        known = bisect_right(self._times_told, since)
        change = self._changes.get(known)
        if change is None:
            touched = []
            for version, model in reversed(self._touched.values()):
                if version <= since:
                    break
                touched.append(model)
            change = self._changed(tuple(touched))
            # What was told before that is not remembered by when.
            if known:
                self._changes[known] = change
        return change

    def of(self, model_id: str) -> WorkerChange:
        """All that is told of one of its models."""
        return self._changed((self._model(model_id),))

    def summary(self, names: Collection[str] | None) -> WorkerReport:
        """All that a reader is told who is interested in some models, or in all."""
        told = self.told
        if self._pinned is None:
            self._pinned = frozenset([model.model_id for model in told.models.values() if model.unevictable])
        models = {
            model_id: _without_uses(model)
            for model_id, model in told.models.items()
            if names is None or model_id in names or model_id in self._pinned
        }
        return dataclasses.replace(
            told,
            models=models,
            exec_s={model_id: seconds for model_id, seconds in self._exec_s.items() if model_id in models},
            load_s={model_id: seconds for model_id, seconds in self._load_s.items() if model_id in models},
            outcomes={},
            demand=(),
            primary_for=told.primary_for.intersection(models),
        )

    def _changed(self, models: tuple[ModelChange, ...]) -> WorkerChange:
        told = self.told
        return WorkerChange(
            replica=told.replica,
            sequence=told.sequence,
            capacity_bytes=told.capacity_bytes,
            used_bytes=told.used_bytes,
            unaccounted_bytes=told.unaccounted_bytes,
            loading=told.loading,
            queue_s=told.queue_s,
            leaving=told.leaving,
            models=models,
        )

    def _model(self, model_id: str) -> ModelChange:
        resident = self.told.models.get(model_id)
        return ModelChange(
            model_id=model_id,
            resident=None if resident is None else _without_uses(resident),
            primary_for=model_id in self.told.primary_for,
            exec_s=self._exec_s.get(model_id),
            load_s=self._load_s.get(model_id),
        )

    def _moved(self, told: WorkerReport, report: WorkerReport) -> set[str]:
        """The models that have come, gone, or are in another state; and those it keeps now, or no more."""
        before, after = told.models, report.models
        # Mostly nothing has moved, not even in the order of the names, which is seen at once.
        moved = set() if list(after) == list(before) else set(after.keys() ^ before.keys())
        # Where nothing loads, and nothing did, all are ready; what is pinned can wait until all is told again.
        if told.loading or report.loading or report.sequence - told.sequence >= self.EVERY_REPORTS:
            for model_id, model in after.items():
                known = before.get(model_id)
                if known is not None and (
                    known.state is not model.state
                    or known.unevictable != model.unevictable
                    or known.protected != model.protected
                ):
                    moved.add(model_id)
        if told.primary_for != report.primary_for:
            moved |= told.primary_for ^ report.primary_for
        return moved

    def _remeasured(self, report: WorkerReport) -> set[str]:
        """The models whose times are others than readers were told."""
        return {
            model_id
            for said, measured in ((self._exec_s, report.exec_s), (self._load_s, report.load_s))
            for model_id, seconds in measured.items()
            if (known_s := said.get(model_id)) is None or abs(seconds - known_s) > self.TIME_SHARE * known_s
        }

    def _is_notable(self, told: WorkerReport, report: WorkerReport) -> bool:
        return (
            abs(report.queue_s - told.queue_s) > self.QUEUE_S
            or report.loading // report.load_slots != told.loading // told.load_slots
            or report.leaving != told.leaving
            or report.capacity_bytes != told.capacity_bytes
        )


def _without_uses(model: ResidentModel) -> ResidentModel:
    """As it is told of: the number of uses changes all the time."""
    return dataclasses.replace(model, uses=0) if model.uses else model


class Directory(Mapping[str, WorkerReport]):
    """The last report of every live worker, by replica; knows for every model who holds it."""

    def __init__(self) -> None:
        self._entries: dict[str, DirectoryEntry] = {}
        self._holders: dict[str, dict[str, None]] = {}
        self._locations: dict[str, dict[str, None]] = {}
        #: How often somebody has come or gone.
        self.moves = 0

    def __getitem__(self, replica: str) -> WorkerReport:
        return self._entries[replica].report

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def entries(self) -> Mapping[str, DirectoryEntry]:
        """What is told of every worker, by replica."""
        return self._entries

    def hear(self, report: WorkerReport, version: int) -> Collection[str]:
        """Take in a worker's report; returns the models at it that are news."""
        entry = self._entries.get(report.replica)
        if entry is None:
            self._entries[report.replica] = DirectoryEntry(report, version)
            self.moves += 1
            self._locations.setdefault(report.location, {})[report.replica] = None
            for model_id in report.models:
                self._holders.setdefault(model_id, {})[report.replica] = None
            return report.models.keys()
        news = entry.hear(report, version)
        for model_id in news:
            if model_id in report.models:
                self._holders.setdefault(model_id, {})[report.replica] = None
            else:
                self._let_go(model_id, report.replica)
        return news

    def depart(self, replica: str) -> None:
        """A worker is gone."""
        report = self._entries.pop(replica).report
        self.moves += 1
        for model_id in report.models:
            self._let_go(model_id, replica)
        del self._locations[report.location][replica]
        if not self._locations[report.location]:
            del self._locations[report.location]

    def holders(self, model_id: str) -> Collection[str]:
        """The replicas that hold a model or are loading it."""
        return self._holders.get(model_id, {}).keys()

    def held(self) -> KeysView[str]:
        """Every model that somebody holds."""
        return self._holders.keys()

    def at(self, location: str) -> Collection[str]:
        """The replicas of a location."""
        return self._locations.get(location, {}).keys()

    def _let_go(self, model_id: str, replica: str) -> None:
        holders = self._holders.get(model_id)
        if holders is not None:
            holders.pop(replica, None)
            if not holders:
                del self._holders[model_id]
