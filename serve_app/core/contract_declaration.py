"""How a contract comes about: what a model says of its tensors, completed by what its catalog entry declares."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from serve_app.core.contract import BATCH, DATATYPES, FREE, Axis, Contract, TensorSpec, ValueRange

#: The batch axis of a model that names no limit for it.
DEFAULT_BATCH = Axis(name=BATCH, most=32)


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorDeclaration:
    """One tensor as a catalog entry declares it; what is None is left to the model itself.

    ``shape`` has numbers, -1 or names of free axes.
    """

    name: str
    datatype: str | None = None
    shape: tuple[int | str, ...] | None = None
    default: float | None = None
    returned_by: str | None = None
    values: ValueRange | None = None

    def __post_init__(self) -> None:
        if self.datatype is not None and self.datatype not in DATATYPES:
            raise ValueError(
                f"datatype of tensor {self.name!r} must be one of {', '.join(DATATYPES)}, not {self.datatype!r}"
            )
        for size in self.shape or ():
            if isinstance(size, int) and size != FREE and size < 1:
                raise ValueError(f"shape of tensor {self.name!r} must hold positive numbers, -1 or names, not {size}")


def complete_contract(
    inputs: Sequence[TensorSpec],
    outputs: Sequence[TensorSpec],
    declared_inputs: Sequence[TensorDeclaration],
    declared_outputs: Sequence[TensorDeclaration],
    limits: Sequence[Axis],
) -> Contract:
    """Return the contract of a model.

    Args:
        inputs, outputs: what the model says; empty if it says nothing, and everything must be declared.
        declared_inputs, declared_outputs, limits: the catalog entry's.

    Raises:
        ValueError: what is declared contradicts the model, is incomplete, or a free axis has no limit.
    """
    all_inputs = _merge(inputs, declared_inputs, "input")
    all_outputs = _merge(outputs, declared_outputs, "output")
    given = {axis.name: axis for axis in limits}
    free = _free_axes(all_inputs)
    missing = [name for name in free if name not in given and name != BATCH]
    if missing:
        cure = ", ".join(f"{name}: LARGEST" for name in missing)
        raise ValueError(
            f"axis {missing[0]!r} of input {free[missing[0]]!r} is free and has no limit, which its memory depends on; "
            f"add limits: {{{cure}}}"
        )
    axes = [given.pop(name, DEFAULT_BATCH) for name in free]
    if given:
        known = ", ".join(axis.name for axis in axes) or "none"
        raise ValueError(f"limits name the axis {next(iter(given))!r}, which no input has; the free axes are {known}")
    returned = {spec.name for spec in all_outputs}
    for spec in all_inputs:
        if spec.returned_by is not None and spec.returned_by not in returned:
            raise ValueError(f"input {spec.name!r} is returned by {spec.returned_by!r}, which is no output")
    return Contract(inputs=all_inputs, outputs=all_outputs, axes=tuple(axes))


def _merge(said: Sequence[TensorSpec], declared: Sequence[TensorDeclaration], kind: str) -> tuple[TensorSpec, ...]:
    """Return what the model says, changed by what is declared; where it says nothing, what is declared."""
    if not said:
        return tuple(_spec(each, None, kind) for each in declared)
    by_name = {each.name: each for each in declared}
    merged = [_spec(by_name.pop(spec.name, None), spec, kind) for spec in said]
    if by_name:
        names = ", ".join(spec.name for spec in said)
        raise ValueError(f"the model has no {kind} {next(iter(by_name))!r}; it has {names}")
    return tuple(merged)


def _spec(declared: TensorDeclaration | None, said: TensorSpec | None, kind: str) -> TensorSpec:
    if declared is None:
        assert said is not None
        return said
    if declared.values is not None and kind != "input":
        raise ValueError(f"{kind} {declared.name!r} has values, which only inputs may have; leave them out")
    if said is None:
        if declared.datatype is None or declared.shape is None:
            raise ValueError(f"{kind} {declared.name!r} needs a datatype and a shape, which the model does not say")
        spec = _with_shape(declared.name, declared.datatype, declared.shape)
    else:
        if declared.datatype not in (None, said.datatype):
            raise ValueError(f"{kind} {said.name!r} is {said.datatype} in the model, not {declared.datatype}")
        spec = said
        if declared.shape is not None:
            spec = _with_shape(said.name, said.datatype, declared.shape)
            if len(spec.shape) != len(said.shape) or any(
                FREE not in (here, there) and here != there for here, there in zip(spec.shape, said.shape, strict=True)
            ):
                raise ValueError(
                    f"{kind} {said.name!r} has shape {list(said.shape)} in the model, not {list(spec.shape)}"
                )
    return replace(spec, default=declared.default, returned_by=declared.returned_by, values=declared.values)


def _with_shape(name: str, datatype: str, shape: tuple[int | str, ...]) -> TensorSpec:
    """Return a tensor; an axis that is -1 gets its default name."""
    sizes = tuple(FREE if isinstance(size, str) else size for size in shape)
    default = TensorSpec(name=name, datatype=datatype, shape=sizes)
    axes = tuple(given if isinstance(given, str) else axis for given, axis in zip(shape, default.axes, strict=True))
    return replace(default, axes=axes)


def _free_axes(inputs: Iterable[TensorSpec]) -> dict[str, str]:
    """Return the free axes in order of first appearance, each with the input that has it first."""
    owners: dict[str, str] = {}
    for spec in inputs:
        for axis in spec.axes:
            if axis:
                owners.setdefault(axis, spec.name)
    return owners
