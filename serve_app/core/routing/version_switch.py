"""When a router goes over from one version of a model to the next, so that no request waits for the change."""

from __future__ import annotations

from collections.abc import Sequence

from serve_app.core.catalog import Catalog
from serve_app.core.cluster.reports import WorkerReport
from serve_app.core.versions import version_key
from serve_app.core.vocabulary import ModelState


class VersionSwitch:
    """Which version of each model answers at one router the requests that name none.

    | the catalog's current version is  | the version before is | next                                         |
    |-----------------------------------|-----------------------|----------------------------------------------|
    | the one that answers              |                       | it goes on                                   |
    | another, and it is to do so at    |                       | it answers                                   |
    | once                              |                       |                                              |
    | another                           | gone from the catalog | it answers                                   |
    | another, loaded by a worker       | any                   | it answers                                   |
    | another, unusable for all workers | any                   | the version before goes on                   |
    | another, loaded by no worker      | in no worker's memory | it answers: either would have to be loaded   |
    | another, loaded by no worker      | in memory             | the version before goes on, for              |
    |                                   |                       | ``SWITCH_WITHIN_S`` at most                  |
    """

    #: Beside the version before there may be no room for the next one.
    SWITCH_WITHIN_S = 30.0

    def __init__(self) -> None:
        self._answering: dict[str, int] = {}
        self._waiting_since_s: dict[tuple[str, int], float] = {}

    def advance(self, catalog: Catalog, workers: Sequence[WorkerReport], now: float) -> dict[str, int]:
        """Return the version that answers, for each model in which that is not the catalog's current one.

        Args:
            catalog: with the versions that are to answer.
            workers: that the router may send to: those of its location.
            now: monotonic seconds.
        """
        waiting = {}
        for name, route in catalog.routes.items():
            before = self._answering.get(name, route.current)
            key = name, route.current
            if before == route.current or route.at_once or before not in catalog.versions(name):
                self._answering[name] = route.current
            elif self._is_due(name, before, route.current, workers, now):
                self._answering[name] = route.current
                self._waiting_since_s.pop(key, None)
            else:
                self._answering[name] = waiting[name] = before
        for name in self._answering.keys() - catalog.routes.keys():
            del self._answering[name]
        return waiting

    def _is_due(self, name: str, before: int, after: int, workers: Sequence[WorkerReport], now: float) -> bool:
        old, new = version_key(name, before), version_key(name, after)
        if workers and all(new in report.unusable for report in workers):
            return False
        if any(_is_ready(report, new) for report in workers):
            return True
        if not any(old in report.models for report in workers):
            return True
        since_s = self._waiting_since_s.setdefault((name, after), now)
        return now - since_s >= self.SWITCH_WITHIN_S


def _is_ready(report: WorkerReport, key: str) -> bool:
    resident = report.models.get(key)
    return resident is not None and resident.state is ModelState.READY
