"""What a router believes of the cluster: the coordinator's view, corrected by what it has seen since."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence, Set
from dataclasses import dataclass, field, replace
from typing import ClassVar, NamedTuple, TypeVar

from serve_app.core.answers import ModelState
from serve_app.core.links import Link
from serve_app.core.nearby import Nearby
from serve_app.core.reports import ViewDelta, WorkerChange, WorkerReport
from serve_app.core.routing_rules import Ways

_T = TypeVar("_T")


@dataclass(slots=True)
class View:
    """One participant's copy of the cluster, kept current by deltas. A hint, never the truth."""

    epoch: str = ""
    version: int = 0
    updated_s: float | None = None
    workers: dict[str, WorkerReport] = field(default_factory=dict)
    rates: dict[str, Mapping[str, float]] = field(default_factory=dict)
    links: dict[tuple[str, str], Link] = field(default_factory=dict)
    #: Whether only the workers that matter to the reader are in it.
    scoped: bool = False
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
            for model_id in held - report.models.keys():
                self._let_go(model_id, replica)
        for model_id in report.models.keys() - held:
            self._holders.setdefault(model_id, {})[replica] = None

    def _forget(self, replica: str) -> bool:
        """Whether it was known."""
        report = self.workers.pop(replica, None)
        self._carried.pop(replica, None)
        if report is None:
            return False
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
    keeps = set(report.keeps)
    for model in change.models:
        _replace(models, model.model_id, model.resident)
        _replace(exec_s, model.model_id, model.exec_s)
        _replace(load_s, model.model_id, model.load_s)
        (keeps.add if model.keeps else keeps.discard)(model.model_id)
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
        keeps=frozenset(keeps),
    )


class Sighting(NamedTuple):
    """What a reply, or what it caused, has shown of a model; counts until the report with the number ``sequence``."""

    state: ModelState | None
    sequence: int


_NOTHING: Mapping[str, Sighting] = {}


class Queue:
    """Inferences that run or wait at one worker, and how long the next one will wait."""

    __slots__ = ("_backlog_s", "jobs")

    def __init__(self) -> None:
        self.jobs = 0
        self._backlog_s = 0.0

    def add(self, exec_s: float) -> None:
        """One more, of about ``exec_s`` seconds."""
        self.jobs += 1
        self._backlog_s += exec_s

    def remove(self, exec_s: float) -> None:
        """One has ended; ``exec_s`` is what it was added with."""
        self.jobs -= 1
        # Sums of floats do not come out even.
        self._backlog_s = max(0.0, self._backlog_s - exec_s) if self.jobs else 0.0

    def wait_s(self, slots: int) -> float:
        """Seconds until one of ``slots`` is free for the next; those that run are half done, on average."""
        if self.jobs < slots:
            return 0.0
        return self._backlog_s / self.jobs * (self.jobs - slots + 0.5) / slots


class Knowledge:
    """The view, and on top of it what this router's own requests have shown and caused since the last reports.

    A report is up to half a second old when it gets here. What a reply says of a worker counts until a report that is
    younger than the reply; a replica that has just failed is avoided until it reports again, and a location that this
    router cannot reach, though the coordinator can, until it is reached.
    """

    def __init__(self) -> None:
        self.view = View()
        #: By replica and model; the same by model and replica.
        self._sightings: dict[str, dict[str, Sighting]] = {}
        self._seen: dict[str, dict[str, Sighting]] = {}
        self._queues: dict[str, Queue] = {}
        self._suspects: dict[str, int] = {}
        self._cut_off: frozenset[str] = frozenset()
        self._usable: tuple[WorkerReport, ...] = ()
        self._at: dict[str, list[WorkerReport]] = {}
        self._nearby: dict[str, Nearby] = {}
        self._pinned_bytes: dict[str, tuple[WorkerReport, int]] = {}
        #: What readers have worked out from the view; forgotten with the next news.
        self.worked_out: dict[str, object] = {}

    def apply(self, delta: ViewDelta, now: float) -> tuple[str, ...]:
        """Take in news from the coordinator (``now`` in seconds); returns the replicas that are gone since."""
        gone = self.view.apply(delta, now)
        for replica in list(self._sightings):
            report = self.view.workers.get(replica)
            sightings = self._sightings[replica]
            for model_id, sighting in list(sightings.items()):
                if report is None or sighting.sequence <= report.sequence:
                    del sightings[model_id]
                    self._unsee(replica, model_id)
            if not sightings:
                del self._sightings[replica]
        for replica, sequence in list(self._suspects.items()):
            report = self.view.workers.get(replica)
            if report is None or report.sequence > sequence:
                del self._suspects[replica]
        self._sort()
        return gone

    def workers(self) -> Sequence[WorkerReport]:
        """The last reports of all replicas that may be sent to; of those that leave, only if all do.

        That is all but those under suspicion, and those cut off from here.
        """
        return self._usable

    def at(self, location: str) -> Sequence[WorkerReport]:
        """Those of ``workers`` that are at a location."""
        return self._at.get(location, ())

    def nearby(self, here: str, ways: Ways) -> Nearby:
        """Those of ``workers`` that a location may send to, as far away as at the last look around."""
        nearby = self._nearby.get(here)
        return self.look_around(here, ways) if nearby is None or nearby.ways is not ways else nearby

    def look_around(self, here: str, ways: Ways) -> Nearby:
        """Find out anew what is near a location: after news, and when ways may have changed."""
        nearby = self._nearby[here] = Nearby(here, ways, self._usable)
        return nearby

    def maybe_holding(self, model_id: str) -> Collection[str]:
        """The replicas of which ``state`` may know the model; not all of them may be sent to."""
        holders, seen = self.view.holders(model_id), self._seen.get(model_id)
        return holders | seen.keys() if seen else holders

    def seen(self, model_id: str) -> Mapping[str, Sighting]:
        """What counts for a model more than the last reports of the replicas that are named."""
        return self._seen.get(model_id, _NOTHING)

    def pinned_bytes(self, report: WorkerReport) -> int:
        """What no request can displace at a worker."""
        known = self._pinned_bytes.get(report.replica)
        if known is not None and known[0] is report:
            return known[1]
        pinned_bytes = sum([model.size_bytes for model in report.models.values() if model.pinned])
        self._pinned_bytes[report.replica] = report, pinned_bytes
        return pinned_bytes

    def _unsee(self, replica: str, model_id: str) -> None:
        seen = self._seen[model_id]
        del seen[replica]
        if not seen:
            del self._seen[model_id]

    def _sort(self) -> None:
        """Who may be sent to, after something has changed: looked at by every choice, so it is not worked out there."""
        self.worked_out.clear()
        self._nearby.clear()
        for replica in self._pinned_bytes.keys() - self.view.workers.keys():
            del self._pinned_bytes[replica]
        suspects, cut_off = self._suspects, self._cut_off
        usable = tuple(self.view.workers.values())
        if suspects or cut_off:
            usable = tuple(
                report for report in usable if report.replica not in suspects and report.location not in cut_off
            )
        self._usable = tuple(report for report in usable if not report.leaving) or usable
        self._at = {}
        for report in self._usable:
            self._at.setdefault(report.location, []).append(report)

    def reach(self, location: str, *, reached: bool) -> tuple[str, ...]:
        """Whether a location answers from here; returns the replicas that are cut off by this."""
        if reached:
            if location in self._cut_off:
                self._cut_off -= {location}
                self._sort()
            return ()
        self._cut_off |= {location}
        self._sort()
        return tuple(replica for replica, report in self.view.workers.items() if report.location == location)

    def state(self, report: WorkerReport, model_id: str) -> ModelState | None:
        """The state of a model at a worker, as far as known."""
        sightings = self._sightings.get(report.replica)
        if sightings is not None and (sighting := sightings.get(model_id)) is not None:
            return sighting.state
        resident = report.models.get(model_id)
        return resident.state if resident else None

    def loading(self, report: WorkerReport) -> int:
        """How many models load at a worker or wait for their turn to, those that this router has caused included."""
        sightings = self._sightings.get(report.replica)
        if not sightings:
            return report.loading
        loading = report.loading
        for model_id, sighting in sightings.items():
            if sighting.state is ModelState.LOADING and model_id not in report.models:
                loading += 1
        return loading

    def see(self, replica: str, model_id: str, state: ModelState | None, sequence: int) -> None:
        """A model was in ``state`` at ``replica`` after its report number ``sequence - 1``."""
        report = self.view.workers.get(replica)
        if report is not None and sequence <= report.sequence:
            return
        sighting = Sighting(state, sequence)
        self._sightings.setdefault(replica, {})[model_id] = sighting
        self._seen.setdefault(model_id, {})[replica] = sighting

    def expect_load(self, replica: str, model_id: str) -> None:
        """A request that will load a model is on its way to ``replica``: later ones can join it."""
        report = self.view.workers.get(replica)
        if report is not None:
            # The next report may have been taken before the request gets there.
            self.see(replica, model_id, ModelState.LOADING, report.sequence + 2)

    def suspect(self, replica: str) -> None:
        """A call to ``replica`` has failed: avoid it until it reports again."""
        report = self.view.workers.get(replica)
        if report is not None:
            self._suspects[replica] = report.sequence
            for model_id in self._sightings.pop(replica, {}):
                self._unsee(replica, model_id)
            self._sort()

    def sent(self, replica: str, exec_s: float) -> None:
        """A request of about ``exec_s`` seconds was sent to ``replica``."""
        self._queues.setdefault(replica, Queue()).add(exec_s)

    def returned(self, replica: str, exec_s: float) -> None:
        """It came back, well or not."""
        queue = self._queues.get(replica)
        if queue is not None:
            queue.remove(exec_s)
            if not queue.jobs:
                del self._queues[replica]

    def queue_s(self, report: WorkerReport) -> float:
        """Seconds until a request sent to a worker now begins to execute."""
        queue = self._queues.get(report.replica)
        return max(report.queue_s, queue.wait_s(report.exec_slots)) if queue else report.queue_s
