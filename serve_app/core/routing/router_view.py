"""What a router believes of the cluster: the coordinator's view, corrected by what it has seen since."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

from serve_app.core.cluster.cluster_view import ClusterView
from serve_app.core.cluster.reports import ViewDelta, WorkerReport
from serve_app.core.links import Topology
from serve_app.core.queue_estimate import QueueEstimate
from serve_app.core.routing.neighbors import NeighborIndex
from serve_app.core.vocabulary import ModelState


class Observation(NamedTuple):
    """What a reply, or what it caused, has shown of a model; counts until the report with the number ``sequence``."""

    state: ModelState | None
    sequence: int


_NOTHING: Mapping[str, Observation] = {}


class RouterView:
    """The view, and on top of it what this router's own requests have shown and caused since the last reports.

    A report is up to half a second old when it gets here. What a reply says of a worker counts until a report that is
    younger than the reply; a replica that has just failed is avoided until it reports again, and a location that this
    router cannot reach, though the coordinator can, until it is reached.
    """

    def __init__(self) -> None:
        self.view = ClusterView()
        #: By replica and model; the same by model and replica.
        self._sightings: dict[str, dict[str, Observation]] = {}
        self._seen: dict[str, dict[str, Observation]] = {}
        self._queues: dict[str, QueueEstimate] = {}
        self._suspects: dict[str, int] = {}
        self._cut_off: frozenset[str] = frozenset()
        self._usable: tuple[WorkerReport, ...] = ()
        self._at: dict[str, list[WorkerReport]] = {}
        self._nearby: dict[str, NeighborIndex] = {}
        self._unevictable_bytes: dict[str, tuple[WorkerReport, int]] = {}
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

    def nearby(self, here: str, ways: Topology) -> NeighborIndex:
        """Those of ``workers`` that a location may send to, as far away as at the last look around."""
        nearby = self._nearby.get(here)
        return self.look_around(here, ways) if nearby is None or nearby.ways is not ways else nearby

    def look_around(self, here: str, ways: Topology) -> NeighborIndex:
        """Find out anew what is near a location: after news, and when ways may have changed."""
        nearby = self._nearby[here] = NeighborIndex(here, ways, self._usable)
        return nearby

    def maybe_holding(self, model_id: str) -> Collection[str]:
        """The replicas of which ``state`` may know the model; not all of them may be sent to."""
        holders, seen = self.view.holders(model_id), self._seen.get(model_id)
        return holders | seen.keys() if seen else holders

    def seen(self, model_id: str) -> Mapping[str, Observation]:
        """What counts for a model more than the last reports of the replicas that are named."""
        return self._seen.get(model_id, _NOTHING)

    def unevictable_bytes(self, report: WorkerReport) -> int:
        """What no request can displace at a worker."""
        known = self._unevictable_bytes.get(report.replica)
        if known is not None and known[0] is report:
            return known[1]
        unevictable_bytes = sum([model.size_bytes for model in report.models.values() if model.unevictable])
        self._unevictable_bytes[report.replica] = report, unevictable_bytes
        return unevictable_bytes

    def _unsee(self, replica: str, model_id: str) -> None:
        seen = self._seen[model_id]
        del seen[replica]
        if not seen:
            del self._seen[model_id]

    def _sort(self) -> None:
        """Who may be sent to, after something has changed: looked at by every choice, so it is not worked out there."""
        self.worked_out.clear()
        self._nearby.clear()
        for replica in self._unevictable_bytes.keys() - self.view.workers.keys():
            del self._unevictable_bytes[replica]
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
        sighting = Observation(state, sequence)
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
        self._queues.setdefault(replica, QueueEstimate()).add(exec_s)

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
