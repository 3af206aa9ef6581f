"""The life of one request: which worker it is sent to, what each reply changes, and when it fails."""

from __future__ import annotations

import enum
import math
from typing import NamedTuple

from serve_app.core.links import Topology
from serve_app.core.routing.choose import Route, RoutingRequest, choose
from serve_app.core.routing.router_view import RouterView
from serve_app.core.routing.rules import RoutingRules
from serve_app.core.vocabulary import ModelState, Outcome
from serve_app.errors import EdgeServeError, StoreError, Unavailable


class Finished(NamedTuple):
    """``replica`` has executed the request; ``sequence`` numbers the next report of ``replica``."""

    replica: str
    sequence: int
    evicted: tuple[str, ...] = ()


class Absent(NamedTuple):
    """The model is not resident at ``replica``, and the request was sent only in case it is."""

    replica: str
    sequence: int


class Rejected(NamedTuple):
    """The worker is alive, and does not serve the request."""

    error: EdgeServeError


class Lost(NamedTuple):
    """The worker died, or could not be reached."""


#: What came of one attempt.
AttemptResult = Finished | Absent | Rejected | Lost


class Send(NamedTuple):
    """Send the request along ``route``; have ``route.preload`` load the model meanwhile."""

    route: Route
    only_if_resident: bool


class FailReason(enum.Enum):
    """Why a request has failed."""

    #: Rejected with an error that no other worker mends, or by every worker that could serve it.
    REJECTED = "rejected"
    DEADLINE = "deadline"
    #: Every worker that the request was sent to is lost.
    UNREACHABLE = "unreachable"


class Fail(NamedTuple):
    """Give the request up. ``error`` is the last rejection; None unless ``reason`` is ``REJECTED``."""

    reason: FailReason
    error: EdgeServeError | None = None


class Dispatch:
    """The state machine of one request, the same for the live and the simulated router.

    The router alternates between ``next``, which says where to send the request, and ``replied``, which takes in what
    came back, until the request is FINISHED or ``next`` says ``Fail``.

    | state  | event                            | next     | calls on the view                                    |
    |--------|----------------------------------|----------|------------------------------------------------------|
    | OPEN   | ``next`` -> ``Send``             | SENT     | ``sent``; ``expect_load`` where a load will begin    |
    | OPEN   | ``next`` -> ``Fail``: no attempt | FAILED   | nothing                                              |
    |        | left, deadline over, or rejected |          |                                                      |
    |        | and no other worker known        |          |                                                      |
    | SENT   | ``Finished``                     | FINISHED | ``returned``; ``observe``: the model is ready there, |
    |        |                                  |          | its victims are absent                               |
    | SENT   | ``Absent``: costs a hint         | OPEN     | ``returned``; ``observe``: the model is absent there |
    | SENT   | ``Rejected`` by a worker whose   | OPEN     | ``returned``                                         |
    |        | wait queue is full, or whose     |          |                                                      |
    |        | load failed: avoid that worker   |          |                                                      |
    | SENT   | ``Rejected`` otherwise           | FAILED   | ``returned``                                         |
    | SENT   | ``Lost``: avoid that worker      | OPEN     | ``returned``, ``suspect``                            |
    | SENT   | ``close``: the user has left     | OPEN     | ``returned``                                         |
    | FAILED | ``next`` -> ``Fail``             | FAILED   | nothing                                              |

    A route without a replica goes to any worker of the location: the view does not know that worker before it has
    replied, its rejection is final, and its loss makes the request avoid nothing.

    Args:
        request: what is asked.
        view: what the router knows of the cluster.
        rules: of the routing choice.
        links: between locations, as measured; as configured by default.
        deadline_s: when the answer is useless, in seconds of the clock that gives ``now``.
    """

    #: How often one request is sent at most.
    MAX_ATTEMPTS = 5
    #: How often it is sent to a worker only in case the model is still there.
    MAX_HINTS = 1

    __slots__ = (
        "_attempts_left", "_deadline_s", "_hints_left", "_links", "_rejection", "_request", "_rules", "_sent_to",
        "_view",
    )  # fmt: skip

    def __init__(
        self,
        request: RoutingRequest,
        view: RouterView,
        rules: RoutingRules,
        links: Topology | None = None,
        deadline_s: float = math.inf,
    ) -> None:
        self._request = request
        self._view = view
        self._rules = rules
        self._links = links
        self._deadline_s = deadline_s
        self._attempts_left = self.MAX_ATTEMPTS
        self._hints_left = self.MAX_HINTS
        self._rejection: EdgeServeError | None = None
        #: The replica of a request under way; None in all other states, and on a route without one.
        self._sent_to: str | None = None

    def next(self, now: float) -> Send | Fail:
        """Where the request goes now, or why it has failed."""
        if not self._attempts_left or now >= self._deadline_s:
            return self._fail(now)
        self._attempts_left -= 1
        route = choose(self._request, self._view, self._rules, self._links)
        replica = route.replica
        if replica is not None:
            view, model = self._view, self._request.model
            if route.preload is not None:
                view.expect_load(route.preload, model.model_id)
            self._sent_to = replica
            view.sent(replica, self._request.exec_s)
            outcome = route.outcome
            if outcome is Outcome.LOAD or (outcome is Outcome.FORWARD and not route.only_if_resident):
                view.expect_load(replica, model.model_id)
        elif self._rejection is not None:
            return self._fail(now)
        return Send(route, route.only_if_resident and self._hints_left > 0)

    def replied(self, result: AttemptResult) -> None:
        """Take in what came of the last ``Send``."""
        view, replica, model_id = self._view, self._sent_to, self._request.model.model_id
        self.close()
        match result:
            case Finished():
                view.observe(result.replica, model_id, ModelState.READY, result.sequence)
                for victim in result.evicted:
                    view.observe(result.replica, victim, None, result.sequence)
            case Absent():
                view.observe(result.replica, model_id, None, result.sequence)
                self._hints_left -= 1
            case Rejected(error=error):
                self._rejection = error
                # That worker is overloaded, or its store is broken: another one may do better.
                if replica is None or not isinstance(error, (Unavailable, StoreError)):
                    self._attempts_left = 0
                else:
                    self._avoid_replica(replica)
            case Lost():
                if replica is not None:
                    view.suspect(replica)
                    self._avoid_replica(replica)

    def close(self) -> None:
        """Stop counting the request as under way; nothing happens where it is not."""
        if self._sent_to is not None:
            self._view.returned(self._sent_to, self._request.exec_s)
            self._sent_to = None

    def _avoid_replica(self, replica: str) -> None:
        self._request = self._request._replace(avoid={*self._request.avoid, replica})

    def _fail(self, now: float) -> Fail:
        if self._rejection is not None:
            return Fail(FailReason.REJECTED, self._rejection)
        return Fail(FailReason.DEADLINE if now >= self._deadline_s else FailReason.UNREACHABLE)
