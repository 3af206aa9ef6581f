"""Memory of this process as the kernel accounts for it, and the return of free memory."""

from __future__ import annotations

import mmap
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from exact_heap_process import faults_of_the_second_burst, freed_while_exact_bytes, kept_by_a_thread_bytes
from model_support import classify, images

from serve_app.models.loader import ModelLoader
from serve_app.models.process_memory import give_back_free_memory, process_memory
from serve_app.store.model_store import ModelStore

SIZE = 64 * 2**20


def test_own_pages_and_pages_of_files_are_counted_apart(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(SIZE))
    before = process_memory()
    with path.open("rb") as file, mmap.mmap(file.fileno(), SIZE, access=mmap.ACCESS_READ) as mapped:
        assert not np.frombuffer(mapped, np.uint8)[:: mmap.PAGESIZE].any()
        touched = process_memory()
    # Not from the heap, which may still have room that earlier tests have freed.
    own = np.frombuffer(mmap.mmap(-1, SIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS), np.uint8)
    own[:] = 1
    after = process_memory()
    assert touched.file_bytes - before.file_bytes == pytest.approx(SIZE, rel=0.05)
    assert touched.anonymous_bytes - before.anonymous_bytes < SIZE / 20
    assert after.anonymous_bytes - touched.anonymous_bytes == pytest.approx(own.nbytes, rel=0.05)
    assert after.rss_bytes == after.anonymous_bytes + after.file_bytes


def test_free_heap_goes_back_to_the_kernel() -> None:
    # Small enough to come from the heap; every second one stays, so that the heap cannot shrink by itself.
    kept = [np.ones(48 * 2**10, np.uint8) for _ in range(2000)]
    del kept[::2]
    before = process_memory()
    give_back_free_memory()
    assert before.anonymous_bytes - process_memory().anonymous_bytes > 1000 * 40 * 2**10


def test_free_heap_of_threads_goes_back_too(monkeypatch: pytest.MonkeyPatch) -> None:
    # As workers have it; trimming by itself reaches the end of the main arena only.
    monkeypatch.setenv("MALLOC_ARENA_MAX", "2")
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as fresh:
        assert fresh.submit(kept_by_a_thread_bytes).result() < 8 * 2**20


def test_what_is_freed_while_the_heap_is_exact_is_gone_at_once() -> None:
    # In a process of its own: the heap of this one has room that earlier tests have freed, and takes from there first.
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as fresh:
        assert fresh.submit(freed_while_exact_bytes).result() > 30 * 2**20


def test_the_memory_of_a_request_is_kept_for_the_next_ones() -> None:
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as fresh:
        assert fresh.submit(faults_of_the_second_burst).result() < 100


def test_resident_memory_falls_by_the_bytes_of_a_model_that_is_unloaded(shared: ModelStore) -> None:
    model = ModelLoader(shared).load("squeezenet1_1")
    classify(model, images())
    resident = process_memory()
    model.unload()
    fallen_bytes = resident.rss_bytes - process_memory().rss_bytes
    assert fallen_bytes == pytest.approx(shared.manifest("squeezenet1_1").model.profile.size_bytes, rel=0.05)
