"""Fixtures over a store that is published once; nothing here touches the network."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from model_support import VISION, offline, tiny

from serve_app.models.publishing.publish_catalog import publish
from serve_app.models.torchvision_compat import import_torchvision
from serve_app.store.model_store import ModelStore

import_torchvision()
# Threads of torch wait for each other actively: on a busy machine two are slower than one.
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory) -> ModelStore:
    """A store with three torchvision models and the tied tiny one; tests only read it."""
    store = ModelStore(tmp_path_factory.mktemp("shared-store"))
    report = publish(store, [*VISION, tiny("tied")], reachable=offline)
    assert not report.failures
    return store


@pytest.fixture
def store(tmp_path: Path) -> Iterator[ModelStore]:
    """An empty store of its own; afterwards nothing half-written may be left in it."""
    store = ModelStore(tmp_path / "store")
    yield store
    assert not list((store.root / "tmp").glob("*")), "temporary files were left behind"


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Path]:
    """An empty torch hub cache; gives the folder of its checkpoints."""
    before = torch.hub.get_dir()
    torch.hub.set_dir(str(tmp_path / "hub"))
    checkpoints = tmp_path / "hub" / "checkpoints"
    checkpoints.mkdir(parents=True)
    yield checkpoints
    torch.hub.set_dir(before)
