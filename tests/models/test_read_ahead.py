"""Loads of models whose weights are not in memory."""

from __future__ import annotations

import mmap
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from model_support import cached_pages, forget_pages, images, mapped, offline, tiny

from serve_app.models import loader as loading
from serve_app.models import read_ahead
from serve_app.models.loader import ModelLoader
from serve_app.models.publish import publish
from serve_app.models.read_ahead import ReadAhead, is_resident
from serve_app.models.store import ModelStore


@pytest.fixture
def wide(store: ModelStore) -> ModelStore:
    """A store with a model of 17 MB."""
    publish(store, [tiny("wide", "wide")], reachable=offline)
    return store


def blob_of(store: ModelStore) -> Path:
    path = store.blob_path(store.manifest("wide").files[0].name)
    forget_pages(path)
    if cached_pages(path):
        pytest.skip("this file system does not give pages back")
    return path


def residency(path: Path) -> bool:
    with path.open("rb") as file:
        return is_resident(file.fileno(), path.stat().st_size)


def test_residency_is_seen(wide: ModelStore) -> None:
    path = blob_of(wide)
    assert not residency(path)
    path.read_bytes()
    assert residency(path)


def test_cold_load_reads_all_weights_though_nothing_runs(wide: ModelStore) -> None:
    path = blob_of(wide)
    model = ModelLoader(wide).load("wide")
    deadline_s = time.monotonic() + 30
    while cached_pages(path) * 4096 < path.stat().st_size:
        assert time.monotonic() < deadline_s
    model.unload()


def test_cold_model_answers_as_a_warm_one(wide: ModelStore) -> None:
    path, loader = blob_of(wide), ModelLoader(wide)
    answers = []
    for _ in range(2):
        model = loader.load("wide")
        answers.append(model.infer(images(1, 32)))
        model.unload()
    assert np.array_equal(*answers)
    assert not mapped(path)


def test_model_unloaded_while_it_is_read_is_unmapped_at_once(wide: ModelStore) -> None:
    path, loader = blob_of(wide), ModelLoader(wide)
    for _ in range(20):
        forget_pages(path)
        loader.load("wide").unload()
        assert not mapped(path)


def test_stop_waits_for_the_step_under_way_and_no_other_follows(monkeypatch: pytest.MonkeyPatch) -> None:
    """What was unmapped may be somebody else's memory at once."""
    entered, stopped, touched = threading.Event(), threading.Event(), []

    class Disk:
        def madvise(self, address: int, length: int, advice: int) -> int:
            entered.set()
            touched.append((address, stopped.wait(0.2)))
            return 0

    monkeypatch.setattr(read_ahead, "_libc", Disk())
    with mmap.mmap(-1, 64 << 20) as memory:
        reader = ReadAhead(memory, 0)
        assert entered.wait(10)
        reader.stop()
        stopped.set()
    assert touched == [(0, False)]


def test_warm_load_reads_nothing_ahead(wide: ModelStore, monkeypatch: pytest.MonkeyPatch) -> None:
    started = []

    class Counting(ReadAhead):
        def __init__(self, *args: object) -> None:
            started.append(args)
            super().__init__(*args)

    monkeypatch.setattr(loading, "ReadAhead", Counting)
    path, loader = blob_of(wide), ModelLoader(wide)
    loader.load("wide").unload()
    assert len(started) == 1
    path.read_bytes()
    loader.load("wide").unload()
    assert len(started) == 1


def test_model_loads_where_no_thread_can_be_started(wide: ModelStore, monkeypatch: pytest.MonkeyPatch) -> None:
    class Refusing:
        def submit(self, job: object) -> None:
            raise RuntimeError("can't start new thread")

    blob_of(wide)
    monkeypatch.setattr(read_ahead, "_readers", Refusing)
    model = ModelLoader(wide).load("wide")
    assert np.isfinite(model.infer(images(1, 32))).all()
    model.unload()
