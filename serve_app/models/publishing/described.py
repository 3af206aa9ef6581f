"""What every publisher writes of a model, whatever runs it."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from typing import Literal

from serve_app.core.catalog import ModelEntry, ModelProfile, PublishedModel, RuntimeName
from serve_app.core.contract import BATCH, Contract
from serve_app.core.task import TaskSpec
from serve_app.errors import StoreError
from serve_app.models.profiling.measure import Measurement

logger = logging.getLogger(__name__)

#: Of a model until all of it is written.
ModuleStage = Literal["writing", "verifying", "measuring"]

#: Called with every stage, and the bytes of the weights.
OnStage = Callable[[ModuleStage, int], None]


def describe(
    entry: ModelEntry,
    *,
    weights: str,
    runtime: RuntimeName,
    contract: Contract,
    task: TaskSpec,
    row_by_row: bool,
    weights_bytes: int,
    accuracy: float | None,
) -> PublishedModel:
    """Describe a model as far as it is known before it is measured."""
    return PublishedModel(
        model_id=entry.model_id,
        fingerprint=entry.fingerprint,
        builder=entry.builder,
        family=entry.family,
        weights_requested=entry.weights,
        weights_actual=weights,
        dtype=entry.dtype,
        pinned=entry.pinned,
        runtime=runtime,
        contract=contract,
        task=task,
        row_by_row=row_by_row,
        weights_bytes=weights_bytes,
        workspace_bytes=0,
        profile=ModelProfile(
            model_id=entry.model_id, size_bytes=max(1, weights_bytes), load_s=0, exec_s=0, accuracy=accuracy
        ),
    )


def with_measurement(model: PublishedModel, measurement: Measurement, size_bytes: int) -> PublishedModel:
    """Add what was measured; ``size_bytes`` is what the model takes in memory.

    Raises:
        StoreError: its contract allows sizes that could not be measured.
    """
    profile = replace(
        model.profile, size_bytes=max(1, size_bytes), load_s=measurement.load_s, exec_s=measurement.exec_s
    )
    return replace(
        model,
        contract=limit_to_measured(model.builder, model.contract, measurement),
        weights_bytes=size_bytes,
        workspace_bytes=measurement.workspace_bytes,
        costs=() if model.row_by_row else measurement.costs,
        joined_elements=measurement.joined_elements,
        prepared_bytes=measurement.prepared_bytes,
        # Tensors of torch are mapped; what is seen besides is the heap's.
        private_bytes=0 if model.runtime == "torch" else min(measurement.private_bytes, size_bytes),
        profile=profile,
    )


def limit_to_measured(builder: str, contract: Contract, measurement: Measurement) -> Contract:
    """Return a contract that allows only sizes whose costs are bounded by measured ones: smaller batches, if need be.

    Raises:
        StoreError: sizes of other axes than the batch were skipped.
    """
    if not measurement.skipped:
        return contract
    names = [axis.name for axis in contract.axes]
    if BATCH in names:
        at = names.index(BATCH)
        others = tuple(axis.largest for axis in contract.axes if axis.name != BATCH)
        bounded = {cost.sizes[at] for cost in measurement.costs if (*cost.sizes[:at], *cost.sizes[at + 1 :]) == others}
        allowed = [batch for batch in bounded if all(each.sizes[at] > batch for each in measurement.skipped)]
        if allowed:
            logger.warning(
                "%s: batches are limited to %d: an execution of more %s",
                builder, max(allowed), measurement.skipped[0].reason,
            )  # fmt: skip
            axes = (replace(axis, most=max(allowed)) if axis.name == BATCH else axis for axis in contract.axes)
            return replace(contract, axes=tuple(axes))
    first = measurement.skipped[0]
    sizes = ", ".join(f"{name} {size}" for name, size in zip(names, first.sizes, strict=True))
    raise StoreError(f"{builder}: an execution at {sizes} {first.reason}; lower its limits")


def runs_row_by_row(contract: Contract) -> bool:
    """Return whether rows of images can be executed one after another: the batch is the only free axis.

    A batch of images is hardly faster on a CPU than its rows, and takes many times the workspace.
    """
    inputs, outputs = contract.inputs, contract.outputs
    return (
        [axis.name for axis in contract.axes] == [BATCH]
        and all(len(spec.shape) == 4 and spec.axes[0] == BATCH for spec in inputs)
        and all(spec.axes[:1] == (BATCH,) for spec in outputs)
    )
