"""The sizes at which a model is measured, and what they say about all others."""

from __future__ import annotations

import itertools

from hypothesis import given
from hypothesis import strategies as st

from serve_app.core.contract import Axis, SizeCost, cost_at, non_decreasing
from serve_app.models.profiling.grid import grid, trial_sizes


@st.composite
def axes(draw: st.DrawFn) -> tuple[Axis, ...]:
    made = []
    for name in draw(st.lists(st.sampled_from(["batch", "height", "width", "time"]), unique=True, max_size=4)):
        multiple = draw(st.sampled_from([1, 8, 32]))
        least = draw(st.integers(1, 64))
        smallest = -(-least // multiple) * multiple
        made.append(Axis(name=name, least=least, most=smallest + draw(st.integers(0, 500)), multiple=multiple))
    return tuple(made)


@given(axes())
def test_all_sizes_of_a_grid_are_allowed_and_the_least_and_largest_are_among_them(limits: tuple[Axis, ...]) -> None:
    sizes = grid(limits)
    assert sizes[0] == tuple(axis.smallest for axis in limits)
    assert sizes[-1] == tuple(axis.largest for axis in limits)
    assert len(set(sizes)) == len(sizes) <= 13
    for each in (*sizes, *trial_sizes(limits)):
        assert all(axis.problem(size) is None for axis, size in zip(limits, each, strict=True))


def test_an_axis_of_one_size_adds_nothing() -> None:
    varying = Axis(name="side", most=64)
    assert len(grid((Axis(name="rate", least=16, most=16), varying))) == len(grid((varying,)))


@given(axes(), st.data())
def test_costs_bound_every_allowed_size_from_above(limits: tuple[Axis, ...], data: st.DataObject) -> None:
    measured = non_decreasing(
        [
            SizeCost(sizes=sizes, workspace_bytes=data.draw(st.integers(0, 99)), exec_s=data.draw(st.floats(0, 9)))
            for sizes in grid(limits)
        ]
    )
    asked = tuple(
        axis.smallest + axis.multiple * data.draw(st.integers(0, (axis.largest - axis.smallest) // axis.multiple))
        for axis in limits
    )
    cost = cost_at(measured, asked)
    for each in measured:
        if all(size <= other for size, other in zip(each.sizes, asked, strict=True)):
            assert cost.workspace_bytes >= each.workspace_bytes
            assert cost.exec_s >= each.exec_s
    for one, other in itertools.combinations(measured, 2):
        if all(size <= larger for size, larger in zip(one.sizes, other.sizes, strict=True)):
            assert one.workspace_bytes <= other.workspace_bytes
