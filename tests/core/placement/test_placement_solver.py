"""The sparse round does what a round over whole tables does, whatever the cluster looks like."""

from __future__ import annotations

import random
from dataclasses import replace

import numpy as np
import pytest
from core_support import profile
from dense_placement import DenseRound

from serve_app.core.cluster.commands import Command, PreloadAt
from serve_app.core.links import Link
from serve_app.core.placement.latency_matrix import LatencyMatrix
from serve_app.core.placement.rules import PlacementRules
from serve_app.core.placement.solver import PlacementRound
from serve_app.core.placement.tables import PlacementGoals
from serve_app.core.placement.worker_states import WorkerState
from serve_app.core.routing.rules import RoutingRules


class Case:
    """A cluster of a few workers, drawn at random; no two rates or latencies are equal, so nothing depends on ties."""

    def __init__(self, seed: int) -> None:
        self._rng = rng = random.Random(seed)
        self.rules = PlacementRules(
            share_per_round=rng.choice([0.1, 0.5, 1.0]),
            hysteresis=rng.choice([1.0, 1.5, 3.0]),
            payback_s=10.0 ** rng.randrange(6),
        )
        self.names = [f"m{number:02}" for number in range(rng.randrange(2, 14))]
        profiles = {
            name: profile(name, rng.randrange(1, 30), load_s=rng.choice([0.05, 1.0, 5.0]) * rng.uniform(0.9, 1.1))
            for name in self.names
        }
        places = [f"loc{number}" for number in range(rng.randrange(1, 7))]
        links = {
            (here, there): Link(rtt_s=rng.uniform(0.001, 1.0), bytes_per_s=1e6)
            for here in places
            for there in places
            if here != there and rng.random() < 0.6
        }
        self.routing = RoutingRules(
            profiles=profiles, links=links, default_link=Link(rtt_s=0.1, bytes_per_s=1e6), horizon_s=10.0
        )
        self.workers = [
            self._worker(f"{place}-{number}", place) for place in places for number in range(rng.choice([0, 1, 1, 2]))
        ]
        self.goals = PlacementGoals(
            rates={
                place: {name: rng.choice([0.0, 10.0 ** rng.uniform(-4, 1)]) for name in sorted(self._some(0.7))}
                for place in [*places, "elsewhere"]
            },
            copies={name: rng.randrange(4) for name in sorted(self._some(0.2))},
            withdraw=self._some(0.3),
            urgent=self._some(0.2),
            only=rng.choice([None, None, self._some(0.5)]),
        )

    def round(self, goals: PlacementGoals | None = None) -> PlacementRound:
        latencies = LatencyMatrix(self.routing.links, self.routing.default_link, 0)
        return PlacementRound(self.workers, goals or self.goals, self.routing.profiles, self.rules, latencies)

    def _some(self, share: float) -> frozenset[str]:
        return frozenset(name for name in self.names if self._rng.random() < share)

    def _worker(self, replica: str, location: str) -> WorkerState:
        rng, capacity, held, used = self._rng, self._rng.randrange(10, 90), {}, 0
        share = rng.choice([0.2, 0.9])
        for name in self.names:
            if rng.random() < share and used + self.routing.profiles[name].size_bytes <= capacity:
                held[name] = True
                used += self.routing.profiles[name].size_bytes
        return WorkerState(
            location=location,
            replica=replica,
            model_capacity_bytes=capacity,
            used_bytes=used,
            exec_slots=1,
            held=held,
            cooling_down=self._some(0.1),
            just_ordered=self._some(0.05),
            overdue=self._some(0.1),
            unevictable=self._some(0.1) & held.keys(),
            primary_for=self._some(0.6) & held.keys(),
            idle=self._some(0.5) & held.keys(),
            load_budget_bytes=capacity * self.rules.share_per_round * rng.choice([1.0, 1.0, 0.5]),
            evict_budget_bytes=capacity * self.rules.share_per_round * rng.choice([1.0, 1.0, 0.5]),
        )


@pytest.mark.parametrize("part", range(10))
def test_a_round_gives_the_commands_that_whole_tables_give(part: int) -> None:
    given = 0
    for seed in range(200 * part, 200 * part + 200):
        case = Case(seed)
        if not case.workers:
            continue
        sparse = case.round()
        dense = DenseRound(case.workers, case.goals, case.routing, case.rules, 0)
        commands = sparse.commands()
        assert commands == dense.commands(), f"case {seed}"
        assert np.array(sparse.budgets_left()) == pytest.approx(np.array(dense.budgets_left()))
        given += len(commands)
    assert given > 200


def test_latencies_are_those_of_the_links_in_either_direction_as_they_are_learned() -> None:
    rng, names = random.Random(0), ["oslo", "paris", "rome", "tokyo"]
    default = Link(rtt_s=0.5, bytes_per_s=1e6)
    latencies = LatencyMatrix({}, default, 1000)
    links: dict[tuple[str, str], Link] = {}
    for step in range(200):
        measured = {(rng.choice(names), rng.choice(names)): Link(rtt_s=rng.random(), bytes_per_s=1e6)}
        links |= measured
        latencies.update(measured)
        known = names[: 2 + step // 80]
        rules = RoutingRules(profiles={}, links=links, default_link=default, horizon_s=1.0)
        assert latencies.table(known, known[::-1]).tolist() == [
            [0.0 if here == there else rules.link(here, there).seconds(1000) for there in known[::-1]] for here in known
        ]
    assert latencies.longest_s == max(link.seconds(1000) for link in (default, *links.values()))


def test_models_and_locations_that_take_no_part_change_nothing() -> None:
    """Models and locations far away, thousands in a large cluster, do not change which workers get a copy."""
    case = next(case for case in map(Case, range(999)) if len(case.workers) > 3 and _loads(case, case.goals))
    asked = {**case.goals.rates, "far": {f"unknown{number}": 1.0 for number in range(50)}}
    assert _loads(case, replace(case.goals, rates=asked)) == _loads(case, case.goals)


def _loads(case: Case, goals: PlacementGoals) -> list[Command]:
    commands = case.round(goals).commands()
    return [command for command in commands if isinstance(command, PreloadAt)]
