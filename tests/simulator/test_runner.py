"""Runs of an experiment, and their rows."""

from __future__ import annotations

import os
import random
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from simulator_support import workload

from serve_app.errors import EdgeServeError
from serve_app.simulator import runner
from serve_app.simulator.result_row import Latency, ResultRow
from serve_app.simulator.runner import ExperimentPlan, ReplaySpec, run
from serve_app.simulator.scenario import (
    ALL_POLICIES,
    Capacity,
    PolicyChoice,
    Workload,
    parse_capacities,
    parse_policies,
)


def spec(policy: str, capacity: Capacity, number: int = 0) -> ReplaySpec:
    return ReplaySpec(workload=number, policy=parse_policies([policy])[0], capacity=capacity)


def play(stream: Workload, policy: str, size_bytes: int) -> ResultRow:
    (row,) = run(ExperimentPlan(workloads=(stream,), replays=(spec(policy, Capacity(given_bytes=size_bytes)),)), jobs=1)
    return row


def lettered(seed: int) -> Workload:
    rng = random.Random(seed)
    return workload("".join(rng.choice("aaaabbbccdefgh") for _ in range(400)))


def without_clock(rows: tuple[ResultRow, ...]) -> list[ResultRow]:
    return [replace(row, wall_s=0.0, requests_per_s=0.0) for row in rows]


def test_a_row_has_the_sums_of_its_requests() -> None:
    row = play(workload("ababcc"), "lru", 20)
    assert (row.requests, row.models, row.hits, row.misses, row.evictions) == (6, 3, 3, 3, 1)
    assert row.load_s_per_request == 1.0
    assert row.load_over_exec == 1.0
    assert row.compulsory_load_over_exec == 1.0
    assert (row.mean_latency_s, row.p50_s, row.p99_s) == (2.0, 1.0, 3.0)
    assert row.capacity_share == pytest.approx(2 / 3)


@pytest.mark.parametrize("policy", ALL_POLICIES)
def test_every_request_is_a_hit_a_miss_a_join_or_a_forward(policy: str) -> None:
    row = play(lettered(0), policy, 35)
    assert row.hits + row.misses + row.joins + row.forwards == row.requests == 400
    assert row.load_over_exec is not None
    assert row.mean_latency_s == pytest.approx(row.load_s_per_request + 1.0)


def test_the_oracle_knows_the_future_of_its_own_location() -> None:
    # By turns, each location asks for what the other one does not; together they would not fit.
    stream = workload("abab" * 5, locations="0101" * 5)
    row = play(stream, "belady-am", 10)
    assert (row.misses, row.hits, row.locations) == (2, 18, 2)


def test_each_location_has_to_load_for_itself() -> None:
    row = play(workload("aaaa", locations="0011"), "lru", 10)
    assert (row.misses, row.compulsory_load_over_exec) == (2, 1.0)


def test_a_model_that_does_not_fit_misses_every_time() -> None:
    row = play(workload("abab", sizes={"b": 50}), "lru", 20)
    assert (row.misses, row.rejected, row.hits) == (3, 2, 1)
    assert row.load_s_per_request == 1.5


def test_without_execution_time_there_is_no_ratio() -> None:
    stream = workload("ab")
    stream = replace(stream, profiles=tuple(replace(profile, exec_s=0.0) for profile in stream.profiles))
    row = play(stream, "lru", 10)
    assert (row.load_over_exec, row.compulsory_load_over_exec) == (None, None)


def test_percentiles_are_those_of_the_single_latencies() -> None:
    rng = random.Random(0)
    waited = [rng.random() * 5 for _ in range(37)]
    at_once = Counter({0.1: 500, 0.7: 60, 2.5: 3})
    latency = Latency.of(waited, at_once)
    every = np.array([*waited, *at_once.elements()])
    assert latency.mean_s == pytest.approx(every.mean())
    for found, share in ((latency.p50_s, 0.5), (latency.p99_s, 0.99)):
        assert found == np.quantile(every, share, method="inverted_cdf")


def test_rows_keep_the_order_of_the_plan_with_any_number_of_processes() -> None:
    policies = ("belady-am", "random", "lru")
    replays = tuple(spec(name, Capacity(given_share=share), number)
                  for number in (0, 1) for share in (0.5, 0.3) for name in policies)  # fmt: skip
    plan = ExperimentPlan(workloads=(lettered(1), lettered(2)), replays=replays)
    reported: list[int] = []
    alone = run(plan, jobs=1, on_progress=reported.append)
    assert [row.policy for row in alone] == list(policies) * 4
    assert [row.capacity_share for row in alone] == [0.5] * 3 + [0.3] * 3 + [0.5] * 3 + [0.3] * 3
    assert reported[-1] == plan.requests == 12 * 400
    reported.clear()
    assert without_clock(run(plan, jobs=2, on_progress=reported.append)) == without_clock(alone)
    assert reported[-1] == plan.requests


def test_a_replay_can_have_fewer_preloads_than_the_plan() -> None:
    many, none = (replace(spec("edgeserve", Capacity(given_share=0.5)), max_preloads=most) for most in (None, 0))
    rows = run(ExperimentPlan(workloads=(workload("abcd" * 50),), replays=(many, none)), jobs=1)
    assert rows[0].preloads > 0 == rows[1].preloads


class DiesInPickling:
    """Unpickling it ends the process at once, as the kernel does when memory runs out."""

    def __reduce__(self) -> tuple[Callable[[int], None], tuple[int]]:
        return os._exit, (9,)


def test_the_death_of_a_process_is_one_sentence() -> None:
    choice = PolicyChoice(label=DiesInPickling(), name="lru")  # type: ignore[arg-type]
    plan = ExperimentPlan(
        workloads=(workload("ab"),), replays=(ReplaySpec(policy=choice, capacity=Capacity(given_bytes=10)),) * 2
    )
    with pytest.raises(EdgeServeError, match="lack of memory; try fewer"):
        run(plan, jobs=2)


def test_lack_of_memory_in_this_process_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr(runner, "replay", refuse)
    with pytest.raises(EdgeServeError, match="lack of memory; try a shorter trace"):
        play(workload("ab"), "lru", 10)


@pytest.mark.parametrize(
    ("text", "size_bytes"), [("25%", 250), ("12.5 %", 125), ("150%", 1500), ("0.00001%", 1), ("1KiB", 1024), ("7", 7)]
)
def test_a_capacity_is_bytes_or_a_share_of_all_models(text: str, size_bytes: int) -> None:
    (capacity,) = parse_capacities([text])
    assert capacity.size_bytes(1000) == size_bytes
    assert capacity.share(1000) == pytest.approx(size_bytes / 1000, abs=1e-3)


@pytest.mark.parametrize("text", ["0", "0%", "0.2", "-5%", "-1", "nan%", "inf", "1e3", "", "%", "half", "5 %%"])
def test_a_malformed_capacity_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="capacity"):
        parse_capacities([text])


def test_lists_keep_their_order_without_duplicates() -> None:
    assert [policy.label for policy in parse_policies(["lru,gdsf", "lru"])] == ["lru", "gdsf"]
    assert [policy.label for policy in parse_policies(["gdsf,all"])][:2] == ["gdsf", "random"]
    assert {policy.name for policy in parse_policies(["all"])} == set(ALL_POLICIES)
    assert [capacity.given_share for capacity in parse_capacities(["50%, 10%", "50%"])] == [0.5, 0.1]


@pytest.mark.parametrize("text", ["modelmesh:churn_age=5min", "modelmesh:churn_age_s=300"])
def test_parameters_are_written_as_in_the_configuration_or_as_in_code(text: str) -> None:
    (policy,) = parse_policies([text])
    assert (policy.name, policy.label, dict(policy.parameters)) == ("modelmesh", text, {"churn_age_s": 300.0})


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("marvel", "unknown policy 'marvel'; there are random, fifo,"),
        ("belady:x=1", "takes no parameters"),
        ("lru:x=1", "unknown key x; policy lru takes no parameters"),
        ("modelmesh:age=1s", "unknown key age; policy modelmesh takes churn_age"),
        ("modelmesh:churn_age", "'churn_age' has no value; write it like churn_age=..."),
        ("modelmesh:churn_age=soon", "churn_age: 'soon' is not a duration"),
        ("modelmesh:churn_age=0s", "churn_age_s must be positive"),
        ("modelmesh:churn_age=1s&churn_age_s=1", "stands twice"),
    ],
)
def test_a_malformed_policy_is_refused(text: str, words: str) -> None:
    with pytest.raises(ValueError, match=re.escape(words)):
        parse_policies([text])
