"""Publish an ONNX graph: optimize it for this machine, compare its answers, measure it, and commit the manifest."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from serve_app.core.catalog import ModelEntry, task_for
from serve_app.core.contract import BATCH, FREE, Contract, TensorSpec
from serve_app.core.contract_declaration import complete_contract
from serve_app.core.task import TaskSpec
from serve_app.errors import StoreError
from serve_app.models.profiling.measure import grid
from serve_app.models.profiling.measure_published import measure_published
from serve_app.models.publishing.described import OnStage, describe, with_measurement
from serve_app.models.publishing.task_files import with_task
from serve_app.models.readahead import ReadAhead
from serve_app.models.runtimes import onnx_runtime
from serve_app.models.runtimes.base import LoadedModel
from serve_app.store.manifest import BlobFile, ExecutionFormat, Manifest
from serve_app.store.model_store import ModelStore
from serve_app.tasks.tensors import probe

#: Largest difference between the answers of the optimized and of the original graph, in parts of the largest number.
TOLERANCE: Final = 1e-4

#: Initializers below this size stay within the graph.
_EXTERNAL_BYTES: Final = 1024

#: Stands in the graph for the name of the blob of weights, which is known only once they are written. As long as that
#: name, so that the bytes of a graph can be exchanged.
_PLACEHOLDER: Final = f"{'0' * 64}.weights"

#: Names of an axis that mean a batch, whatever a model calls it. ``n`` may be anything: it means one where it is the
#: first axis of an input, and no input has an axis of these names.
_BATCH_NAMES: Final = ("batch", "batch_size", "bs")

_DATATYPES: Final = {
    "bool": "BOOL", "uint8": "UINT8", "uint16": "UINT16", "uint32": "UINT32", "uint64": "UINT64",
    "int8": "INT8", "int16": "INT16", "int32": "INT32", "int64": "INT64",
    "float16": "FP16", "float": "FP32", "double": "FP64", "string": "BYTES",
}  # fmt: skip


def publish_graph(store: ModelStore, entry: ModelEntry, path: Path, on_stage: OnStage) -> None:
    """Publish one ONNX file; the caller holds ``store.exclusive``.

    Args:
        store: where to.
        entry: what the catalog asks for.
        path: of the file; external data lie beside it.
        on_stage: called with every stage, and the bytes of the weights.

    Raises:
        StoreError: the file is not a graph that can be run, or the entry does not complete what the file says.
    """
    original = _open(entry, path)
    contract = _contract(entry, original)
    task = task_for(entry, TaskSpec())
    trials = _trials(entry, contract, original)
    on_stage("writing", path.stat().st_size)
    files = _write(store, path)
    weights_bytes = sum(file.size_bytes for file in files)
    on_stage("verifying", weights_bytes)
    model = describe(
        entry, weights=entry.weights, runtime="onnxruntime", contract=contract, task=task, row_by_row=False,
        weights_bytes=weights_bytes, accuracy=entry.accuracy,
    )  # fmt: skip
    execution = ExecutionFormat(runtime="onnxruntime", made_for=onnx_runtime.environment())
    manifest = Manifest(model=model, default_task=task, execution=execution, tensors=(), files=files)
    answers = dict(zip((spec.name for spec in contract.outputs), trials[-1][1], strict=True))
    manifest = with_task(store, entry, manifest, answers)
    model = manifest.model
    prepared = onnx_runtime.OnnxRuntime().prepare(manifest, store)

    def load() -> LoadedModel:
        return prepared.load(ReadAhead, None)

    _verify(entry, load, trials)
    on_stage("measuring", weights_bytes)
    measurement = measure_published(manifest, store, grid(contract.axes))
    size_bytes = max(measurement.resident_bytes, weights_bytes)
    store.commit(dataclasses.replace(manifest, model=with_measurement(model, measurement, size_bytes)))
    on_stage("published", size_bytes)


def _open(entry: ModelEntry, path: Path) -> Any:
    ort = onnx_runtime.library()
    if not path.is_file():
        raise StoreError(f"{entry.builder}: there is no file {path}; name an ONNX file")
    try:
        return ort.InferenceSession(str(path), onnx_runtime.session_options(), providers=["CPUExecutionProvider"])
    except Exception as error:
        reason = " ".join(str(error).split())[:300]
        raise StoreError(f"{entry.builder}: onnxruntime cannot open it ({reason}); name an ONNX file") from error


def _contract(entry: ModelEntry, session: Any) -> Contract:
    """Read the contract from the graph, and complete it by the entry."""
    try:
        batch_names = _batch_names(session.get_inputs())
        inputs = tuple(_spec(argument, "input", batch_names) for argument in session.get_inputs())
        wanted = {each.name for each in entry.outputs}
        outputs = tuple(
            _spec(argument, "output", batch_names)
            for argument in session.get_outputs() if not wanted or argument.name in wanted
        )
        return complete_contract(inputs, outputs, entry.inputs, entry.outputs, entry.limits)
    except ValueError as error:
        raise StoreError(f"{entry.builder}: {error}") from error


def _batch_names(arguments: Sequence[Any]) -> tuple[str, ...]:
    """Return which names of axes, in lower case, mean a batch in a graph with these inputs."""
    axes = [size.lower() for argument in arguments for size in argument.shape if isinstance(size, str)]
    first = [str(argument.shape[0]).lower() for argument in arguments if argument.shape]
    is_n = "n" in first and not any(axis in _BATCH_NAMES for axis in axes)
    return (*_BATCH_NAMES, "n") if is_n else _BATCH_NAMES


def _spec(argument: Any, kind: str, batch_names: Sequence[str]) -> TensorSpec:
    if not argument.type.startswith("tensor("):
        raise ValueError(
            f"{kind} {argument.name!r} is a {argument.type}, not a tensor; convert the model without it "
            "(scikit-learn: options={'zipmap': False}), or name the outputs that you want"
        )
    datatype = _DATATYPES.get(argument.type.removeprefix("tensor(").removesuffix(")"))
    if datatype is None:
        raise ValueError(f"{kind} {argument.name!r} is a {argument.type}, for which the protocol has no datatype")
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


def _trials(
    entry: ModelEntry, contract: Contract, session: Any
) -> Sequence[tuple[Mapping[str, NDArray[Any]], Sequence[NDArray[Any]]]]:
    """Run the original at the least and at larger sizes; return the inputs and its answers."""
    trials = []
    names = [spec.name for spec in contract.outputs]
    sizes = grid(contract.axes)
    for each in dict.fromkeys((sizes[0], sizes[len(sizes) // 2])):
        inputs = probe(contract, each)
        try:
            feeds = {name: onnx_runtime.feed(array, array.dtype, name) for name, array in inputs.items()}
            answers = session.run(names, feeds)
        except Exception as error:
            reason = " ".join(str(error).split())[:300]
            shapes = ", ".join(f"{name} {list(array.shape)}" for name, array in inputs.items())
            raise StoreError(f"{entry.builder} fails on inputs {shapes} ({reason}); correct its limits") from error
        trials.append((inputs, [np.array(answer) for answer in answers]))
    return trials


def _write(store: ModelStore, path: Path) -> tuple[BlobFile, ...]:
    """Write the optimized graph and its weights, packed for this processor, as blobs."""
    ort = onnx_runtime.library()
    with tempfile.TemporaryDirectory() as folder:
        optimized = Path(folder) / "graph.onnx"
        options = onnx_runtime.session_options()
        options.optimized_model_filepath = str(optimized)
        for key, value in (
            ("session.optimized_model_external_initializers_file_name", _PLACEHOLDER),
            ("session.optimized_model_external_initializers_min_size_in_bytes", str(_EXTERNAL_BYTES)),
            ("session.save_external_prepacked_constant_initializers", "1"),
        ):
            options.add_session_config_entry(key, value)
        ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        graph = optimized.read_bytes()
        weights = optimized.with_name(_PLACEHOLDER)
        files = []
        if weights.is_file() and weights.stat().st_size:
            blob = store.put_blob(lambda place: _copy(weights, place), ending="weights")
            graph = graph.replace(_PLACEHOLDER.encode(), blob.name.encode())
            files.append(blob)
        files.append(store.put_blob(lambda place: _write_bytes(place, graph), role="graph", ending="onnx"))
    return tuple(files)


def _copy(source: Path, target: Path) -> None:
    target.write_bytes(source.read_bytes())


def _write_bytes(target: Path, content: bytes) -> None:
    target.write_bytes(content)


def _verify(
    entry: ModelEntry, load: Any, trials: Sequence[tuple[Mapping[str, NDArray[Any]], Sequence[NDArray[Any]]]]
) -> None:
    model = load()
    try:
        for inputs, expected in trials:
            for (name, answer), original in zip(model.run(inputs).items(), expected, strict=True):
                if not _agree(answer, original):
                    raise StoreError(f"{entry.builder}: optimized, its output {name!r} is another one than before")
    finally:
        model.unload()


def _agree(actual: NDArray[Any], expected: NDArray[Any]) -> bool:
    if expected.dtype.kind != "f":
        return bool(np.array_equal(actual, expected))
    largest = float(np.max(np.abs(expected), initial=0.0))
    return bool(np.allclose(actual, expected, rtol=0, atol=TOLERANCE * max(largest, 1e-30), equal_nan=True))
