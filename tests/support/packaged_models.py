"""Models that packages of the index ship, published and run beside the frameworks that they come from."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import onnxruntime as ort
import pytest
from task_support import Run

from serve_app.core.catalog import ModelEntry
from serve_app.models.loader import ModelLoader
from serve_app.models.publishing.publish_catalog import publish
from serve_app.store.model_store import ModelStore
from serve_app.tasks.base import TaskModel


def packaged(package: str, path: str) -> Path:
    """A file of a package, which is not imported; the test is skipped where it is not installed."""
    found = importlib.util.find_spec(package)
    if found is None or found.origin is None:
        pytest.skip(f"{package} is not installed")
    return Path(found.origin).parent / path


@contextmanager
def served(folder: Path, entry: ModelEntry) -> Iterator[tuple[TaskModel, Run]]:
    """Publish a model, load it from the store, and run its task on it."""
    store = ModelStore(folder)
    report = publish(store, [entry])
    assert not report.failures, report.failures[0].message
    (model,) = store.catalog([entry]).models
    loader = ModelLoader(store)
    loaded = loader.load(entry.model_id)
    known = TaskModel(
        model_id=model.model_id,
        contract=model.contract,
        task=model.task,
        max_pixels=10_000_000,
        tokenizer=store.blob_path(model.task.tokenizer) if model.task.tokenizer else None,
    )
    try:
        yield known, loaded.run
    finally:
        loaded.unload()


def session(path: Path) -> Any:
    return ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
