"""The contract of an ONNX graph: read from the graph, completed by the catalog, checked by running it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from serve_app.core.catalog import ModelEntry
from serve_app.core.contract import BATCH, FREE, Contract, TensorSpec
from serve_app.core.contract_declaration import complete_contract
from serve_app.errors import StoreError
from serve_app.models.profiling.grid import trial_sizes
from serve_app.models.runtimes import onnx_runtime
from serve_app.models.runtimes.session import reason_of
from serve_app.tasks.tensors import NUMPY_TYPES, probe

#: Names of an axis that mean a batch, whatever a model calls it. ``n`` may be anything: it means one where it is the
#: first axis of an input, and no input has an axis of these names.
_BATCH_NAMES: Final = ("batch", "batch_size", "batchsize", "bs")

_DATATYPES: Final = {
    "bool": "BOOL", "uint8": "UINT8", "uint16": "UINT16", "uint32": "UINT32", "uint64": "UINT64",
    "int8": "INT8", "int16": "INT16", "int32": "INT32", "int64": "INT64",
    "float16": "FP16", "float": "FP32", "double": "FP64", "string": "BYTES",
}  # fmt: skip


#: The largest table that ``highest_numbers`` looks for has so many bits.
_TABLE_BITS: Final = 17


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """One input to compare answers on, and what the graph answers as it came, in the order of the outputs."""

    inputs: Mapping[str, NDArray[Any]]
    answers: Sequence[NDArray[Any]]


def open_graph(entry: ModelEntry, path: Path) -> Any:
    """Open an ONNX file as it came; external data lie beside it.

    Raises:
        StoreError: there is no such file, or it is not a graph that onnxruntime can run.
    """
    if not path.is_file():
        raise StoreError(f"{entry.builder}: there is no file {path}; name an ONNX file")
    try:
        return onnx_runtime.library().InferenceSession(
            str(path), onnx_runtime.session_options(), providers=onnx_runtime.PROVIDERS
        )
    except Exception as error:
        raise StoreError(
            f"{entry.builder}: onnxruntime cannot open it ({reason_of(error)}); name an ONNX file, with its external "
            "data beside it"
        ) from error


def read_contract(entry: ModelEntry, session: Any) -> Contract:
    """Read the contract from a graph, and complete it by the entry; outputs may still differ from what it gives.

    Raises:
        StoreError: a tensor is of no type that the protocol has, or the entry contradicts or lacks something.
    """
    try:
        batch_names = _batch_names(session.get_inputs())
        inputs = tuple(_spec(argument, "input", batch_names) for argument in session.get_inputs())
        wanted = {each.name for each in entry.outputs}
        outputs = tuple(
            _spec(argument, "output", batch_names)
            for argument in session.get_outputs()
            if not wanted or argument.name in wanted
        )
        return complete_contract(inputs, outputs, entry.inputs, entry.outputs, entry.limits)
    except ValueError as error:
        raise StoreError(f"{entry.builder}: {error}") from error


def highest_numbers(contract: Contract, session: Any) -> dict[str, int]:
    """Find how large the numbers may be in inputs of tables of whole numbers, such as the tokens of a text.

    A table of embeddings refuses what it does not have. Numbers from the whole table make trial runs like real ones, in
    their answers as in the memory that they touch.
    """
    names = [spec.name for spec in contract.outputs]
    least = tuple(axis.smallest for axis in contract.axes)
    highest: dict[str, int] = {}
    for spec in contract.inputs:
        kind = NUMPY_TYPES[spec.datatype].kind
        if kind not in "iu" or len(spec.shape) < 2 or spec.default is not None or spec.values is not None:
            continue
        inputs = probe(contract, least)

        def takes(number: int, name: str = spec.name, inputs: dict[str, NDArray[Any]] = inputs) -> bool:
            given = {**inputs, name: np.full_like(inputs[name], number)}
            try:
                session.run(names, {each: _with_texts(array) for each, array in given.items()})
            except Exception:
                # Libraries raise what they like.
                return False
            return True

        most = np.iinfo(NUMPY_TYPES[spec.datatype]).max
        known = next(
            (2**bits - 1 for bits in range(_TABLE_BITS, 1, -1) if 2**bits - 1 <= most and takes(2**bits - 1)), 0
        )
        if known:
            highest[spec.name] = known if known == 2**_TABLE_BITS - 1 else _last(takes, known, min(2 * known, most))
    return highest


def _last(takes: Callable[[int], bool], known: int, most: int) -> int:
    """Return the last number up to ``most`` that is taken; ``known`` is, and what follows one that is not is not."""
    while known < most:
        middle = (known + most + 1) // 2
        known, most = (middle, most) if takes(middle) else (known, middle - 1)
    return known


def run_trials(
    entry: ModelEntry, contract: Contract, session: Any, highest: Mapping[str, int]
) -> tuple[Contract, tuple[Trial, ...]]:
    """Run a graph at two sizes of every free axis; return the contract with its outputs as they came, and the runs.

    ``highest`` are the largest numbers of inputs, see ``highest_numbers``.

    Raises:
        StoreError: it fails.
    """
    names = [spec.name for spec in contract.outputs]
    trials = []
    all_sizes = trial_sizes(contract.axes)
    for sizes in all_sizes:
        inputs = probe(contract, sizes, highest=highest)
        try:
            answers = session.run(names, {name: _with_texts(array) for name, array in inputs.items()})
        except Exception as error:
            shapes = ", ".join(f"{name} {list(array.shape)}" for name, array in inputs.items())
            raise StoreError(
                f"{entry.builder} fails on inputs {shapes} ({reason_of(error)}); correct its limits, "
                "or the values of its inputs"
            ) from error
        trials.append(Trial(inputs=inputs, answers=[np.array(answer) for answer in answers]))
    by_axis = {axis.name: tuple(sizes[at] for sizes in all_sizes) for at, axis in enumerate(contract.axes)}
    outputs = tuple(
        _as_seen(spec, [trial.answers[position].shape for trial in trials], by_axis)
        for position, spec in enumerate(contract.outputs)
    )
    return dataclasses.replace(contract, outputs=outputs), tuple(trials)


def _with_texts(array: NDArray[Any]) -> NDArray[Any]:
    """Return an array of Python ``bytes`` as one of ``str``, which onnxruntime takes."""
    return np.vectorize(bytes.decode, otypes=[object])(array) if array.dtype.hasobject else array


def _batch_names(arguments: Sequence[Any]) -> tuple[str, ...]:
    """Return which names of axes, in lower case, mean a batch in a graph with these inputs."""
    axes = {size.lower() for argument in arguments for size in argument.shape if isinstance(size, str)}
    first = {str(argument.shape[0]).lower() for argument in arguments if argument.shape}
    return (*_BATCH_NAMES, "n") if "n" in first and axes.isdisjoint(_BATCH_NAMES) else _BATCH_NAMES


def _spec(argument: Any, kind: str, batch_names: Sequence[str]) -> TensorSpec:
    if not argument.type.startswith("tensor("):
        raise ValueError(
            f"{kind} {argument.name!r} is a {argument.type}, not a tensor; convert the model without it "
            "(scikit-learn: options={'zipmap': False}), or name the outputs that you want"
        )
    datatype = _DATATYPES.get(argument.type.removeprefix("tensor(").removesuffix(")"))
    if datatype is None:
        raise ValueError(
            f"{kind} {argument.name!r} is a {argument.type}, which numpy has no type for; "
            "convert the model with float32 or float16 there"
        )
    shape = tuple(size if isinstance(size, int) and size > 0 else FREE for size in argument.shape)
    axes = tuple(
        _axis_name(size, position, argument.name, batch_names) if free == FREE else ""
        for position, (size, free) in enumerate(zip(argument.shape, shape, strict=True))
    )
    return TensorSpec(name=argument.name, datatype=datatype, shape=shape, axes=axes)


def _axis_name(given: object, position: int, tensor: str, batch_names: Sequence[str]) -> str:
    """Return the model's name of an axis where it has a plain one; the first axis of a tensor is a batch otherwise."""
    if isinstance(given, str) and given.lower() in batch_names:
        return BATCH
    if isinstance(given, str) and given.isidentifier() and not given.startswith("unk__"):
        return given
    return BATCH if position == 0 else f"{tensor}_{position}"


def _as_seen(spec: TensorSpec, shapes: Sequence[tuple[int, ...]], by_axis: Mapping[str, tuple[int, ...]]) -> TensorSpec:
    """Return an output whose shape agrees with those seen: graphs may leave it out, or say it wrongly.

    ``by_axis`` has the sizes of the free axes of the inputs in the runs that have shown the shapes.
    """
    if any(len(shape) != len(shapes[0]) for shape in shapes):
        raise StoreError(f"output {spec.name!r} has more axes for some inputs than for others; leave it out of outputs")
    if len(spec.shape) != len(shapes[0]):
        spec = TensorSpec(name=spec.name, datatype=spec.datatype, shape=shapes[0])
    shape, axes = list(spec.shape), list(spec.axes)
    for position, said in enumerate(spec.shape):
        seen = tuple(each[position] for each in shapes)
        if said != FREE and set(seen) != {said}:
            shape[position] = FREE
            axes[position] = next((axis for axis, sizes in by_axis.items() if sizes == seen), f"{spec.name}_{position}")
    return dataclasses.replace(spec, shape=tuple(shape), axes=tuple(axes))
