"""Inputs for trial runs, and which inputs of a request are complete: the contract says what values there are."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest

from serve_app.core.contract import Axis, Contract, TensorSpec, ValueRange
from serve_app.errors import InvalidRequest
from serve_app.tasks.tensors import NUMPY_TYPES, complete, probe

ROWS = 200


def contract(*inputs: TensorSpec) -> Contract:
    output = TensorSpec(name="y", datatype="FP32", shape=(-1,))
    return Contract(inputs=inputs, outputs=(output,), axes=(Axis(name="batch", most=ROWS),))


def takes(datatype: str, least: float, most: float, **fields: Any) -> TensorSpec:
    return TensorSpec(name="x", datatype=datatype, shape=(-1, 4), values=ValueRange(least=least, most=most), **fields)


@pytest.mark.parametrize(
    ("datatype", "least", "most"),
    [("INT32", 0, 256), ("UINT8", 0, 255), ("INT8", -128, -127), ("UINT64", 2**40, 2**40 + 2), ("INT64", 7, 7)],
)
def test_trial_inputs_are_all_the_whole_numbers_that_are_declared(datatype: str, least: int, most: int) -> None:
    found = probe(contract(takes(datatype, least, most)), (ROWS,))["x"]
    assert found.dtype == NUMPY_TYPES[datatype]
    assert least <= found.min() <= found.max() <= most
    assert len(np.unique(found)) > 0.9 * min(ROWS, most - least + 1)


@pytest.mark.parametrize("datatype", ["FP16", "FP32", "FP64"])
def test_trial_inputs_are_spread_over_the_fractions_that_are_declared(datatype: str) -> None:
    found = probe(contract(takes(datatype, 2.5, 3)), (ROWS,))["x"]
    assert found.dtype == NUMPY_TYPES[datatype]
    assert 2.5 <= found.min() < 2.6 < 2.9 < found.max() <= 3


def test_trial_inputs_are_the_default_where_there_is_one() -> None:
    assert np.unique(probe(contract(takes("INT32", 0, 9, default=5.0)), (2,))["x"]) == [5]


@pytest.mark.parametrize(("number", "given"), [(257, "257"), (-1, "-1")])
def test_numbers_beyond_what_is_declared_are_refused_with_input_range_and_number(number: int, given: str) -> None:
    ids = np.zeros((1, 4), np.int32)
    ids[0, 2] = number
    with pytest.raises(InvalidRequest, match=rf"input 'x' takes numbers in 0\.\.256, not {given}$"):
        complete({"x": ids}, contract(takes("INT32", 0, 256)))


@pytest.mark.parametrize(
    "spec",
    [
        takes("INT32", 0, 256),
        takes("INT32", 0, 256, default=1.0),
        TensorSpec(name="x", datatype="INT32", shape=(-1, 4)),
    ],
)
def test_numbers_within_what_is_declared_are_taken(spec: TensorSpec) -> None:
    ids: Mapping[str, Any] = {"x": np.array([[0, 256, 1, 2]], np.int32)}
    assert complete(ids, contract(spec)) == (ids, (1,))
