"""What every runtime must do: this file runs over all of ``registry.RUNTIMES``.

A runtime that is added needs a line in ``runtime_models.SOURCES``, and no test of its own for what stands here.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import runtime_models
from core_support import Ranked
from model_support import forget_pages, offline
from runtime_models import SOURCES, Arrays, Source, inputs

from serve_app.core.cache.model_cache import ModelCache
from serve_app.core.catalog import PublishedModel
from serve_app.errors import InvalidRequest, StoreError
from serve_app.models.loader import ModelLoader
from serve_app.models.publishing.publish_catalog import publish
from serve_app.models.runtimes import openvino_runtime
from serve_app.models.runtimes.base import LoadedModel
from serve_app.models.runtimes.registry import RUNTIMES
from serve_app.serving.oip.request import parse_infer, tensors_for
from serve_app.serving.worker.model_manager import ModelManager
from serve_app.store.model_store import ModelStore

pytestmark = pytest.mark.slow

#: Largest difference to the original framework, in parts of the largest number.
TOLERANCE = 1e-5

MODEL = "network"


@pytest.fixture(scope="module", params=sorted(RUNTIMES))
def source(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Source:
    return SOURCES[request.param](tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def published(source: Source, tmp_path_factory: pytest.TempPathFactory) -> ModelStore:
    """A store that holds the network for one runtime; tests only read it."""
    store = ModelStore(tmp_path_factory.mktemp("runtimes"))
    report = publish(store, [source.entry], reachable=offline)
    assert not report.failures
    return store


@pytest.fixture
def own(published: ModelStore, tmp_path: Path) -> ModelStore:
    """A copy of the store, whose files the test may change."""
    shutil.copytree(published.root, tmp_path / "store")
    return ModelStore(tmp_path / "store")


@pytest.fixture
def loaded(published: ModelStore) -> Iterator[LoadedModel]:
    model = ModelLoader(published).load(MODEL)
    yield model
    model.unload()


def equal(actual: Arrays, expected: Arrays) -> None:
    assert list(actual) == list(expected)
    for name, array in expected.items():
        assert actual[name].dtype == array.dtype
        if array.dtype.kind == "f":
            np.testing.assert_allclose(actual[name], array, rtol=0, atol=TOLERANCE * np.abs(array).max())
        else:
            assert np.array_equal(actual[name], array)


def described(store: ModelStore) -> PublishedModel:
    return store.manifest(MODEL).model


def test_there_is_a_source_for_every_runtime() -> None:
    assert SOURCES.keys() == RUNTIMES.keys()


def test_its_model_says_which_runtime_it_has_and_what_it_takes(published: ModelStore, source: Source) -> None:
    model = described(published)
    assert [(spec.name, spec.datatype, spec.shape, spec.axes) for spec in (*model.inputs, *model.outputs)] == [
        ("features", "FP32", (-1, -1, runtime_models.WIDTH), ("batch", "steps", "")),
        ("kinds", "INT64", (-1, -1), ("batch", "steps")),
        ("mixed", "FP32", (-1, -1, runtime_models.WIDTH), ("batch", "steps", "")),
        ("largest", "INT64", (-1, -1), ("batch", "steps")),
    ]
    assert published.manifest(MODEL).execution.made_for == RUNTIMES[model.runtime].environment()
    assert model.cost((1, 1)).workspace_bytes <= model.cost((4, 64)).workspace_bytes == model.workspace_bytes


@pytest.mark.parametrize("shape", [(1, 1), (2, 3), (4, 64)])
def test_answers_are_those_of_the_original_framework(
    loaded: LoadedModel, source: Source, shape: tuple[int, int]
) -> None:
    given = inputs(*shape)
    equal(loaded.run(given), source.answer(given))


def test_answers_are_the_same_after_a_reload(published: ModelStore, source: Source) -> None:
    given, loader = inputs(), ModelLoader(published)
    for _ in range(3):
        model = loader.load(MODEL)
        equal(model.run(given), source.answer(given))
        model.unload()


def test_several_threads_get_their_own_answers(loaded: LoadedModel, source: Source) -> None:
    given = [inputs(steps=1 + seed % 5, seed=seed) for seed in range(24)]
    with ThreadPoolExecutor(2) as threads:
        for answers, each in zip(threads.map(loaded.run, given), given, strict=True):
            equal(answers, source.answer(each))


def test_inputs_may_be_read_only_and_stay_as_they_were(loaded: LoadedModel, source: Source) -> None:
    given = inputs()
    for array in given.values():
        array.flags.writeable = False
    equal(loaded.run(given), source.answer(inputs()))
    equal(given, inputs())


def test_answers_outlive_the_model(published: ModelStore, source: Source) -> None:
    model = ModelLoader(published).load(MODEL)
    given = inputs()
    answers = model.run(given)
    model.unload()
    equal(answers, source.answer(given))
    assert all(array.flags.owndata for array in answers.values())


def test_a_model_that_was_unloaded_refuses_to_run(published: ModelStore) -> None:
    model = ModelLoader(published).load(MODEL)
    model.unload()
    model.unload()
    with pytest.raises(StoreError, match=f"model '{MODEL}' was unloaded; load it before running it"):
        model.run(inputs())


def test_numbers_that_a_table_does_not_have_are_no_fault_of_ours(loaded: LoadedModel, source: Source) -> None:
    given = inputs()
    # OpenVINO takes any number, and answers as if the table had zeros there.
    with contextlib.suppress(InvalidRequest):
        loaded.run(given | {"kinds": np.full_like(given["kinds"], 10**6)})
    equal(loaded.run(given), source.answer(given))


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def corrupt(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(path.stat().st_size // 2)
        byte = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte[0] ^ 255]))


@pytest.mark.parametrize(
    ("damage", "message"),
    [(truncate, "bytes instead of"), (corrupt, "corrupt; publish it again"), (Path.unlink, "missing")],
)
def test_damaged_files_are_refused_and_nothing_stays_mapped(
    own: ModelStore, damage: Callable[[Path], None], message: str
) -> None:
    files = own.manifest(MODEL).files
    for file in files:
        content = own.blob_path(file.name).read_bytes()
        damage(own.blob_path(file.name))
        with pytest.raises(StoreError, match=message):
            ModelLoader(own).load(MODEL)
        assert str(own.root) not in Path("/proc/self/maps").read_text()
        own.blob_path(file.name).write_bytes(content)
    ModelLoader(own).load(MODEL).unload()


def test_a_model_may_be_unloaded_while_its_files_are_read(own: ModelStore, source: Source) -> None:
    loader = ModelLoader(own, release_page_cache=True)
    for _ in range(5):
        for file in own.manifest(MODEL).files:
            forget_pages(own.blob_path(file.name))
        loader.load(MODEL).unload()
    model = loader.load(MODEL)
    equal(model.run(inputs()), source.answer(inputs()))
    model.unload()


def test_files_made_elsewhere_are_refused_here_and_published_again(own: ModelStore, source: Source) -> None:
    manifest = own.manifest(MODEL)
    if not manifest.execution.made_for:
        pytest.skip("its files are those of any machine")
    elsewhere = dataclasses.replace(manifest.execution, made_for="another library 1.0 on another processor")
    own.commit(dataclasses.replace(manifest, execution=elsewhere))
    with pytest.raises(StoreError, match=r"was optimized for 'another library .* and here is"):
        ModelLoader(own).load(MODEL)
    report = publish(own, [source.entry], reachable=offline)
    assert (report.failures, report.published) == ((), (MODEL,))
    ModelLoader(own).load(MODEL).unload()
    assert publish(own, [source.entry], reachable=offline).skipped == (MODEL,)


class CountingLoader(ModelLoader):
    loads = 0

    def load(self, model_id: str) -> LoadedModel:
        self.loads += 1
        return super().load(model_id)


async def test_twenty_first_requests_make_one_load(published: ModelStore, source: Source) -> None:
    loader, profile, given = CountingLoader(published), described(published).profile, inputs()
    with ThreadPoolExecutor(2) as threads:
        manager = ModelManager(
            cache=ModelCache(capacity_bytes=2**30, workspace_bytes=2**20, policy=Ranked(), max_loads=2),
            backend=loader,
            loaders=threads,
            preloaders=threads,
            clock=time.monotonic,
            call_at=asyncio.get_running_loop().call_at,
            observer=Unobserved(),
        )

        async def request() -> Arrays:
            lease = await manager.acquire(profile)
            try:
                return await asyncio.to_thread(lease.runnable.run, given)
            finally:
                manager.release(lease)

        for answers in await asyncio.gather(*(request() for _ in range(20))):
            equal(answers, source.answer(given))
        manager.close()
    assert loader.loads == 1


class Unobserved:
    def preload_started(self) -> None: ...

    def loaded(self, model_id: str, seconds: float) -> None: ...

    def load_failed(self, model_id: str) -> None: ...

    def evicted(self, model_id: str, reason: object) -> None: ...


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"features": {"shape": [1, 2, 3]}}, r"input 'features' takes shape \[-1, -1, 512\] .* not \[1, 2, 3\]"),
        ({"features": {"datatype": "FP64"}}, "input 'features' .* takes datatype FP32, not FP64"),
        ({"kinds": {"shape": [1, 3]}}, "axis 'steps' of input 'kinds' must be 2 as in other inputs, not 3"),
        ({"kinds": {"name": "kind"}}, "has no input 'kind'; it takes 'features', 'kinds'"),
        ({"kinds": None}, "input 'kinds' of model 'network' is missing"),
    ],
)
def test_requests_that_do_not_fit_say_which_tensor_what_is_expected_and_what_was_given(
    published: ModelStore, changes: dict[str, dict[str, object] | None], message: str
) -> None:
    tensors: dict[str, dict[str, object]] = {
        "features": {"name": "features", "datatype": "FP32", "shape": [1, 2, runtime_models.WIDTH]},
        "kinds": {"name": "kinds", "datatype": "INT64", "shape": [1, 2]},
    }
    for name, change in changes.items():
        tensors[name] = {} if change is None else tensors[name] | change
    given = [tensor for tensor in tensors.values() if tensor]
    for tensor in given:
        tensor["data"] = [0] * int(np.prod(tensor["shape"]))  # type: ignore[arg-type]
    request = parse_infer(json.dumps({"inputs": given}).encode(), None)
    with pytest.raises(InvalidRequest, match=message):
        tensors_for(request, described(published), 32)


@pytest.mark.slow
def test_what_a_model_takes_is_what_it_gives_back(published: ModelStore) -> None:
    script = Path(runtime_models.__file__).with_name("runtime_process.py")
    # As workers have it: the tops of further arenas are not given back.
    environment = os.environ | {
        "MALLOC_ARENA_MAX": "2",
        "PYTHONPATH": os.pathsep.join([str(Path.cwd()), str(script.parent)]),
    }
    found = json.loads(
        subprocess.run(
            [sys.executable, script, published.root, MODEL, "20"],
            check=True, capture_output=True, text=True, env=environment,
        ).stdout
    )  # fmt: skip
    booked = described(published).weights_bytes
    assert booked == pytest.approx(found["given_back"], rel=0.05)
    assert found["growth"] < 2**20
    assert not found["mapped"]


def test_loads_leave_no_threads_behind(published: ModelStore) -> None:
    loader = ModelLoader(published)

    def threads_after(cycles: int) -> int:
        for _ in range(cycles):
            model = loader.load(MODEL)
            model.run(inputs())
            model.unload()
        loader.wait_for_releases()
        return len(list(Path("/proc/self/task").iterdir()))

    assert threads_after(3) >= threads_after(10)


@pytest.mark.parametrize("parallel", [1, 2])
def test_models_share_the_threads_of_an_inference(published: ModelStore, source: Source, parallel: int) -> None:
    script = Path(runtime_models.__file__).with_name("thread_process.py")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(Path.cwd()), str(script.parent)])}
    found = json.loads(
        subprocess.run(
            [sys.executable, script, published.root, MODEL, "2", str(parallel)],
            check=True, capture_output=True, text=True, env=environment,
        ).stdout
    )  # fmt: skip
    one, five, five_again = found["counts"]
    # A library may start another of its own threads meanwhile.
    assert one <= five <= one + 1
    assert five_again <= five + 1
    expected = float(source.answer(inputs())["mixed"].sum())
    assert found["answers"] == pytest.approx([expected] * 5, rel=1e-3)


@pytest.mark.slow
def test_kernels_of_openvino_go_with_their_models() -> None:
    pytest.importorskip("openvino")
    script = Path(runtime_models.__file__).with_name("openvino_process.py")
    environment = os.environ | {"MALLOC_ARENA_MAX": "2", "PYTHONPATH": os.pathsep.join(sys.path)}
    ended = subprocess.run([sys.executable, str(script)], env=environment, capture_output=True, text=True, check=True)
    assert int(ended.stdout) < 4 * 2**20


@pytest.mark.parametrize("before", [None, "64"])
def test_only_openvino_is_told_to_keep_no_kernels(monkeypatch: pytest.MonkeyPatch, before: str | None) -> None:
    pytest.importorskip("openvino")
    name = "ONEDNN_PRIMITIVE_CACHE_CAPACITY"
    monkeypatch.delenv(name, raising=False)
    if before is not None:
        monkeypatch.setenv(name, before)
    openvino_runtime.core.__wrapped__()
    assert os.environ.get(name) == before
