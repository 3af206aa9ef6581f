"""The contract of a model: its named tensors, which of their axes are free, and within which limits.

Router, worker, store and protocol know a model by its contract and by numbers. What runs the model, and what people
mean by its tensors, is in ``serve_app/models/runtimes`` and ``serve_app/tasks``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from serve_app.errors import InvalidRequest

#: The datatypes of the Open Inference Protocol.
DATATYPES: Final = (
    "BOOL",
    "UINT8",
    "UINT16",
    "UINT32",
    "UINT64",
    "INT8",
    "INT16",
    "INT32",
    "INT64",
    "FP16",
    "BF16",
    "FP32",
    "FP64",
    "BYTES",
)

FREE: Final = -1

#: The axis along which independent inputs are stacked, and its limit where the catalog names none: an inference may
#: then bring as many as ``limits.batch`` of the deployment allows.
BATCH: Final = "batch"


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


@dataclass(frozen=True, slots=True, kw_only=True)
class ValueRange:
    """The numbers that an input may hold: from ``least`` to ``most``, both included."""

    least: float
    most: float

    def __post_init__(self) -> None:
        _require(
            math.isfinite(self.least) and math.isfinite(self.most) and self.least <= self.most,
            f"values must have finite limits least <= most, not {self}",
        )

    def __str__(self) -> str:
        """Return the range as catalogs write it, such as ``0..255``."""
        return f"{_plain(self.least)}..{_plain(self.most)}"

    def outside(self, least: float, most: float) -> float | None:
        """Return which of the least and the most of some numbers lies outside; None if none does."""
        if least < self.least:
            return least
        return most if most > self.most else None


def _plain(number: float) -> str:
    return str(int(number)) if float(number).is_integer() else str(number)


def _whole_numbers(datatype: str) -> ValueRange | None:
    """Return the numbers of a datatype of whole numbers; None of any other."""
    kind, _, bits = datatype.partition("INT")
    if not bits:
        return None
    signs = 0 if kind else 2 ** (int(bits) - 1)
    return ValueRange(least=-signs, most=2 ** int(bits) - 1 - signs)


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorSpec:
    """Name, Open Inference Protocol datatype and shape of one tensor.

    Attributes:
        shape: sizes; -1 is a free axis. Empty for a scalar.
        axes: the name of each axis, empty for one of a fixed size; axes of one name have one size in all tensors of an
            inference. By default the first free axis of the first position is ``batch``, and any other has the name of
            its tensor and its position.
        default: of an input: what every element is where a request leaves the tensor out; None: it must be there.
        returned_by: of an input that carries state: the output that holds its next value.
        values: of an input of numbers: those that mean something to the model; None: all of its datatype.
    """

    name: str
    datatype: str
    shape: tuple[int, ...]
    axes: tuple[str, ...] = ()
    default: float | None = None
    returned_by: str | None = None
    values: ValueRange | None = None

    def __post_init__(self) -> None:
        _require(bool(self.name), "the name of a tensor must not be empty")
        _require(
            self.datatype in DATATYPES,
            f"datatype of tensor {self.name!r} must be one of {', '.join(DATATYPES)}, not {self.datatype!r}",
        )
        _require(
            all(size == FREE or size > 0 for size in self.shape),
            f"shape of tensor {self.name!r} must hold positive numbers, or -1 for free axes, not {list(self.shape)}",
        )
        if not self.axes:
            object.__setattr__(self, "axes", tuple(self._default_axis(at) for at in range(len(self.shape))))
        named = [size == FREE for size in self.shape] == [bool(axis) for axis in self.axes]
        _require(named, f"tensor {self.name!r} must have a name for each free axis, and for no other: {self.axes}")
        if self.values is not None:
            self._require_numbers(self.values)

    def _require_numbers(self, values: ValueRange) -> None:
        _require(
            self.datatype not in ("BOOL", "BYTES"),
            f"tensor {self.name!r} is of {self.datatype} and has no range of values; leave its values out",
        )
        every = _whole_numbers(self.datatype)
        _require(
            every is None
            or (
                all(float(limit).is_integer() for limit in (values.least, values.most))
                and every.outside(values.least, values.most) is None
            ),
            f"values of tensor {self.name!r} must be whole numbers in {every}, those of {self.datatype}, not {values}",
        )
        _require(
            self.default is None or values.outside(self.default, self.default) is None,
            f"default of tensor {self.name!r} must lie within its values {values}, not be {self.default}",
        )

    def _default_axis(self, position: int) -> str:
        if self.shape[position] != FREE:
            return ""
        return BATCH if position == 0 else f"{self.name}_{position}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Axis:
    """The sizes that a free axis may have: from ``least`` to ``most``, in steps of ``multiple``."""

    name: str
    least: int = 1
    most: int
    multiple: int = 1

    def __post_init__(self) -> None:
        _require(self.multiple >= 1, f"multiple of axis {self.name!r} must be at least 1, not {self.multiple}")
        _require(
            1 <= self.least <= self.most,
            f"axis {self.name!r} must have limits 1 <= least <= most, not {self.least}..{self.most}",
        )
        _require(
            self.smallest <= self.largest,
            f"axis {self.name!r} has no size in {self.least}..{self.most} that is a multiple of {self.multiple}",
        )

    @property
    def smallest(self) -> int:
        """The least size that is allowed."""
        return -(-self.least // self.multiple) * self.multiple

    @property
    def largest(self) -> int:
        """The largest size that is allowed."""
        return self.most // self.multiple * self.multiple

    def at_least(self, size: int) -> int:
        """Return the smallest allowed size from ``size`` on; it may be beyond the largest one."""
        return max(self.smallest, -(-size // self.multiple) * self.multiple)

    def problem(self, size: int) -> str | None:
        """Return what is wrong with a size; None if nothing is."""
        if self.least <= size <= self.most and size % self.multiple == 0:
            return None
        steps = f" and a multiple of {self.multiple}" if self.multiple > 1 else ""
        return f"must lie in {self.least}..{self.most}{steps}, not {size}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Contract:
    """What a model takes and gives.

    Attributes:
        inputs, outputs: the tensors, in the model's order.
        axes: the free axes of the inputs, in order of first appearance.
    """

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    axes: tuple[Axis, ...] = ()

    def __post_init__(self) -> None:
        _require(bool(self.inputs), "a model must have an input")
        _require(bool(self.outputs), "a model must have an output")
        for tensors in (self.inputs, self.outputs):
            names = [spec.name for spec in tensors]
            _require(len(set(names)) == len(names), f"the names of tensors must differ: {', '.join(names)}")
        free = {axis for spec in self.inputs for axis in spec.axes if axis}
        limited = {axis.name for axis in self.axes}
        _require(free == limited, f"the free axes are {sorted(free)}, but there are limits for {sorted(limited)}")

    @property
    def batch(self) -> Axis | None:
        """The axis ``batch``; None if the model has none."""
        return next((axis for axis in self.axes if axis.name == BATCH), None)

    @property
    def is_stackable(self) -> bool:
        """Whether inputs of several requests can be stacked along ``batch``, and the outputs taken apart again."""
        tensors = (*self.inputs, *self.outputs)
        limited = {axis.name for axis in self.axes}
        # An axis that only outputs have may be of another size for each request.
        return all(BATCH in spec.axes and set(filter(None, spec.axes)) <= limited for spec in tensors)

    def input(self, name: str) -> TensorSpec | None:
        """Return the input of that name."""
        return next((spec for spec in self.inputs if spec.name == name), None)

    def sizes(self, shapes: Mapping[str, Sequence[int]]) -> tuple[int, ...]:
        """Return the size of each free axis, in the order of ``axes``, for inputs of these shapes, by name.

        An axis that only inputs that were left out have gets its least size.

        Raises:
            InvalidRequest: a shape is not one that the model takes.
        """
        sizes: dict[str, int] = {}
        for spec in self.inputs:
            shape = shapes.get(spec.name)
            if shape is None:
                continue
            if len(shape) != len(spec.shape) or any(
                size not in (given, FREE) for size, given in zip(spec.shape, shape, strict=True)
            ):
                raise InvalidRequest(
                    f"input {spec.name!r} takes shape {list(spec.shape)} (-1 is free), not {list(shape)}"
                )
            for name, given in zip(spec.axes, shape, strict=True):
                if name and sizes.setdefault(name, given) != given:
                    raise InvalidRequest(
                        f"axis {name!r} of input {spec.name!r} must be {sizes[name]} as in other inputs, not {given}"
                    )
        for axis in self.axes:
            problem = axis.problem(sizes.setdefault(axis.name, axis.smallest))
            if problem is not None:
                owner = next(spec for spec in self.inputs if axis.name in spec.axes)
                raise InvalidRequest(f"axis {axis.name!r} of input {owner.name!r} {problem}")
        return tuple(sizes[axis.name] for axis in self.axes)

    def shape(self, spec: TensorSpec, sizes: Sequence[int]) -> tuple[int, ...]:
        """Return the shape of an input where the free axes have these sizes, in the order of ``axes``."""
        by_name = {axis.name: size for axis, size in zip(self.axes, sizes, strict=True)}
        return tuple(by_name[axis] if axis else size for size, axis in zip(spec.shape, spec.axes, strict=True))

    def elements(self, sizes: Sequence[int]) -> int:
        """Return the elements of all inputs where the free axes have these sizes, in the order of ``axes``."""
        return sum(math.prod(self.shape(spec, sizes)) for spec in self.inputs)


@dataclass(frozen=True, slots=True, kw_only=True)
class SizeCost:
    """What one execution takes where the free axes have these ``sizes``, in the order of ``Contract.axes``."""

    sizes: tuple[int, ...]
    workspace_bytes: int
    exec_s: float


def non_decreasing(costs: Sequence[SizeCost]) -> tuple[SizeCost, ...]:
    """Return the costs such that none is below one at sizes that are nowhere larger: measurements have noise."""

    def raised(cost: SizeCost) -> SizeCost:
        below = [other for other in costs if _covers(cost.sizes, other.sizes)]
        return SizeCost(
            sizes=cost.sizes,
            workspace_bytes=max(other.workspace_bytes for other in below),
            exec_s=max(other.exec_s for other in below),
        )

    return tuple(raised(cost) for cost in costs)


def cost_at(costs: Sequence[SizeCost], sizes: Sequence[int]) -> SizeCost:
    """Return the cost at ``sizes``, bounded from above by measurements at others.

    Workspace and time grow with every axis. So what is measured at sizes that are nowhere less bounds them: the least
    such workspace, and the shortest such time. Sizes beyond every measurement cost as much as the most expensive one.
    """
    above = [cost for cost in costs if _covers(cost.sizes, sizes)]
    if not above:
        return SizeCost(
            sizes=tuple(sizes),
            workspace_bytes=max(cost.workspace_bytes for cost in costs),
            exec_s=max(cost.exec_s for cost in costs),
        )
    return SizeCost(
        sizes=tuple(sizes),
        workspace_bytes=min(cost.workspace_bytes for cost in above),
        exec_s=min(cost.exec_s for cost in above),
    )


def expected_exec_s(contract: Contract, costs: Sequence[SizeCost], sizes: Sequence[int]) -> float:
    """Return the seconds that an execution at ``sizes`` probably takes: measured, or between measurements.

    Between what is measured at sizes that are nowhere larger and at sizes that are nowhere less, time grows with the
    elements of the inputs; and so it does beyond every measurement.
    """
    below = [cost for cost in costs if _covers(sizes, cost.sizes)]
    above = [cost for cost in costs if _covers(cost.sizes, sizes)]
    low = max(below, key=lambda cost: cost.exec_s, default=costs[0])
    elements, low_elements = contract.elements(sizes), max(1, contract.elements(low.sizes))
    if not above:
        return low.exec_s * max(1.0, elements / low_elements)
    high = min(above, key=lambda cost: cost.exec_s)
    if high.exec_s <= low.exec_s:
        return high.exec_s
    share = (elements - low_elements) / max(1, contract.elements(high.sizes) - low_elements)
    return low.exec_s + (high.exec_s - low.exec_s) * min(1.0, max(0.0, share))


def _covers(sizes: Sequence[int], others: Sequence[int]) -> bool:
    """Return whether sizes are nowhere less than others."""
    return all(size >= other for size, other in zip(sizes, others, strict=True))
