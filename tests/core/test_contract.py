"""The contract of a model: which inputs it takes, and what they cost."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve_app.core.contract import Axis, Contract, SizeCost, TensorSpec, ValueRange, cost_at, expected_exec_s
from serve_app.core.contract_declaration import TensorDeclaration, complete_contract
from serve_app.errors import InvalidRequest

TEXT = Contract(
    inputs=(
        TensorSpec(name="ids", datatype="INT64", shape=(-1, -1), axes=("batch", "sequence")),
        TensorSpec(name="mask", datatype="INT64", shape=(-1, -1), axes=("batch", "sequence"), default=1.0),
        TensorSpec(name="state", datatype="FP32", shape=(2, -1, 8), axes=("", "batch", ""), default=0.0),
        TensorSpec(name="rate", datatype="INT64", shape=(), default=16000.0),
    ),
    outputs=(TensorSpec(name="logits", datatype="FP32", shape=(-1, 3)),),
    axes=(Axis(name="batch", most=4), Axis(name="sequence", least=1, most=16, multiple=2)),
)


def test_sizes_are_read_from_the_inputs_that_are_there() -> None:
    assert TEXT.sizes({"ids": (3, 6)}) == (3, 6)
    assert TEXT.sizes({"ids": (1, 2), "mask": (1, 2), "state": (2, 1, 8), "rate": ()}) == (1, 2)
    assert TEXT.sizes({"state": (2, 3, 8)}) == (3, 2), "an axis of no input that is there has its least size"


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ({"ids": (1, 2, 3)}, r"input 'ids' takes shape \[-1, -1\] \(-1 is free\), not \[1, 2, 3\]"),
        ({"state": (3, 1, 8)}, r"input 'state' takes shape \[2, -1, 8\] \(-1 is free\), not \[3, 1, 8\]"),
        ({"rate": (1,)}, r"input 'rate' takes shape \[\] \(-1 is free\), not \[1\]"),
        ({"ids": (1, 4), "mask": (1, 6)}, "axis 'sequence' of input 'mask' must be 4 as in other inputs, not 6"),
        ({"ids": (1, 4), "state": (2, 2, 8)}, "axis 'batch' of input 'state' must be 1 as in other inputs, not 2"),
        ({"ids": (5, 4)}, r"axis 'batch' of input 'ids' must lie in 1\.\.4, not 5"),
        ({"ids": (1, 5)}, r"axis 'sequence' of input 'ids' must lie in 1\.\.16 and a multiple of 2, not 5"),
        ({"ids": (0, 4)}, r"axis 'batch' of input 'ids' must lie in 1\.\.4, not 0"),
    ],
)
def test_shapes_that_the_model_does_not_take_name_tensor_expected_and_given(
    shapes: dict[str, tuple[int, ...]], message: str
) -> None:
    with pytest.raises(InvalidRequest, match=message):
        TEXT.sizes(shapes)


def test_shapes_follow_from_sizes() -> None:
    assert [TEXT.shape(spec, (3, 6)) for spec in TEXT.inputs] == [(3, 6), (3, 6), (2, 3, 8), ()]
    assert TEXT.elements((3, 6)) == 18 + 18 + 48 + 1


def whole(datatype: str, least: float, most: float, **fields: float) -> TensorSpec:
    return TensorSpec(name="x", datatype=datatype, shape=(), values=ValueRange(least=least, most=most), **fields)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TensorSpec(name="", datatype="FP32", shape=()), "must not be empty"),
        (lambda: TensorSpec(name="x", datatype="FP31", shape=()), "must be one of .*, not 'FP31'"),
        (lambda: TensorSpec(name="x", datatype="FP32", shape=(0,)), "must hold positive numbers"),
        (lambda: TensorSpec(name="x", datatype="FP32", shape=(-1, 2), axes=("batch",)), "for each free axis"),
        (lambda: TensorSpec(name="x", datatype="FP32", shape=(2,), axes=("batch",)), "for each free axis"),
        (lambda: ValueRange(least=1, most=0), r"least <= most, not 1\.\.0"),
        (lambda: ValueRange(least=0, most=float("inf")), "finite"),
        (lambda: whole("UINT8", 0, 256), r"whole numbers in 0\.\.255, those of UINT8, not 0\.\.256"),
        (lambda: whole("INT8", -129, 0), r"whole numbers in -128\.\.127, those of INT8, not -129\.\.0"),
        (lambda: whole("INT64", 0, 0.5), r"whole numbers in .* not 0\.\.0\.5"),
        (lambda: whole("BYTES", 0, 1), "'x' is of BYTES and has no range of values"),
        (
            lambda: whole("INT32", 0, 9, default=-1.0),
            r"default of tensor 'x' must lie within its values 0\.\.9, not be -1",
        ),
        (lambda: Axis(name="a", most=0), r"not 1\.\.0"),
        (lambda: Axis(name="a", most=8, multiple=0), "at least 1"),
        (lambda: Contract(inputs=(), outputs=TEXT.outputs), "must have an input"),
        (lambda: Contract(inputs=TEXT.inputs, outputs=TEXT.outputs), "limits for"),
        (lambda: Contract(inputs=TEXT.inputs[3:] * 2, outputs=TEXT.outputs), "must differ"),
    ],
)
def test_a_contract_that_contradicts_itself_cannot_be_made(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


SAID = (TensorSpec(name="x", datatype="FP32", shape=(-1, 3, -1)),)
GIVEN = (TensorSpec(name="y", datatype="FP32", shape=(-1, 5)),)


def declare(**fields: object) -> TensorDeclaration:
    return TensorDeclaration(**{"name": "x", **fields})  # type: ignore[arg-type]


def test_a_model_that_says_everything_but_limits_needs_only_limits() -> None:
    contract = complete_contract(SAID, GIVEN, (), (), (Axis(name="x_2", most=9),))
    assert (contract.inputs, contract.outputs) == (SAID, GIVEN)
    assert contract.axes == (Axis(name="batch", most=32), Axis(name="x_2", most=9))


def test_a_declaration_names_fixes_and_completes_what_the_model_says() -> None:
    contract = complete_contract(SAID, GIVEN, (declare(shape=("batch", 3, 7), default=0.5),), (), ())
    assert contract.inputs == (
        TensorSpec(name="x", datatype="FP32", shape=(-1, 3, 7), axes=("batch", "", ""), default=0.5),
    )


@pytest.mark.parametrize(
    ("declared", "limits", "message"),
    [
        ((), (), "axis 'x_2' of input 'x' is free and has no limit.* add limits: {x_2: LARGEST}"),
        ((), (Axis(name="x_2", most=2), Axis(name="width", most=2)), "limits name the axis 'width', which no input"),
        ((declare(name="z"),), (Axis(name="x_2", most=2),), "the model has no input 'z'; it has x"),
        ((declare(datatype="INT64"),), (), "input 'x' is FP32 in the model, not INT64"),
        ((declare(shape=(-1, 4, 2)),), (), r"input 'x' has shape \[-1, 3, -1\] in the model, not \[-1, 4, 2\]"),
        ((declare(shape=(-1, 3, 2), returned_by="z"),), (), "input 'x' is returned by 'z', which is no output"),
    ],
)
def test_a_declaration_that_contradicts_the_model_is_refused(
    declared: tuple[TensorDeclaration, ...], limits: tuple[Axis, ...], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        complete_contract(SAID, GIVEN, declared, (), limits)


def test_only_inputs_have_values() -> None:
    values = ValueRange(least=0, most=1)
    limits = (Axis(name="x_2", most=2),)
    contract = complete_contract(SAID, GIVEN, (declare(values=values),), (), limits)
    assert [spec.values for spec in (*contract.inputs, *contract.outputs)] == [values, None]
    with pytest.raises(ValueError, match="output 'y' has values, which only inputs may have"):
        complete_contract(SAID, GIVEN, (), (declare(name="y", values=values),), limits)


def test_a_model_that_says_nothing_must_be_declared_whole() -> None:
    with pytest.raises(ValueError, match="input 'x' needs a datatype and a shape"):
        complete_contract((), GIVEN, (declare(),), (), ())


COSTS = tuple(
    SizeCost(sizes=(batch, length), workspace_bytes=batch * length * length, exec_s=batch * length)
    for batch in (1, 4)
    for length in (2, 16)
)


@given(batch=st.integers(1, 4), length=st.integers(2, 16))
def test_a_cost_is_bounded_by_what_was_measured_at_sizes_that_are_nowhere_less(batch: int, length: int) -> None:
    cost = cost_at(COSTS, (batch, length))
    assert cost.workspace_bytes >= batch * length * length
    assert cost.exec_s >= batch * length
    assert cost.sizes == (batch, length)


def test_a_measured_size_costs_what_was_measured() -> None:
    assert [cost_at(COSTS, cost.sizes) for cost in COSTS] == list(COSTS)


LINE = Contract(
    inputs=(TensorSpec(name="ids", datatype="INT64", shape=(-1,), axes=("length",)),),
    outputs=(TensorSpec(name="logits", datatype="FP32", shape=(3,)),),
    axes=(Axis(name="length", most=400),),
)
MEASURED = tuple(
    SizeCost(sizes=(length,), workspace_bytes=1, exec_s=exec_s) for length, exec_s in ((1, 1.0), (101, 3.0), (201, 3.0))
)


@pytest.mark.parametrize(
    ("length", "expected_s"), [(1, 1.0), (51, 2.0), (101, 3.0), (150, 3.0), (201, 3.0), (400, 3.0 * 400 / 101)]
)
def test_time_grows_with_elements_between_and_beyond_measurements(length: int, expected_s: float) -> None:
    assert expected_exec_s(LINE, MEASURED, (length,)) == pytest.approx(expected_s, rel=0.01)
