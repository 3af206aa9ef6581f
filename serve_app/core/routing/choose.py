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
from serve_app.core.routing.eviction_cost import exec_s, load_s, victims_loss_s
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

    # A tuple, because every request makes one: that takes half as long as a frozen dataclass.
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

    ``avoid`` names the replicas that have failed this very request already.
    """

    model: ModelProfile
    here: str
    payload_bytes: int = 0
    forwarding: Forwarding = Forwarding.AUTO
    avoid: Collection[str] = ()


def choose(errand: RoutingRequest, known: RouterView, rules: RoutingRules, ways: Topology | None = None) -> Route:
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
        errand: the request.
        known: the cluster.
        rules: for the choice.
        ways: what is known of the ways; as configured by default.
    """
    return _Choice(errand, known, rules, ways or rules).best()


class _Option:
    """A plan in the making."""

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

    def plan(self, preload: str | None = None) -> Route:
        """As it is carried out."""
        report, wait_s, expected_s, cost_s = self.report, self.wait_s, self.expected_s, self.cost_s
        return Route(
            self.outcome, report.location, report.replica, wait_s, expected_s, cost_s, self.only_if_resident, preload
        )


class _Choice:
    """One choice, with what every option of it needs.

    Every request of every user comes by here: what several options share is looked up once, and of those that cannot
    be the best no more is worked out than shows it.
    """

    #: Of the workers of other locations so many are considered: the nearest holders; and of those that would have to
    #: load the model, where there are more than ``MANY``, others for each model.
    LOOKED_AT = 4
    MANY = 8

    __slots__ = (
        "_errand", "_known", "_local", "_model", "_nearby", "_others_s", "_queue_s", "_rate", "_rules", "_run_s",
        "_seen", "_way_s", "_ways",
    )  # fmt: skip

    def __init__(self, errand: RoutingRequest, known: RouterView, rules: RoutingRules, ways: Topology) -> None:
        self._errand = errand
        self._model = errand.model
        self._known = known
        self._rules = rules
        self._ways = ways
        self._nearby = known.nearby(errand.here, ways)
        #: What is newer than the reports about this model.
        self._seen = known.seen(errand.model.model_id)
        #: The best that this location offers, and of what its latency is made up: the way, the queue, the execution.
        #: ``_others_s`` is what others cause.
        self._way_s = self._queue_s = self._run_s = self._others_s = 0.0
        self._local = self._best_here()

    def best(self) -> Route:
        local, errand = self._local, self._errand
        if local is None:
            there = self._best_elsewhere()
            return _plan_blindly(errand) if there is None else there.plan()
        if errand.forwarding is Forwarding.NEVER or (
            local.outcome is Outcome.HIT and local.wait_s - self._way_s <= self._rules.staleness_s
        ):
            return local.plan()
        there = self._best_elsewhere()
        if there is None:
            return local.plan()
        prefer = errand.forwarding is Forwarding.PREFER and local.outcome is Outcome.LOAD
        if prefer or there.cost_s < local.cost_s:
            return there.plan()
        return self._in_background(local, there) if local.outcome is Outcome.LOAD else local.plan()

    def _best_here(self) -> _Option | None:
        errand, known, model = self._errand, self._known, self._model
        here = self._nearby.own
        if errand.avoid:
            here = [report for report in here if report.replica not in errand.avoid]
        if not here:
            return None
        way_s = self._way_s = self._nearby.own_link.seconds(errand.payload_bytes)
        run_s = self._run_s = max([exec_s(model, report) for report in here])
        best: _Option | None = None
        for report in here:
            state = self._state(report)
            queue_s, load_wait_s, loss_s, turns_s = known.queue_s(report), 0.0, 0.0, 0.0
            if state is ModelState.LOADING:
                load_wait_s = self._rest_of_load_s(report)
            elif state is None:
                alone_s = load_s(model, report)
                load_wait_s = alone_s * self._turns(report)
                turns_s = load_wait_s - alone_s
                loss_s = victims_loss_s(model, report, known, self._rules, self._ways)
            wait_s = way_s + queue_s + load_wait_s
            expected_s = wait_s + run_s
            if best is None or expected_s + loss_s < best.cost_s:
                best = _Option(_OUTCOMES_HERE[state], report, wait_s, expected_s, expected_s + loss_s)
                self._queue_s, self._others_s = queue_s, queue_s + turns_s
        return best

    def _best_elsewhere(self) -> _Option | None:
        """The best that other locations offer: those that hold the model, then those that would have to load it.

        Of these, all are as good whose difference may be older than the news: if every router took the one that looked
        best, all would take the same. Instead each model has an order of its own.
        """
        errand, known, model_id = self._errand, self._known, self._model.model_id
        if errand.forwarding is Forwarding.NEVER:
            return None
        self._rate = known.view.rate(errand.here, model_id)
        holder: _Option | None = None
        replicas = known.maybe_holding(model_id)
        if replicas:
            there = self._nearby.nearest(replicas, self.LOOKED_AT)
            found = self._there(there, math.inf, held=True)
            # Each is better than those before it.
            holder = found[-1] if found else None
        if not self._may_load_elsewhere():
            return holder
        there = self._others()
        found = self._there(there, math.inf if holder is None else holder.cost_s, held=False)
        best_s = min([option.cost_s for option in found], default=math.inf)
        if not found or (holder is not None and holder.cost_s <= best_s):
            return holder
        if len(found) == 1:
            return found[0]
        alike = [option for option in found if option.cost_s <= best_s + self._rules.staleness_s]
        return min(alike, key=lambda option: rendezvous_rank(model_id, option.report.replica))

    def _may_load_elsewhere(self) -> bool:
        """Whether it is an option to have the model loaded elsewhere: only to be rid of a long queue here."""
        local = self._local
        if local is None or local.cost_s == math.inf:
            return True
        return self._others_s > self._rules.staleness_s and self._errand.forwarding is Forwarding.AUTO

    def _others(self) -> Sequence[Neighbor]:
        """Workers of other locations where the model could be loaded; all of them if it cannot be loaded here."""
        others, count = self._nearby.others, self.LOOKED_AT
        if len(others) <= self.MANY or self._local is None or self._local.cost_s == math.inf:
            return others
        first = crc32(f"{self._model.model_id} {self._errand.here}".encode()) % len(others)
        chosen = others[first : first + count]
        return chosen if len(chosen) == count else chosen + others[: count - len(chosen)]

    def _there(self, neighbours: Sequence[Neighbor], most_s: float, *, held: bool) -> list[_Option]:
        """What those of these workers offer that hold the model, or those that do not, as far as it may be the best.

        What costs more than ``most_s`` is of no use. What is known from afar is better than what is here only if it is
        so by a clear margin: otherwise all routers would send everything to whichever location looked best half a
        second ago.
        """
        known, model, rules, seen, avoid = self._known, self._model, self._rules, self._seen, self._errand.avoid
        model_id, payload_bytes, way_here_s = model.model_id, self._errand.payload_bytes, self._way_s
        queue_here_s, run_here_s, shorter_s, faster_s = 0.0, model.exec_s, math.inf, math.inf
        if self._local is not None:
            queue_here_s, run_here_s = self._queue_s, self._run_s
            shorter_s = queue_here_s - rules.staleness_s
            # Execution times are noisy: only twice as fast is faster, and only if it was measured.
            faster_s = run_here_s / 2
        later = 0.0
        if self._local is None or self._local.outcome is Outcome.LOAD:
            later = rules.horizon_s * self._rate
        margin_s = 0.0 if held else rules.staleness_s
        # Of some that were taken at random, the first that is as good as any may be is good enough.
        any_s = -math.inf if held or neighbours is self._nearby.others else margin_s
        options: list[_Option] = []
        for report, link in neighbours:
            way_s = link.rtt_s + payload_bytes / link.bytes_per_s
            run_s = report.exec_s.get(model_id, run_here_s)
            if faster_s <= run_s < run_here_s:
                run_s = run_here_s
            later_s = later * (way_s - way_here_s) if way_s > way_here_s else 0.0
            alone_s = 0.0 if held else report.load_s.get(model_id, model.load_s)
            # Most need not be looked at any further: those that are no nearer than an idle one.
            least_s = way_s + alone_s + run_s + later_s
            if least_s > most_s or (held and least_s == most_s) or report.replica in avoid:
                continue
            if seen:
                state = self._state(report)
            else:
                resident = report.models.get(model_id)
                state = None if resident is None else resident.state
            if (state is not None) is not held:
                continue
            queue_s, load_wait_s, loss_s = known.queue_s(report), 0.0, 0.0
            if shorter_s <= queue_s < queue_here_s:
                queue_s = queue_here_s
            if state is ModelState.LOADING:
                load_wait_s = self._rest_of_load_s(report)
            elif state is None:
                load_wait_s = alone_s * self._turns(report)
                loss_s = victims_loss_s(model, report, known, rules, rules)
            wait_s = way_s + queue_s + load_wait_s
            expected_s = wait_s + run_s
            cost_s = expected_s + loss_s + later_s
            if cost_s < most_s or (cost_s == most_s and not held):
                most_s = min(most_s, cost_s + margin_s)
                options.append(_Option(Outcome.FORWARD, report, wait_s, expected_s, cost_s, held))
                if cost_s - alone_s - run_s <= any_s:
                    break
        return options

    def _in_background(self, local: _Option, there: _Option) -> Route:
        """``local``, a load worth its time; in the background if this request is answered sooner by a holder."""
        # Requests that come before the load has ended are forwarded as well.
        meanwhile_s = self._rate * load_s(self._model, local.report) * (there.expected_s - self._run_s)
        if not there.only_if_resident or there.expected_s + meanwhile_s >= local.expected_s:
            return local.plan()
        there.cost_s = local.cost_s - local.expected_s + there.expected_s
        return there.plan(preload=local.report.replica)

    def _state(self, report: WorkerReport) -> ModelState | None:
        """As ``RouterView.state`` says, but what is newer than reports has been looked up already."""
        sighting = self._seen.get(report.replica)
        if sighting is not None:
            return sighting.state
        resident = report.models.get(self._model.model_id)
        return None if resident is None else resident.state

    def _rest_of_load_s(self, report: WorkerReport) -> float:
        # A load seen under way is half done, on average.
        return load_s(self._model, report) / 2

    def _turns(self, report: WorkerReport) -> int:
        """How many loads, one after the other, it takes until a model that would be loaded there now has come."""
        return 1 + self._known.loading(report) // report.load_slots


def _plan_blindly(errand: RoutingRequest) -> Route:
    wait_s = errand.model.load_s
    return Route(
        outcome=Outcome.LOAD,
        location=errand.here,
        replica=None,
        wait_s=wait_s,
        expected_s=wait_s + errand.model.exec_s,
        cost_s=math.inf,
    )
