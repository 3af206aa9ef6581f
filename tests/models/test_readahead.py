"""Loads of models whose weights are not in memory."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from model_support import cached_pages, classify, forget_pages, images, mapped, offline, tiny

from serve_app.models.loader import ModelLoader
from serve_app.models.publishing.publish_catalog import publish
from serve_app.models.readahead import ReadAhead, is_resident
from serve_app.store.model_store import ModelStore

pytestmark = pytest.mark.slow


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


def open_descriptors(path: Path) -> int:
    names = []
    for link in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):
            names.append(link.readlink())
    return names.count(path)


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
        answers.append(classify(model, images(1, 32)))
        model.unload()
    assert np.array_equal(*answers)
    assert not mapped(path)


def test_model_unloaded_while_it_is_read_is_unmapped_at_once(wide: ModelStore) -> None:
    path, loader = blob_of(wide), ModelLoader(wide)
    for _ in range(20):
        forget_pages(path)
        loader.load("wide").unload()
        assert not mapped(path)


def test_after_stop_no_other_step_begins_and_the_file_is_closed(
    wide: ModelStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, entered, stopped, offsets = blob_of(wide), threading.Event(), threading.Event(), []

    def read(target: int, descriptor: int, offset: int, count: int) -> int:
        offsets.append(offset)
        entered.set()
        assert stopped.wait(10)
        return count

    monkeypatch.setattr(os, "sendfile", read)
    before = open_descriptors(path)
    reader = ReadAhead(path, path.stat().st_size)
    assert entered.wait(10)
    reader.stop()
    stopped.set()
    reader.wait()
    assert offsets == [0]
    assert open_descriptors(path) == before == 0


def test_reader_pauses_until_the_model_runs(wide: ModelStore, monkeypatch: pytest.MonkeyPatch) -> None:
    sendfile, began, sent = os.sendfile, threading.Event(), []

    def read(*args: int) -> int:
        sent.append(sendfile(*args))
        began.set()
        return sent[-1]

    monkeypatch.setattr(os, "sendfile", read)
    size_bytes = blob_of(wide).stat().st_size
    model = ModelLoader(wide, read_ahead=partial(ReadAhead, patience=1e6)).load("wide")
    assert began.wait(10)
    assert sum(sent) < size_bytes
    classify(model, images(1, 32))
    deadline_s = time.monotonic() + 30
    while sum(sent) < size_bytes:
        assert time.monotonic() < deadline_s, "the reader still pauses"
    model.unload()


def test_file_of_a_running_model_is_read_before_those_of_idle_models(wide: ModelStore) -> None:
    path, gate = blob_of(wide), threading.Event()
    with ThreadPoolExecutor(1) as busy:
        busy.submit(gate.wait)
        reader = ReadAhead(path, path.stat().st_size, background=busy)
        reader.prioritize()
        reader.wait()
        assert cached_pages(path) * 4096 >= path.stat().st_size
        gate.set()


def test_reader_that_pauses_can_be_stopped(wide: ModelStore) -> None:
    path = blob_of(wide)
    reader = ReadAhead(path, path.stat().st_size, patience=1e6)
    reader.stop()
    reader.wait()
    assert open_descriptors(path) == 0


def test_model_unloaded_while_it_is_read_leaves_nothing_in_the_page_cache(wide: ModelStore) -> None:
    path, loader = blob_of(wide), ModelLoader(wide, release_page_cache=True)
    loader.load("wide").unload()
    deadline_s = time.monotonic() + 30
    while cached_pages(path):
        assert time.monotonic() < deadline_s


def test_warm_load_reads_nothing_ahead(wide: ModelStore) -> None:
    started = []

    def read_ahead(path: Path, size_bytes: int) -> ReadAhead:
        started.append(path)
        return ReadAhead(path, size_bytes)

    path, loader = blob_of(wide), ModelLoader(wide, read_ahead=read_ahead)
    loader.load("wide").unload()
    assert len(started) == 1
    path.read_bytes()
    loader.load("wide").unload()
    assert len(started) == 1


class NoThread(Executor):
    def submit(self, *job: object, **options: object) -> Future:
        raise RuntimeError("can't start new thread")


def test_model_loads_where_no_thread_can_be_started(wide: ModelStore) -> None:
    blob_of(wide)
    model = ModelLoader(wide, read_ahead=partial(ReadAhead, background=NoThread())).load("wide")
    assert np.isfinite(classify(model, images(1, 32))).all()
    model.unload()
