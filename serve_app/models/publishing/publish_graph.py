"""Publish an ONNX graph: write it for its runtime, compare its answers, and measure it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

from serve_app.core.catalog import ModelEntry, runtime_of, task_for
from serve_app.core.precision import Dtype
from serve_app.core.task import TaskSpec
from serve_app.errors import EdgeServeError, StoreError
from serve_app.models.agreement import agree
from serve_app.models.profiling.grid import grid
from serve_app.models.profiling.measure_published import measure_published
from serve_app.models.publishing.described import OnStage, describe, runs_row_by_row, with_measurement
from serve_app.models.publishing.graph_contract import Trial, highest_numbers, open_graph, read_contract, run_trials
from serve_app.models.publishing.graph_files import WRITERS
from serve_app.models.publishing.task_files import with_task
from serve_app.models.readahead import ReadAhead
from serve_app.models.runtimes.registry import RUNTIMES, prepare
from serve_app.models.threads import one_thread
from serve_app.store.manifest import ExecutionFormat, Manifest
from serve_app.store.model_store import ModelStore

#: Largest difference between the answers of the written and of the original graph, in parts of the largest number, by
#: what the written one computes in.
TOLERANCE: Final[Mapping[Dtype, float]] = {"float32": 1e-4, "bfloat16": 0.05}


def publish_graph(store: ModelStore, entry: ModelEntry, path: Path, on_stage: OnStage) -> Manifest:
    """Write one ONNX file, and return its manifest, which is to be committed; the caller holds ``store.exclusive``.

    Args:
        store: where to.
        entry: what the catalog asks for.
        path: of the file; external data lie beside it.
        on_stage: called with every stage, and the bytes of the weights.

    Raises:
        StoreError: the file is not a graph that can be run, or the entry does not complete what the file says.
    """
    runtime = runtime_of(entry)
    writer = WRITERS.get(runtime)
    if writer is None:
        raise StoreError(f"{entry.builder}: {runtime} cannot run ONNX graphs; name one of {', '.join(WRITERS)}")
    made_for = RUNTIMES[runtime].environment()
    with one_thread():
        original = open_graph(entry, path)
        highest = highest_numbers(contract := read_contract(entry, original), original)
        contract, trials = run_trials(entry, contract, original, highest)
        del original
        task = task_for(entry, TaskSpec())
        on_stage("writing", path.stat().st_size)
        files = writer(store, entry, path, contract)
        weights_bytes = sum(file.size_bytes for file in files)
        on_stage("verifying", weights_bytes)
        row_by_row = runs_row_by_row(contract)
        model = describe(
            entry, weights=entry.weights, runtime=runtime, contract=contract, task=task, row_by_row=row_by_row,
            weights_bytes=weights_bytes, accuracy=entry.accuracy,
        )  # fmt: skip
        execution = ExecutionFormat(runtime=runtime, made_for=made_for)
        manifest = Manifest(model=model, default_task=task, execution=execution, tensors=(), files=files)
        answers = dict(zip((spec.name for spec in contract.outputs), trials[-1].answers, strict=True))
        manifest = with_task(store, entry, manifest, answers)
        _verify(entry, manifest, store, trials, highest)
    on_stage("measuring", weights_bytes)
    sizes = grid(contract.axes)
    measurement = measure_published(manifest, store, sizes[:1] if row_by_row else sizes, highest)
    size_bytes = measurement.resident_bytes
    return dataclasses.replace(manifest, model=with_measurement(manifest.model, measurement, size_bytes))


def _verify(
    entry: ModelEntry, manifest: Manifest, store: ModelStore, trials: Sequence[Trial], highest: Mapping[str, int]
) -> None:
    """Compare the answers of the model, as workers will run it, with those of the original graph."""
    cures = ["try another runtime"]
    if entry.dtype != "float32":
        cures.append("leave dtype out")
    if highest:
        # Numbers that mean nothing to a model may have any answer.
        name, most = next(iter(highest.items()))
        cures.append(f"declare the values of its inputs if {name!r} takes less than 0..{most}")
    model = prepare(manifest, store).load(ReadAhead, None)
    try:
        for trial in trials:
            for (name, answer), original in zip(model.run(trial.inputs).items(), trial.answers, strict=True):
                if not agree(answer, original, TOLERANCE[entry.dtype]):
                    raise StoreError(
                        f"{entry.builder}: as written for {runtime_of(entry)}, its output {name!r} is another one than "
                        f"before; {', or '.join(cures)}"
                    )
    except StoreError:
        raise
    except EdgeServeError as error:
        raise StoreError(f"{entry.builder}: as written for {runtime_of(entry)} it does not run: {error}") from error
    finally:
        model.unload()
