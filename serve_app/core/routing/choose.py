"""Where a request runs: the option with the least expected latency, later requests included."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from typing import NamedTuple
from zlib import crc32

from serve_app.core.catalog import ModelProfile
from serve_app.core.cluster.primaries import rendezvous_rank
from serve_app.core.cluster.reports import WorkerReport
from serve_app.core.links import Topology
from serve_app.core.routing.displacement_cost import exec_s, load_s
from serve_app.core.routing.neighbors import Neighbor
from serve_app.core.routing.router_view import RouterView
from serve_app.core.routing.rules import RoutingRules
from serve_app.core.vocabulary import Forwarding, ModelState, Outcome

#: What a request becomes at its own location, by the state of its model there.
_OUTCOMES_HERE = {ModelState.READY: Outcome.HIT, ModelState.LOADING: Outcome.JOIN, None: Outcome.LOAD}


class Route(NamedTuple):
    """One option: run on ``replica`` of ``location``, begin after ``wait_s`` and be done after ``expected_s`` seconds.

    ``cost_s`` ranks the options: the expected latency and what the choice costs later requests. ``only_if_resident``
    is set where the option is worth taking only if the model is still there. ``preload`` names the replica here that
    should load the model in the background meanwhile.
    """

    # A tuple, because every request makes one: a tuple takes half as long as a frozen dataclass.
    outcome: Outcome
    location: str
    replica: str | None
    wait_s: float
    expected_s: float
    cost_s: float
    only_if_resident: bool = False
    preload: str | None = None


class RoutingRequest(NamedTuple):
    """What is to be placed: a request for ``model`` by a user of ``here``.

    ``avoid`` names the replicas that have failed this very request already. ``times_longer`` says how many times longer
    it executes than one of the least sizes, for which times are measured and kept.
    """

    model: ModelProfile
    here: str
    payload_bytes: int = 0
    forwarding: Forwarding = Forwarding.AUTO
    avoid: Collection[str] = ()
    times_longer: float = 1.0

    @property
    def exec_s(self) -> float:
        """Seconds of its execution, by the profile of the model."""
        return self.model.exec_s * self.times_longer


def choose(request: RoutingRequest, view: RouterView, rules: RoutingRules, links: Topology | None = None) -> Route:
    """The best way to serve one request.

    | option                 | expected latency                | costs later requests                     |
    |------------------------|---------------------------------|------------------------------------------|
    | hit                    | queue + exec                    | nothing                                  |
    | join                   | rest of the load + queue + exec | nothing                                  |
    | load                   | load + queue + exec             | the absence of victims                   |
    | forward                | link + queue there + exec       | being forwarded as well                  |
    | forward now, load here | link + queue there + exec       | the absence of victims, and being        |
    | in the background      |                                 | forwarded until the model has come       |

    What later requests pay is counted over ``rules.horizon_s`` at today's rates; where the model can never fit, that
    is without end. Where a load is worth its time, it is done in the background if a holder answers sooner.

    Only holders are forwarded to, as long as a worker here can take the model without a queue that is clearly longer:
    a second copy elsewhere would displace others there. Where no live worker is known, the request goes to its own
    location: Serve may have a replica that has not reported yet, or will have one soon.

    Args:
        request: the request.
        view: the cluster as the router knows it.
        rules: for the choice.
        links: between locations, as measured; as configured by default.
    """
    return _Choice(request, view, rules, links or rules).best()


class _Option:
    """A route in the making."""

    __slots__ = ("cost_s", "expected_s", "only_if_resident", "outcome", "report", "wait_s")

    def __init__(
        self,
        outcome: Outcome,
        report: WorkerReport,
        wait_s: float,
        expected_s: float,
        cost_s: float,
        only_if_resident: bool = False,
    ) -> None:
        self.outcome = outcome
        self.report = report
        self.wait_s = wait_s
        self.expected_s = expected_s
        self.cost_s = cost_s
        self.only_if_resident = only_if_resident

    def route(self, preload: str | None = None) -> Route:
        """The route that carries the option out."""
        report, wait_s, expected_s, cost_s = self.report, self.wait_s, self.expected_s, self.cost_s
        return Route(
            self.outcome, report.location, report.replica, wait_s, expected_s, cost_s, self.only_if_resident, preload
        )


class _Choice:
    """One choice, with what every option of it needs.

    Every request passes here: what several options share is looked up once, and of an option that cannot be the best
    no more is computed than shows it.
    """

    #: How many workers of other locations are compared.
    CONSIDERED = 4
    #: With more workers elsewhere, only a sample of ``CONSIDERED``, chosen per model and location, is compared for
    #: loading.
    MANY = 8

    __slots__ = (
        "_exec_s", "_external_wait_s", "_link_s", "_links", "_local", "_model", "_neighbors", "_observed", "_queue_s",
        "_rate", "_request", "_rules", "_view",
    )  # fmt: skip

    def __init__(self, request: RoutingRequest, view: RouterView, rules: RoutingRules, links: Topology) -> None:
        self._request = request
        self._model = request.model
        self._view = view
        self._rules = rules
        self._links = links
        self._neighbors = view.neighbors(request.here, links)
        self._observed = view.observed(request.model.model_id)
        #: The latency of the best local option, in parts: the link, the queue, the execution. ``_external_wait_s`` is
        #: the part that other requests cause: the queue, and loads that come first.
        self._link_s = self._queue_s = self._exec_s = self._external_wait_s = 0.0
        self._local = self._best_local()

    def best(self) -> Route:
        """The route with the least cost."""
        local, request = self._local, self._request
        if local is None:
            remote = self._best_remote()
            return _route_without_view(request) if remote is None else remote.route()
        if request.forwarding is Forwarding.NEVER or (
            local.outcome is Outcome.HIT and local.wait_s - self._link_s <= self._rules.staleness_s
        ):
            return local.route()
        remote = self._best_remote()
        if remote is None:
            return local.route()
        prefers_remote = request.forwarding is Forwarding.PREFER and local.outcome is Outcome.LOAD
        if prefers_remote or remote.cost_s < local.cost_s:
            return remote.route()
        return self._load_in_background(local, remote) if local.outcome is Outcome.LOAD else local.route()

    # This location

    def _best_local(self) -> _Option | None:
        request, view, model = self._request, self._view, self._model
        reports = self._neighbors.own
        if request.avoid:
            reports = [report for report in reports if report.replica not in request.avoid]
        if not reports:
            return None
        link_s = self._link_s = self._neighbors.own_link.seconds(request.payload_bytes)
        run_s = self._exec_s = max([exec_s(model, report) for report in reports]) * request.times_longer
        best: _Option | None = None
        for report in reports:
            state = self._state(report)
            queue_s, load_wait_s, displacement_s, earlier_loads_s = view.queue_s(report), 0.0, 0.0, 0.0
            if state is ModelState.LOADING:
                load_wait_s = self._rest_of_load_s(report)
            elif state is None:
                unqueued_load_s = load_s(model, report)
                load_wait_s = unqueued_load_s * self._load_waves(report)
                earlier_loads_s = load_wait_s - unqueued_load_s
                displacement_s = view.displacement_cost_s(model, report, self._rules, self._links)
            wait_s = link_s + queue_s + load_wait_s
            expected_s = wait_s + run_s
            if best is None or expected_s + displacement_s < best.cost_s:
                best = _Option(_OUTCOMES_HERE[state], report, wait_s, expected_s, expected_s + displacement_s)
                self._queue_s, self._external_wait_s = queue_s, queue_s + earlier_loads_s
        return best

    # Other locations

    def _best_remote(self) -> _Option | None:
        """The best that other locations offer: those that hold the model, then those that would have to load it.

        Of the latter, all are equally good whose difference may be older than the view: if every router took the one
        that looked best, all would take the same. Instead each model has an order of its own.
        """
        request, view, model_id = self._request, self._view, self._model.model_id
        if request.forwarding is Forwarding.NEVER:
            return None
        self._rate = view.cluster.rate(request.here, model_id)
        holder: _Option | None = None
        replicas = view.possible_holders(model_id)
        if replicas:
            nearest = self._neighbors.nearest(replicas, self.CONSIDERED)
            options = self._score_remote(nearest, math.inf, held=True)
            # Each is better than those before it.
            holder = options[-1] if options else None
        if not self._may_load_elsewhere():
            return holder
        neighbors, is_sample = self._loaders()
        most_s = math.inf if holder is None else holder.cost_s
        options = self._score_remote(neighbors, most_s, held=False, is_sample=is_sample)
        best_s = min([option.cost_s for option in options], default=math.inf)
        if not options or (holder is not None and holder.cost_s <= best_s):
            return holder
        if len(options) == 1:
            return options[0]
        equals = [option for option in options if option.cost_s <= best_s + self._rules.staleness_s]
        return min(equals, key=lambda option: rendezvous_rank(model_id, option.report.replica))

    def _may_load_elsewhere(self) -> bool:
        """Whether another location may load the model: only if none here can, or to avoid a long queue here."""
        local = self._local
        if local is None or local.cost_s == math.inf:
            return True
        return self._external_wait_s > self._rules.staleness_s and self._request.forwarding is Forwarding.AUTO

    def _loaders(self) -> tuple[Sequence[Neighbor], bool]:
        """Workers of other locations where the model could be loaded, and whether they are only a sample of these."""
        others, count = self._neighbors.others, self.CONSIDERED
        if len(others) <= self.MANY or self._local is None or self._local.cost_s == math.inf:
            return others, False
        first = crc32(f"{self._model.model_id} {self._request.here}".encode()) % len(others)
        chosen = others[first : first + count]
        return (chosen if len(chosen) == count else chosen + others[: count - len(chosen)]), True

    def _score_remote(
        self, neighbors: Sequence[Neighbor], most_s: float, *, held: bool, is_sample: bool = False
    ) -> list[_Option]:
        """What ``neighbors`` offer that hold the model, or those that do not, as far as it may be the best.

        Args:
            neighbors: workers of other locations.
            most_s: an option that costs more is of no use.
            held: consider those that hold the model, else those that do not.
            is_sample: the first option that is as good as any may be is good enough.
        """
        model, avoid, own_link_s, later_requests = (
            self._model,
            self._request.avoid,
            self._link_s,
            self._later_requests(),
        )
        model_id, payload_bytes, own_exec_s = model.model_id, self._request.payload_bytes, self._request.exec_s
        times_longer = self._request.times_longer
        much_faster_s = math.inf
        if self._local is not None:
            # Execution times are noisy: only twice as fast is faster, and only if it was measured.
            own_exec_s, much_faster_s = self._exec_s, self._exec_s / 2
        margin_s = 0.0 if held else self._rules.staleness_s
        enough_s = margin_s if is_sample else -math.inf
        options: list[_Option] = []
        for report, link in neighbors:
            link_s = link.rtt_s + payload_bytes / link.bytes_per_s
            measured_s = report.exec_s.get(model_id)
            run_s = own_exec_s if measured_s is None else measured_s * times_longer
            if much_faster_s <= run_s < own_exec_s:
                run_s = own_exec_s
            forwarding_cost_s = later_requests * (link_s - own_link_s) if link_s > own_link_s else 0.0
            unqueued_load_s = 0.0 if held else report.load_s.get(model_id, model.load_s)
            # Most need not be considered any further: those that are no nearer than an idle one.
            least_s = link_s + unqueued_load_s + run_s + forwarding_cost_s
            if least_s > most_s or (held and least_s == most_s) or report.replica in avoid:
                continue
            state = self._state(report)
            if (state is not None) is not held:
                continue
            wait_s, displacement_s = self._remote_wait_s(report, state, link_s, unqueued_load_s)
            expected_s = wait_s + run_s
            cost_s = expected_s + displacement_s + forwarding_cost_s
            if cost_s < most_s or (cost_s == most_s and not held):
                most_s = min(most_s, cost_s + margin_s)
                options.append(_Option(Outcome.FORWARD, report, wait_s, expected_s, cost_s, held))
                if cost_s - unqueued_load_s - run_s <= enough_s:
                    break
        return options

    def _remote_wait_s(
        self, report: WorkerReport, state: ModelState | None, link_s: float, unqueued_load_s: float
    ) -> tuple[float, float]:
        """Seconds on the link, in the queue and for a load; and what later requests lose by that load."""
        wait_s = link_s + self._remote_queue_s(report)
        if state is ModelState.LOADING:
            return wait_s + self._rest_of_load_s(report), 0.0
        if state is ModelState.READY:
            return wait_s, 0.0
        displacement_s = self._view.displacement_cost_s(self._model, report, self._rules, self._rules)
        return wait_s + unqueued_load_s * self._load_waves(report), displacement_s

    def _later_requests(self) -> float:
        """How many requests of this location pay for forwarding within the horizon, if this one is not served here."""
        if self._local is None or self._local.outcome is Outcome.LOAD:
            return self._rules.horizon_s * self._rate
        return 0.0

    def _remote_queue_s(self, report: WorkerReport) -> float:
        """The queue at another location; a shorter one than here counts only if it is shorter by a clear margin.

        Otherwise all routers would send everything to whichever location had the shortest queue half a second ago.
        """
        queue_s = self._view.queue_s(report)
        if self._local is not None and self._queue_s - self._rules.staleness_s <= queue_s < self._queue_s:
            return self._queue_s
        return queue_s

    def _load_in_background(self, local: _Option, remote: _Option) -> Route:
        """``local``, a load worth its time; in the background if this request is answered sooner by a holder."""
        # Requests that come before the load has ended are forwarded as well.
        meanwhile_s = self._rate * load_s(self._model, local.report) * (remote.expected_s - self._exec_s)
        if not remote.only_if_resident or remote.expected_s + meanwhile_s >= local.expected_s:
            return local.route()
        remote.cost_s = local.cost_s - local.expected_s + remote.expected_s
        return remote.route(preload=local.report.replica)

    # Any worker

    def _state(self, report: WorkerReport) -> ModelState | None:
        """As ``RouterView.state`` says, but the observations of the model have been looked up already."""
        observation = self._observed.get(report.replica)
        if observation is not None:
            return observation.state
        resident = report.models.get(self._model.model_id)
        return None if resident is None else resident.state

    def _rest_of_load_s(self, report: WorkerReport) -> float:
        # A load seen under way is half done, on average.
        return load_s(self._model, report) / 2

    def _load_waves(self, report: WorkerReport) -> int:
        """How many loads, one after the other, it takes until a model that would be loaded at a worker now is ready."""
        return 1 + self._view.loading(report) // report.load_slots


def _route_without_view(request: RoutingRequest) -> Route:
    """The route where no worker is known."""
    wait_s = request.model.load_s
    return Route(
        outcome=Outcome.LOAD,
        location=request.here,
        replica=None,
        wait_s=wait_s,
        expected_s=wait_s + request.exec_s,
        cost_s=math.inf,
    )
