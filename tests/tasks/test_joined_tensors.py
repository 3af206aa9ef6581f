"""Inputs stacked, and outputs given back to those that they belong to."""

from __future__ import annotations

import numpy as np
import pytest

from serve_app.core.contract import Axis, Contract, TensorSpec
from serve_app.tasks.joined_tensors import join, split

CONTRACT = Contract(
    inputs=(
        TensorSpec(name="text", datatype="BYTES", shape=(-1,)),
        TensorSpec(name="state", datatype="FP32", shape=(2, -1, 3), axes=("", "batch", "")),
    ),
    outputs=(TensorSpec(name="next", datatype="FP32", shape=(2, -1, 3), axes=("", "batch", "")),),
    axes=(Axis(name="batch", most=8),),
)


def request(rows: int, start: float) -> dict[str, np.ndarray]:
    state = np.arange(start, start + 6 * rows, dtype=np.float32).reshape(2, rows, 3)
    return {"text": np.array([b"row %d" % row for row in range(rows)], object), "state": state}


def test_each_request_gets_exactly_its_rows_whatever_the_position_of_the_batch() -> None:
    requests = [request(2, 0), request(1, 100), request(3, 200)]
    joint = join(CONTRACT, requests)
    assert joint["state"].shape == (2, 6, 3)
    assert list(joint["text"]) == [b"row 0", b"row 1", b"row 0", b"row 0", b"row 1", b"row 2"]
    parts = split(CONTRACT, {"next": joint["state"]}, [2, 1, 3])
    for each, part in zip(requests, parts, strict=True):
        np.testing.assert_array_equal(part["next"], each["state"])
        assert part["next"].flags.c_contiguous
        assert part["next"].base is None


def test_outputs_of_another_number_of_rows_belong_to_nobody() -> None:
    with pytest.raises(ValueError, match="has 5 rows instead of 6"):
        split(CONTRACT, {"next": np.zeros((2, 5, 3), np.float32)}, [2, 1, 3])
