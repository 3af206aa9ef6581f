"""The life of one request, row by row of the table in ``Dispatch``: where it goes, and what the view records.

The model ``m`` takes 10 bytes, 1 s to load and 0.1 s to run; users are in Paris; a forward costs 0.02 s.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
from core_support import profile, report, resident

from serve_app.core.cluster.reports import ViewDelta, WorkerReport
from serve_app.core.links import Link
from serve_app.core.routing.choose import RoutingRequest
from serve_app.core.routing.dispatch import Absent, Dispatch, Fail, FailReason, Finished, Lost, Rejected, Send
from serve_app.core.routing.router_view import RouterView
from serve_app.core.routing.rules import RoutingRules
from serve_app.core.vocabulary import ModelState
from serve_app.errors import DeadlineExceeded, DoesNotFit, StoreError, Unavailable

M = profile("m", 10, load_s=1.0, exec_s=0.1)
HOLDS = (resident("m"),)
LINK = Link(rtt_s=0.02, bytes_per_s=1000.0)
NO_ROOM = Rejected(Unavailable("too many requests wait for memory"))


class RecordedView(RouterView):
    """Records what a dispatch calls."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, ...]] = []

    def sent(self, replica: str, exec_s: float) -> None:
        self.calls.append(("sent", replica))
        super().sent(replica, exec_s)

    def returned(self, replica: str, exec_s: float) -> None:
        self.calls.append(("returned", replica))
        super().returned(replica, exec_s)

    def observe(self, replica: str, model_id: str, state: ModelState | None, sequence: int) -> None:
        self.calls.append(("observe", replica, model_id, state))
        super().observe(replica, model_id, state, sequence)

    def suspect(self, replica: str) -> None:
        self.calls.append(("suspect", replica))
        super().suspect(replica)


def view(*workers: WorkerReport, rates: Mapping[str, Mapping[str, float]] | None = None) -> RecordedView:
    known = RecordedView()
    known.apply(ViewDelta(epoch="e", version=1, full=True, workers=workers, gone=(), rates=rates or {}), 0.0)
    return known


def dispatch(known: RouterView, deadline_s: float = 5.0) -> Dispatch:
    rules = RoutingRules(profiles={"m": M}, links={}, default_link=LINK, horizon_s=10.0)
    return Dispatch(RoutingRequest(model=M, here="paris"), known, rules, deadline_s=deadline_s)


def sent(request: Dispatch, now: float = 0.0) -> Send:
    step = request.next(now)
    assert isinstance(step, Send)
    return step


def replicas(request: Dispatch, *results: Any) -> list[str | None]:
    """Where a request goes, one attempt after the other, with these results."""
    went: list[str | None] = []
    for result in results:
        went.append(sent(request).route.replica)
        request.replied(result)
    return went


def test_a_hit_is_counted_while_it_is_under_way_and_its_model_is_ready_afterwards() -> None:
    known = view(report("paris", models=HOLDS))
    request = dispatch(known)
    assert not sent(request).only_if_resident
    request.replied(Finished("paris-1", 2))
    assert known.calls == [("sent", "paris-1"), ("returned", "paris-1"), ("observe", "paris-1", "m", ModelState.READY)]


def test_a_load_is_expected_of_its_worker_and_its_victims_are_absent_afterwards() -> None:
    known = view(report("paris"))
    request = dispatch(known)
    sent(request)
    request.replied(Finished("paris-1", 2, ("v",)))
    assert [call[1:] for call in known.calls if call[0] == "observe"] == [
        ("paris-1", "m", ModelState.LOADING),
        ("paris-1", "m", ModelState.READY),
        ("paris-1", "v", None),
    ]


def test_a_background_load_is_expected_of_the_worker_here() -> None:
    workers = (report("paris", load_s={"m": 0.5}), report("tokyo", models=HOLDS))
    known = view(*workers, rates={"paris": {"m": 10.0}})
    step = sent(dispatch(known))
    assert (step.route.replica, step.route.preload) == ("tokyo-1", "paris-1")
    assert known.calls == [("observe", "paris-1", "m", ModelState.LOADING), ("sent", "tokyo-1")]


def test_only_one_attempt_asks_a_worker_that_may_not_load_the_model() -> None:
    known = view(*(report(location, models=HOLDS) for location in ("tokyo", "oslo")), report("paris"))
    request = dispatch(known)
    first = sent(request)
    assert first.only_if_resident
    request.replied(Absent(str(first.route.replica), 2))
    assert known.calls[-1] == ("observe", first.route.replica, "m", None)
    second = sent(request)
    assert second.route.only_if_resident
    assert not second.only_if_resident


@pytest.mark.parametrize("error", [Unavailable("overloaded"), StoreError("its file is cut short")])
def test_a_worker_that_cannot_serve_the_request_now_is_avoided(error: Unavailable | StoreError) -> None:
    request = dispatch(view(report("paris", models=HOLDS), report("tokyo")))
    assert replicas(request, Rejected(error), Finished("tokyo-1", 2)) == ["paris-1", "tokyo-1"]


def test_a_rejection_that_no_other_worker_mends_is_final() -> None:
    request = dispatch(view(report("paris", models=HOLDS), report("tokyo", models=HOLDS)))
    error = DoesNotFit("too large")
    assert replicas(request, Rejected(error)) == ["paris-1"]
    assert request.next(0.0) == request.next(1.0) == Fail(FailReason.REJECTED, error)


def test_a_request_fails_with_the_last_rejection_once_every_worker_has_rejected_it() -> None:
    known = view(report("paris"), report("tokyo"))
    request = dispatch(known)
    last = Unavailable("full as well")
    assert replicas(request, NO_ROOM, Rejected(last)) == ["paris-1", "tokyo-1"]
    assert request.next(0.0) == Fail(FailReason.REJECTED, last)
    assert [call[0] for call in known.calls if call[0] != "observe"] == ["sent", "returned"] * 2


def test_a_lost_worker_is_suspected_and_avoided() -> None:
    known = view(report("paris", models=HOLDS), report("tokyo"))
    assert replicas(dispatch(known), Lost(), Finished("tokyo-1", 2)) == ["paris-1", "tokyo-1"]
    assert known.calls[:3] == [("sent", "paris-1"), ("returned", "paris-1"), ("suspect", "paris-1")]


def test_a_request_without_a_known_worker_goes_to_any_of_its_location_and_fails_with_what_that_says() -> None:
    known = view()
    request = dispatch(known)
    assert replicas(request, Lost(), NO_ROOM) == [None, None]
    assert request.next(0.0) == Fail(FailReason.REJECTED, NO_ROOM.error)
    assert not known.calls


def test_a_worker_that_answers_without_being_known_holds_the_model() -> None:
    known = view()
    assert replicas(dispatch(known), Finished("paris-7", 2)) == [None]
    assert known.calls == [("observe", "paris-7", "m", ModelState.READY)]


def test_five_lost_workers_are_enough() -> None:
    request = dispatch(view())
    assert replicas(request, *[Lost()] * Dispatch.MAX_ATTEMPTS) == [None] * 5
    assert request.next(0.0) == Fail(FailReason.UNREACHABLE)


def test_the_last_rejection_counts_for_more_than_losses_after_it() -> None:
    request = dispatch(view(*(report(location) for location in ("paris", "tokyo", "oslo"))))
    replicas(request, NO_ROOM, Lost(), Lost())
    assert request.next(0.0) == Fail(FailReason.REJECTED, NO_ROOM.error)


def test_no_attempt_begins_at_the_deadline_or_later() -> None:
    known = view(report("paris"))
    request = dispatch(known, deadline_s=1.0)
    sent(request, 0.9)
    request.replied(Lost())
    assert request.next(1.0) == Fail(FailReason.DEADLINE)
    assert known.calls[-1] == ("suspect", "paris-1")


def test_a_rejection_counts_for_more_than_the_deadline() -> None:
    request = dispatch(view(report("paris"), report("tokyo")), deadline_s=1.0)
    replicas(request, NO_ROOM)
    assert request.next(1.0) == Fail(FailReason.REJECTED, NO_ROOM.error)


def test_a_deadline_that_passes_at_the_worker_is_final() -> None:
    request = dispatch(view(report("paris"), report("tokyo")))
    error = DeadlineExceeded("too late")
    replicas(request, Rejected(error))
    assert request.next(0.0) == Fail(FailReason.REJECTED, error)


def test_a_request_that_is_closed_is_no_longer_under_way_and_is_returned_once() -> None:
    known = view(report("paris", models=HOLDS))
    request = dispatch(known)
    sent(request)
    request.close()
    request.close()
    assert known.calls == [("sent", "paris-1"), ("returned", "paris-1")]
    assert known.queue_s(known.cluster.workers["paris-1"]) == 0.0
