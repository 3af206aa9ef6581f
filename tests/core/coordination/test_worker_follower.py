"""One worker's side of the coordination: what it reports, and what deltas mean for it."""

from __future__ import annotations

import dataclasses
import random

import pytest
from core_support import Ranked, report, resident

from serve_app.core.cache.model_cache import ModelCache
from serve_app.core.cluster.commands import WithdrawAt
from serve_app.core.cluster.primaries import rendezvous_rank
from serve_app.core.cluster.reports import Demand, ViewDelta, WorkerReport
from serve_app.core.coordination.worker_follower import WorkerFollower
from serve_app.core.links import Link
from serve_app.core.routing.displacement_cost import forward_costs
from serve_app.core.routing.rules import RoutingRules

RULES = RoutingRules(profiles={}, links={}, default_link=Link(rtt_s=0.1, bytes_per_s=1e9), horizon_s=10.0)
HELD = {name: resident(name) for name in "ab"}
#: A replica of Tokyo that ranks before ``paris-1`` for model a, and one that ranks after it.
BEFORE, AFTER = (
    next(
        name
        for name in (f"tokyo-{number}" for number in range(99))
        if (rendezvous_rank("a", name) < rendezvous_rank("a", "paris-1")) is ranks_before
    )
    for ranks_before in (True, False)
)


def follower(**changes: object) -> WorkerFollower:
    return WorkerFollower(**{"replica": "paris-1", "location": "paris", "rules": RULES, **changes})  # type: ignore[arg-type]


def holder(replica: str, *names: str, sequence: int = 1) -> WorkerReport:
    made = report(replica.split("-")[0], replica, sequence=sequence, models=[resident(name) for name in names])
    return dataclasses.replace(made, primary_for=frozenset(names))


def delta(*workers: WorkerReport, full: bool = False, version: int = 1, **changes: object) -> ViewDelta:
    made = ViewDelta(epoch="first", version=version, full=full, workers=workers, gone=(), rates=None)
    return dataclasses.replace(made, **changes)  # type: ignore[arg-type]


def settled(worker: WorkerFollower, *workers: WorkerReport) -> WorkerFollower:
    """The same, after it has read, reported and read again: copies not reported as primary are duplicates."""
    worker.apply(delta(*workers), HELD, 0.0)
    send(worker)
    worker.apply(delta(), HELD, 0.0)
    return worker


def send(worker: WorkerFollower) -> WorkerReport:
    return worker.report(
        cache=ModelCache(capacity_bytes=100, policy=Ranked()),
        models=HELD,
        loading=0,
        exec_slots=1,
        queue_s=0.0,
        inflight=0,
    )


def test_reports_are_numbered_and_demand_goes_with_one_of_them() -> None:
    worker = follower()
    worker.demand["oslo", "a"] += 2
    assert (send(worker).sequence, send(worker).sequence, worker.next_sequence) == (1, 2, 3)
    demand = worker.take_demand()
    assert demand == (Demand(location="oslo", model_id="a", count=2),)
    assert worker.take_demand() == ()
    worker.demand["oslo", "a"] += 1
    worker.return_demand(demand)
    assert worker.take_demand() == (Demand(location="oslo", model_id="a", count=3),)


def test_a_last_copy_costs_a_load_and_a_duplicate_costs_a_forward() -> None:
    worker = follower()
    first = worker.apply(delta(holder(AFTER, "a")), HELD, 0.0)
    assert first.forward_costs == {}, "paris-1 is primary for model a"
    worker = follower()
    instructions = worker.apply(delta(holder(BEFORE, "a")), HELD, 0.0)
    assert instructions.forward_costs == {"a": 0.1}
    assert send(worker).primary_for == {"b"}


def test_forward_costs_are_worked_out_only_when_holders_links_or_last_copies_have_changed() -> None:
    worker = settled(follower(), holder(BEFORE, "a"))
    assert worker.apply(delta(), HELD, 0.0).forward_costs is None
    assert worker.apply(delta(holder(BEFORE, "a", sequence=2)), HELD, 0.0).forward_costs is None
    link = {("paris", "tokyo"): Link(rtt_s=0.3, bytes_per_s=1e9)}
    assert worker.apply(delta(links=link), HELD, 0.0).forward_costs == {"a": 0.3}
    assert worker.apply(delta(holder(BEFORE, "a", "c", sequence=3)), HELD, 0.0).forward_costs == {"a": 0.3, "c": 0.3}
    assert worker.apply(delta(gone=(BEFORE,)), HELD, 0.0).forward_costs == {}


@pytest.mark.parametrize("seed", range(20))
def test_costs_that_are_not_given_again_are_those_of_before(seed: int) -> None:
    rng = random.Random(seed)
    worker, known = follower(), {}
    places = ["lima", "oslo", "paris", "tokyo"]
    for sequence in range(1, 200):
        replica = f"{rng.choice(places)}-{rng.choice([1, 2])}"
        reported = dataclasses.replace(
            holder(replica, *rng.sample("abcd", rng.randrange(4)), sequence=sequence), leaving=rng.random() < 0.1
        )
        gone = (f"{rng.choice(places)}-1",) if rng.random() < 0.1 else ()
        links = {("paris", rng.choice(places)): Link(rtt_s=rng.random(), bytes_per_s=1e9)} if seed % 2 else {}
        given = worker.apply(delta(reported, gone=gone, links=links if rng.random() < 0.1 else {}), HELD, 0.0)
        send(worker)
        known = known if given.forward_costs is None else given.forward_costs
        everything = forward_costs("paris", worker.view, RULES.with_links(worker.view.links))
        assert known.items() <= everything.items()
        assert everything.keys() - known.keys() <= HELD.keys()


def test_a_required_copy_is_protected_while_it_is_a_last_one() -> None:
    worker = follower(min_copies={"a": 1})
    assert worker.apply(delta(holder(AFTER, "a")), HELD, 0.0).protect == ("a",)
    worker = settled(follower(min_copies={"a": 1}), holder(BEFORE, "a"))
    assert worker.apply(delta(), HELD, 0.0).protect == ()


def test_a_leaving_worker_says_so_and_carries_out_no_commands() -> None:
    worker, command = follower(), WithdrawAt(location="paris", replica="paris-1", model_id="a")
    assert worker.apply(delta(commands=(command,)), HELD, 0.0).commands == (command,)
    worker.is_leaving = True
    assert send(worker).leaving
    assert worker.apply(delta(commands=(command,)), HELD, 0.0).commands == ()


def test_other_rules_keep_the_links_that_were_measured() -> None:
    worker = settled(follower(), holder(BEFORE, "a"))
    worker.apply(delta(links={("paris", "tokyo"): Link(rtt_s=0.3, bytes_per_s=1e9)}), HELD, 0.0)
    worker.reconfigure(dataclasses.replace(RULES, default_link=Link(rtt_s=0.5, bytes_per_s=1e9)), {})
    assert worker.apply(delta(), HELD, 0.0).forward_costs == {"a": 0.3}
