"""What every publisher writes of a model, whatever runs it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Literal

from serve_app.core.catalog import ModelEntry, ModelProfile, PublishedModel, RuntimeName
from serve_app.core.contract import Contract
from serve_app.core.task import TaskSpec
from serve_app.models.profiling.measure import Measurement

#: Of a model until it is in the store.
ModuleStage = Literal["writing", "verifying", "measuring", "published"]

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
    """Add what was measured; ``size_bytes`` is what the model takes in memory."""
    profile = dataclasses.replace(
        model.profile, size_bytes=max(1, size_bytes), load_s=measurement.load_s, exec_s=measurement.exec_s
    )
    return dataclasses.replace(
        model,
        weights_bytes=size_bytes,
        workspace_bytes=measurement.workspace_bytes,
        costs=() if model.row_by_row else measurement.costs,
        prepared_bytes=measurement.prepared_bytes,
        profile=profile,
    )
