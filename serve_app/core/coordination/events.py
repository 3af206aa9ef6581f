"""The events of the coordinator's state machine, and the readers of its state."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from serve_app.core.cluster.reports import Demand, WorkerReport
from serve_app.core.coordination.rules import CoordinatorRules
from serve_app.core.links import Link


class Reader(NamedTuple):
    """A participant that reads deltas, and the version that it has.

    A tuple rather than a dataclass, as one is made for every report: that takes a third of the time.
    """

    #: None: the gateway, which serves all locations.
    location: str | None
    #: The worker's replica id; None: a router.
    replica: str | None
    epoch: str
    version: int


@dataclass(slots=True)
class WorkerReported:
    """A worker's report has come.

    ``demand`` is that of the worker if it is not in the report itself. ``reader`` is the worker if it is about to read:
    one event for both takes less time than a ``ReaderSeen`` after every report.
    """

    report: WorkerReport
    demand: tuple[Demand, ...] | None = None
    reader: Reader | None = None


@dataclass(slots=True)
class ReaderSeen:
    """A reader is about to read: its subscription must be up to date."""

    reader: Reader


@dataclass(frozen=True, slots=True, kw_only=True)
class LinksMeasured:
    """A router has measured links from its location."""

    links: Mapping[tuple[str, str], Link]


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerLeft:
    """A worker has shut down."""

    replica: str


@dataclass(frozen=True, slots=True, kw_only=True)
class RulesChanged:
    """A participant has sent its rules."""

    rules: CoordinatorRules


@dataclass(frozen=True, slots=True, kw_only=True)
class TimePassed:
    """Time has passed."""


Event = WorkerReported | ReaderSeen | LinksMeasured | WorkerLeft | RulesChanged | TimePassed
