"""What a router believes of the cluster: the coordinator's view, corrected by the replies that came since."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

from serve_app.core.catalog import ModelProfile
from serve_app.core.cluster.cluster_view import ClusterView
from serve_app.core.cluster.reports import ViewDelta, WorkerReport
from serve_app.core.links import Topology
from serve_app.core.queue_estimate import QueueEstimate
from serve_app.core.routing.displacement_cost import DisplacementCosts
from serve_app.core.routing.neighbors import NeighborIndex
from serve_app.core.routing.rules import RoutingRules
from serve_app.core.vocabulary import ModelState


class Observation(NamedTuple):
    """The state of a model at a replica as a reply has shown it; counts until the report number ``sequence``."""

    state: ModelState | None
    sequence: int


class _CostEntry(NamedTuple):
    """Displacement costs, and what they were computed from."""

    report: WorkerReport
    rules: RoutingRules
    links: Topology
    costs: DisplacementCosts

    def is_of(self, report: WorkerReport, rules: RoutingRules, links: Topology) -> bool:
        """By identity, which is fast: reports and rules are replaced and never changed."""
        return self.report is report and self.rules is rules and self.links is links


_NO_OBSERVATIONS: Mapping[str, Observation] = {}


class RouterView:
    """An optimistic overlay on ``cluster``: what the requests of one router have shown and caused since the reports.

    A report is up to half a second old when it gets here. What a reply says of a worker counts until a report that is
    younger than the reply. A replica that has just failed is avoided until it reports again, and a location that this
    router cannot reach, though the coordinator can, until it is reached.
    """

    def __init__(self) -> None:
        self.cluster = ClusterView()
        #: By replica and model; the same by model and replica.
        self._observations: dict[str, dict[str, Observation]] = {}
        self._observed: dict[str, dict[str, Observation]] = {}
        self._queues: dict[str, QueueEstimate] = {}
        self._suspects: dict[str, int] = {}
        self._unreachable: frozenset[str] = frozenset()
        # Computed from all this, because every choice needs it; forgotten with the next delta.
        self._usable: tuple[WorkerReport, ...] = ()
        self._usable_at: dict[str, list[WorkerReport]] = {}
        self._neighbors: dict[str, NeighborIndex] = {}
        self._displacement_costs: dict[str, _CostEntry] = {}
        self._unevictable_bytes: dict[str, tuple[WorkerReport, int]] = {}

    def apply(self, delta: ViewDelta, now: float) -> tuple[str, ...]:
        """Apply a delta of the coordinator (``now`` in seconds); returns the replicas that are gone since."""
        gone = self.cluster.apply(delta, now)
        for replica in list(self._observations):
            report = self.cluster.workers.get(replica)
            observations = self._observations[replica]
            for model_id, observation in list(observations.items()):
                if report is None or observation.sequence <= report.sequence:
                    del observations[model_id]
                    self._forget_observation(replica, model_id)
            if not observations:
                del self._observations[replica]
        for replica, sequence in list(self._suspects.items()):
            report = self.cluster.workers.get(replica)
            if report is None or report.sequence > sequence:
                del self._suspects[replica]
        self._update_usable()
        return gone

    # Workers

    def workers(self) -> Sequence[WorkerReport]:
        """The last reports of all replicas that may be sent to; of those that leave, only if all do.

        That is all but suspects, and those of unreachable locations.
        """
        return self._usable

    def workers_at(self, location: str) -> Sequence[WorkerReport]:
        """Those of ``workers`` that are at a location."""
        return self._usable_at.get(location, ())

    def neighbors(self, here: str, links: Topology) -> NeighborIndex:
        """Those of ``workers`` that a location may send to, as far away as when they were sorted last."""
        neighbors = self._neighbors.get(here)
        return self._rebuild_neighbors(here, links) if neighbors is None or neighbors.links is not links else neighbors

    def suspect(self, replica: str) -> None:
        """A call to ``replica`` has failed: avoid it until it reports again."""
        report = self.cluster.workers.get(replica)
        if report is not None:
            self._suspects[replica] = report.sequence
            for model_id in self._observations.pop(replica, {}):
                self._forget_observation(replica, model_id)
            self._update_usable()

    def cut_off(self, location: str) -> tuple[str, ...]:
        """A location does not answer from here: avoid it; returns its replicas."""
        self._unreachable |= {location}
        self._update_usable()
        return tuple(replica for replica, report in self.cluster.workers.items() if report.location == location)

    def reconnect(self, location: str) -> None:
        """A location answers from here."""
        if location in self._unreachable:
            self._unreachable -= {location}
            self._update_usable()

    # Models

    def state(self, report: WorkerReport, model_id: str) -> ModelState | None:
        """The state of a model at a worker, as far as known."""
        observations = self._observations.get(report.replica)
        if observations is not None and (observation := observations.get(model_id)) is not None:
            return observation.state
        resident = report.models.get(model_id)
        return resident.state if resident else None

    def possible_holders(self, model_id: str) -> Collection[str]:
        """The replicas of which ``state`` may know the model; not all of them may be sent to."""
        holders, observed = self.cluster.holders(model_id), self._observed.get(model_id)
        return holders | observed.keys() if observed else holders

    def observed(self, model_id: str) -> Mapping[str, Observation]:
        """The observations of a model, by replica: each counts for more than the last report of its replica."""
        return self._observed.get(model_id, _NO_OBSERVATIONS)

    def loading(self, report: WorkerReport) -> int:
        """How many models load at a worker or wait for their turn, those that this router has caused included."""
        observations = self._observations.get(report.replica)
        if not observations:
            return report.loading
        loading = report.loading
        for model_id, observation in observations.items():
            if observation.state is ModelState.LOADING and model_id not in report.models:
                loading += 1
        return loading

    def observe(self, replica: str, model_id: str, state: ModelState | None, sequence: int) -> None:
        """A model was in ``state`` at ``replica`` after its report number ``sequence - 1``."""
        report = self.cluster.workers.get(replica)
        if report is not None and sequence <= report.sequence:
            return
        observation = Observation(state, sequence)
        self._observations.setdefault(replica, {})[model_id] = observation
        self._observed.setdefault(model_id, {})[replica] = observation

    def expect_load(self, replica: str, model_id: str) -> None:
        """A request that will load a model is on its way to ``replica``: later ones can join it."""
        report = self.cluster.workers.get(replica)
        if report is not None:
            # The next report may have been taken before the request gets there.
            self.observe(replica, model_id, ModelState.LOADING, report.sequence + 2)

    # Queues

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

    # Memory

    def precompute(self, here: str, rules: RoutingRules, links: Topology) -> None:
        """Compute what the next choice of a location needs: its neighbors, and what its own models are worth.

        A choice works without it, but is faster with it, and goes by the links as they were measured until now.
        """
        self._rebuild_neighbors(here, links)
        for report in self.workers_at(here):
            self._unevictable(report)
            self._costs(report, rules, links)

    def displacement_cost_s(
        self, model: ModelProfile, report: WorkerReport, rules: RoutingRules, links: Topology
    ) -> float:
        """Seconds that later requests at ``report.location`` lose because ``model`` displaces others there.

        Args:
            model: what would be loaded.
            report: of the worker that would load it.
            rules: for the choice.
            links: from the location of the worker.
        """
        missing_bytes = report.used_bytes + report.unaccounted_bytes + model.size_bytes - report.model_capacity_bytes
        if missing_bytes <= 0:
            return 0.0
        unevictable_bytes = self._unevictable(report)
        if unevictable_bytes and (resident := report.models.get(model.model_id)) is not None and resident.unevictable:
            unevictable_bytes -= resident.size_bytes
        if model.size_bytes > report.model_capacity_bytes - unevictable_bytes:
            return math.inf
        if not self.cluster.rates.get(report.location):
            return 0.0
        return self._costs(report, rules, links).per_s(missing_bytes) * rules.horizon_s

    def _unevictable(self, report: WorkerReport) -> int:
        """Bytes that no request can displace at a worker."""
        known = self._unevictable_bytes.get(report.replica)
        if known is not None and known[0] is report:
            return known[1]
        unevictable_bytes = sum([model.size_bytes for model in report.models.values() if model.unevictable])
        self._unevictable_bytes[report.replica] = report, unevictable_bytes
        return unevictable_bytes

    def _costs(self, report: WorkerReport, rules: RoutingRules, links: Topology) -> DisplacementCosts:
        entry = self._displacement_costs.get(report.replica)
        if entry is not None and entry.is_of(report, rules, links):
            return entry.costs
        cluster, neighbors = self.cluster, self.neighbors(report.location, links)
        costs = DisplacementCosts(
            report,
            cluster.rates.get(report.location) or {},
            rules.profiles,
            lambda model_id: neighbors.rtt_s(cluster.holders(model_id)),
        )
        self._displacement_costs[report.replica] = _CostEntry(report, rules, links, costs)
        return costs

    def _rebuild_neighbors(self, here: str, links: Topology) -> NeighborIndex:
        neighbors = self._neighbors[here] = NeighborIndex(here, links, self._usable)
        return neighbors

    def _update_usable(self) -> None:
        self._displacement_costs.clear()
        self._neighbors.clear()
        for replica in self._unevictable_bytes.keys() - self.cluster.workers.keys():
            del self._unevictable_bytes[replica]
        suspects, unreachable = self._suspects, self._unreachable
        usable = tuple(self.cluster.workers.values())
        if suspects or unreachable:
            usable = tuple(
                report for report in usable if report.replica not in suspects and report.location not in unreachable
            )
        self._usable = tuple(report for report in usable if not report.leaving) or usable
        self._usable_at = {}
        for report in self._usable:
            self._usable_at.setdefault(report.location, []).append(report)

    def _forget_observation(self, replica: str, model_id: str) -> None:
        observed = self._observed[model_id]
        del observed[replica]
        if not observed:
            del self._observed[model_id]
