"""Which waiting requests are executed together."""

from __future__ import annotations

import dataclasses
import math

from fakes import published

from serve_app.core.catalog import PublishedModel
from serve_app.core.contract import Axis, Contract, SizeCost, TensorSpec
from serve_app.core.joined_executions import Joinable, added_s, count_joined


def text_model(joined_elements: int = 64) -> PublishedModel:
    """A model of sequences: of 8 rows of 8 it takes twice the time, and eight times the workspace, of one."""
    return dataclasses.replace(
        published("text", exec_s=0.01),
        contract=Contract(
            inputs=(TensorSpec(name="ids", datatype="INT64", shape=(-1, -1), axes=("batch", "sequence")),),
            outputs=(TensorSpec(name="vector", datatype="FP32", shape=(-1, 4)),),
            axes=(Axis(name="batch", most=8), Axis(name="sequence", most=64)),
        ),
        row_by_row=False,
        costs=(
            SizeCost(sizes=(1, 8), workspace_bytes=100, exec_s=0.01),
            SizeCost(sizes=(8, 8), workspace_bytes=800, exec_s=0.02),
            SizeCost(sizes=(8, 64), workspace_bytes=6400, exec_s=0.2),
        ),
        joined_elements=joined_elements,
    )


def request(rows: int = 1, sequence: int = 8, until_s: float = math.inf, joined_elements: int = 64) -> Joinable:
    return Joinable(model=text_model(joined_elements), sizes=(rows, sequence), least_s=0.01, until_s=until_s)


def count(*candidates: Joinable, workspace_bytes: int = 10_000) -> int:
    return count_joined(candidates, 0.0, workspace_bytes)


def test_as_many_are_joined_as_measurements_say_is_worth_it() -> None:
    assert count(*[request()] * 12) == 8
    assert count(*[request()] * 3) == 3


def test_the_limit_counts_elements_so_longer_requests_are_joined_in_smaller_numbers() -> None:
    assert count(*[request(sequence=16)] * 12) == 4
    assert count(*[request(sequence=64)] * 12) == 1


def test_requests_of_several_rows_are_joined_whole() -> None:
    assert count(request(3), request(3), request(3)) == 2


def test_a_model_that_gains_nothing_is_executed_for_one_at_a_time() -> None:
    assert count(*[request(joined_elements=0)] * 12) == 1


def test_no_more_are_joined_than_there_is_workspace_for() -> None:
    assert count(*[request()] * 8, workspace_bytes=500) == 1
    assert count(*[request()] * 8, workspace_bytes=800) == 8


def test_a_request_that_must_be_answered_soon_is_not_held_up_by_others() -> None:
    assert count(request(until_s=0.011), *[request()] * 7) == 1
    assert count(request(until_s=0.016), *[request()] * 7) == 4


def test_a_request_that_joins_those_that_wait_adds_only_what_the_execution_takes_longer() -> None:
    assert added_s(request(), 0) == 0.01
    assert added_s(request(), 7) < 0.002
    assert added_s(request(), 8) == 0.01
