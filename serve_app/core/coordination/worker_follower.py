"""One worker's side of the coordination: what it reports, and what it does about the coordinator's deltas."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from serve_app.core.cache.model_cache import ModelCache
from serve_app.core.cluster.cluster_view import ClusterView
from serve_app.core.cluster.commands import Command
from serve_app.core.cluster.primaries import PrimaryTracker
from serve_app.core.cluster.reports import Demand, OutcomeCounts, ViewDelta, WorkerReport
from serve_app.core.routing.displacement_cost import forward_costs
from serve_app.core.routing.rules import RoutingRules
from serve_app.core.vocabulary import ResidentModel

_NONE_MEASURED: Mapping[str, float] = {}
_NO_OUTCOMES: Mapping[str, OutcomeCounts] = {}


@dataclass(frozen=True, slots=True, kw_only=True)
class Instructions:
    """What a worker has to do after a delta.

    Attributes:
        forward_costs: extra seconds of a forward to the next holder, for every model whose copy here is a duplicate;
            None: unchanged since the last instructions.
        protect: models whose copy here is required by ``min_copies``, the largest ``min_copies`` first.
        commands: of placement.
        primaries_changed: whether the worker is primary for other models than before, which goes into the next report.
    """

    forward_costs: Mapping[str, float] | None
    protect: tuple[str, ...]
    commands: tuple[Command, ...]
    primaries_changed: bool


class WorkerFollower:
    """Builds one worker's reports and turns deltas into instructions; the live and the simulated worker share it.

    Args:
        replica: the worker's replica id.
        location: where it is.
        rules: for the cost of a forward; measured links of deltas replace configured ones.
        min_copies: models of which there must be several copies.

    Attributes:
        view: the worker's copy of the cluster; a router of the same location may share it.
        demand: requests since the last report, by location and model.
        next_sequence: number of the next report.
        is_leaving: a leaving worker says so in its reports and carries out no commands.
    """

    def __init__(
        self, *, replica: str, location: str, rules: RoutingRules, min_copies: Mapping[str, int] | None = None
    ) -> None:
        self.replica, self.location = replica, location
        self.view = ClusterView()
        self.demand: Counter[tuple[str, str]] = Counter()
        self.next_sequence = 1
        self.is_leaving = False
        self._rules = rules
        self._primaries = PrimaryTracker(replica, location, min_copies)
        #: What the last forward costs were computed from.
        self._costed: tuple[ClusterView, int, RoutingRules, frozenset[str]] | None = None

    def reconfigure(self, rules: RoutingRules, min_copies: Mapping[str, int]) -> None:
        """Follow other rules from now on; links that were measured still count."""
        self._rules = rules.with_links(self.view.links)
        self._primaries = PrimaryTracker(self.replica, self.location, min_copies)

    # Reports

    def take_demand(self) -> tuple[Demand, ...]:
        """The demand since the last call; the caller delivers it."""
        demand = tuple(
            Demand(location=location, model_id=model_id, count=count)
            for (location, model_id), count in self.demand.items()
        )
        self.demand.clear()
        return demand

    def return_demand(self, demand: Iterable[Demand]) -> None:
        """Count demand again that could not be delivered."""
        for item in demand:
            self.demand[item.location, item.model_id] += item.count

    def report(
        self,
        *,
        cache: ModelCache,
        models: Mapping[str, ResidentModel],
        loading: int,
        exec_slots: int,
        queue_s: float,
        inflight: int,
    ) -> WorkerReport:
        """Build the next report, without demand and without what only a live worker measures.

        Args:
            cache: the worker's.
            models: what it holds.
            loading: models that load or wait for their turn to.
            exec_slots: executions at the same time.
            queue_s: seconds until a request that arrives now begins to execute.
            inflight: requests under way.
        """
        sequence, self.next_sequence = self.next_sequence, self.next_sequence + 1
        counters = cache.counters
        return WorkerReport(
            location=self.location,
            replica=self.replica,
            sequence=sequence,
            capacity_bytes=cache.capacity_bytes,
            used_bytes=cache.used_bytes,
            workspace_bytes=cache.workspace_bytes,
            unaccounted_bytes=cache.unaccounted_bytes,
            rss_bytes=0,
            models=models,
            exec_slots=exec_slots,
            loading=loading,
            load_slots=cache.max_loads,
            queue_s=queue_s,
            inflight=inflight,
            exec_s=_NONE_MEASURED,
            load_s=_NONE_MEASURED,
            loads=counters.loads,
            load_failures=counters.load_failures,
            evictions=counters.evictions,
            preloads=counters.preloads,
            wasted_preloads=counters.wasted_preloads,
            outcomes=_NO_OUTCOMES,
            primary_for=self._primaries.report(models),
            leaving=self.is_leaving,
        )

    # Deltas

    def apply(self, delta: ViewDelta, held: Mapping[str, ResidentModel], now: float) -> Instructions:
        """Take in what the coordinator answers to a report.

        Args:
            delta: the answer.
            held: the models at this worker now.
            now: seconds.
        """
        self.view.apply(delta, now)
        if delta.links:
            self._rules = self._rules.with_links(delta.links)
        return self.review(held, () if self.is_leaving else delta.commands)

    def review(self, held: Mapping[str, ResidentModel], commands: tuple[Command, ...] = ()) -> Instructions:
        """Work out instructions from the view as it is now.

        Forward costs take time for every copy in the view, so they are computed only if one of their inputs has
        changed: holders, links, or the models that count as last copies.
        """
        primaries = self._primaries
        before = primaries.primary_for
        last_copies = primaries.update(held, self.view.workers.values())
        inputs = self.view, self.view.version_elsewhere(self.location), self._rules, last_copies
        costs: dict[str, float] | None = None
        if inputs != self._costed:
            self._costed = inputs
            costs = forward_costs(self.location, self.view, self._rules)
            for model_id in last_copies & costs.keys():
                del costs[model_id]
        return Instructions(
            forward_costs=costs,
            protect=tuple(primaries.required(last_copies)),
            commands=commands,
            primaries_changed=primaries.primary_for != before,
        )
