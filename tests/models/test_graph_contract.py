"""Which axes of an ONNX graph are free, and which of them is the batch."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from serve_app.core.catalog import ModelEntry
from serve_app.core.contract import Axis
from serve_app.models.publishing.graph_contract import read_contract


@pytest.mark.parametrize(
    ("shapes", "axes"),
    [
        ([["batch", "n"]], [("batch", "n")]),
        ([["rows", "n"]], [("rows", "n")]),
        ([["N", 4]], [("batch", "")]),
        ([["N", 4], [2, "N", 8]], [("batch", ""), ("", "batch", "")]),
        ([["n", "n"]], [("batch", "batch")]),
        ([["batch_size", 4], ["n", 4]], [("batch", ""), ("n", "")]),
        ([["Bs", "n"]], [("batch", "n")]),
    ],
)
def test_n_is_the_batch_only_where_it_comes_first_and_no_other_axis_is(
    shapes: list[list[str | int]], axes: list[tuple[str, ...]]
) -> None:
    tensors = [
        SimpleNamespace(name=f"x{index}", type="tensor(float)", shape=shape) for index, shape in enumerate(shapes)
    ]
    session = SimpleNamespace(get_inputs=lambda: tensors, get_outputs=lambda: tensors)
    names = sorted({axis for each in axes for axis in each if axis})
    limits = tuple(Axis(name=name, most=4) for name in names)
    contract = read_contract(ModelEntry(model_id="m", builder="onnx:m.onnx", limits=limits), session)
    assert [spec.axes for spec in contract.inputs] == axes
    assert [spec.axes for spec in contract.outputs] == axes
