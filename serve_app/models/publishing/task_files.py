"""What publishing does for the task of a model: its files become blobs, and it must fit the model's tensors."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from serve_app.core.catalog import ModelEntry
from serve_app.core.contract import Contract
from serve_app.core.task import Activation, TaskSpec
from serve_app.errors import StoreError
from serve_app.store.manifest import BlobFile, Manifest
from serve_app.store.model_store import ModelStore
from serve_app.tasks.text import TOKEN_INPUTS, read_tokenizer

_CLASSIFICATIONS: Final = ("image-classification", "text-classification", "bytes-classification")
_IMAGES: Final = ("image-classification", "detection", "segmentation")

#: How far the probabilities of all classes may be from 1 together.
_ROUNDING: Final = 1e-2


def with_task(
    store: ModelStore, entry: ModelEntry, manifest: Manifest, answers: Mapping[str, NDArray[Any]]
) -> Manifest:
    """Complete the task of a model: its files are put into the store, and what only a run shows is added.

    Args:
        store: where to; the caller holds ``exclusive``.
        entry: what the catalog asks for.
        manifest: as far as it is known without the task's files.
        answers: outputs of a trial run.

    Raises:
        StoreError: the task does not fit the tensors of the model, or one of its files cannot be read.
    """
    reference = entry.task.tokenizer if entry.task is not None else None
    task, files, tokenizer = manifest.model.task, manifest.files, None
    require_task_fits(entry, dataclasses.replace(task, tokenizer=reference), manifest.model.contract)
    if reference is not None:
        blob = _put_tokenizer(store, reference)
        tokenizer, files = blob.name, (*files, blob)
    activation = task.activation
    if task.kind in _CLASSIFICATIONS and activation is None:
        activation = found_activation(answers)
    return dataclasses.replace(
        manifest,
        model=dataclasses.replace(
            manifest.model, task=dataclasses.replace(task, tokenizer=tokenizer, activation=activation)
        ),
        default_task=dataclasses.replace(
            manifest.default_task,
            tokenizer=tokenizer,
            activation=activation,
            labels=task.labels if task.labels_from else manifest.default_task.labels,
        ),
        files=files,
    )


def require_task_fits(entry: ModelEntry, task: TaskSpec, contract: Contract) -> None:
    """Require that a task can make the inputs of a model.

    Raises:
        StoreError: it cannot.
    """
    found = ", ".join(f"{spec.name} {spec.datatype} {list(spec.shape)}" for spec in contract.inputs)
    takes = f"{entry.builder} takes {found}"
    takes_tokens = any(spec.name in TOKEN_INPUTS for spec in contract.inputs)
    if task.kind in _IMAGES or (task.kind == "embedding" and task.image is not None):
        _require_image(task, contract, takes)
    elif task.kind in ("text-classification", "embedding"):
        if takes_tokens and task.tokenizer is None:
            raise StoreError(f"{takes}: task {task.kind} needs a tokenizer; add tokenizer: file:PATH/tokenizer.json")
        if not takes_tokens and contract.inputs[0].datatype != "BYTES":
            raise StoreError(f"{takes}: task {task.kind} needs an input named input_ids, or one of BYTES, or an image")
        unknown = [spec.name for spec in contract.inputs if spec.name not in TOKEN_INPUTS and spec.default is None]
        if takes_tokens and unknown:
            raise StoreError(f"{takes}: task {task.kind} does not know {unknown[0]!r}; give it a default under inputs")
    elif task.kind == "bytes-classification":
        spec = contract.inputs[0]
        if len(spec.shape) != 2 or spec.shape[1] < 2 or spec.shape[1] % 2:
            raise StoreError(f"{takes}: task {task.kind} needs one input [batch, 2 x bytes] of a fixed length")


def found_activation(answers: Mapping[str, NDArray[Any]]) -> Activation:
    """Return what scores need to be probabilities: nothing if on a trial they were so already."""
    scores = next((array for array in answers.values() if array.dtype.kind == "f"), None)
    if scores is None or scores.ndim < 2 or scores.shape[-1] < 2:
        return "softmax" if scores is None or scores.shape[-1:] != (1,) else "sigmoid"
    totals = scores.sum(axis=-1, dtype=np.float64)
    return "none" if scores.min() >= 0 and bool(np.all(np.abs(totals - 1) < _ROUNDING)) else "softmax"


def _require_image(task: TaskSpec, contract: Contract, takes: str) -> None:
    spec, preset = contract.inputs[0], task.image
    if len(spec.shape) not in (3, 4):
        raise StoreError(
            f"{takes}: task {task.kind} needs a first input [batch, channels, height, width]; "
            "name another task, such as task: tensors"
        )
    if preset is None:
        raise StoreError(
            f"{takes}: task {task.kind} must know how an image is scaled; add image: {{crop_px: ..., mean: [...], "
            "std: [...], fit: crop, letterbox, stretch or native}"
        )
    if spec.shape[-3] not in (-1, preset.channels):
        raise StoreError(f"{takes}: task {task.kind} needs a mean and a std for each channel, not {preset.channels}")
    sides = list(zip(spec.shape[-2:], spec.axes[-2:], strict=True))
    if preset.fit == "native":
        if not all(axis for _, axis in sides):
            raise StoreError(f"{takes}: fit: native needs free axes for height and width; use letterbox or stretch")
        return
    for size, axis in sides:
        limit = next((each for each in contract.axes if each.name == axis), None)
        problem = limit.problem(preset.crop_px) if limit else None
        is_wrong = preset.fit == "crop" and (problem is not None or size not in (-1, preset.crop_px))
        if is_wrong:
            raise StoreError(f"{takes}: crop_px {preset.crop_px} of task {task.kind} is not a size that it takes")


def _put_tokenizer(store: ModelStore, reference: str) -> BlobFile:
    path = Path(reference.removeprefix("file:")).expanduser()
    if not path.is_file():
        raise StoreError(f"there is no tokenizer {path}; name a tokenizer.json")
    read_tokenizer(path)
    return store.put_blob(lambda place: _copy(path, place), role="tokenizer", ending="json")


def _copy(source: Path, target: Path) -> None:
    shutil.copyfile(source, target)
