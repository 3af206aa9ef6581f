import dataclasses
import gc
import os
import pickle
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from model_support import VISION, cached_pages, classify, images, mapped, module_of, offline, tiny, vision

from serve_app.errors import InvalidRequest, ModelChanged, StoreError
from serve_app.models.builders import registry
from serve_app.models.graph_optimizations import named_slots
from serve_app.models.loader import ModelLoader
from serve_app.models.publishing.publish_catalog import publish
from serve_app.models.torchvision_compat import import_torchvision
from serve_app.store.model_store import ModelStore

models = import_torchvision().models


@pytest.mark.parametrize("name", [entry.model_id for entry in VISION])
def test_logits_are_those_of_torchvision_under_the_same_seed(shared: ModelStore, name: str) -> None:
    torch.manual_seed(7)
    module = getattr(models, name)(weights=None).eval()
    batch = images(3)
    with torch.inference_mode():
        expected = module(torch.from_numpy(batch)).numpy()
    model = ModelLoader(shared).load(name)
    actual = classify(model, batch)
    model.unload()
    assert actual.dtype == np.float32
    assert actual.shape == (3, 1000)
    np.testing.assert_allclose(actual, expected, atol=1e-4)


def test_model_answers_alike_after_every_reload(shared: ModelStore) -> None:
    loader = ModelLoader(shared)
    answers = []
    for _ in range(3):
        model = loader.load("tied")
        answers.append(classify(model, images(2, 32)))
        model.unload()
    assert np.array_equal(answers[0], answers[1])
    assert np.array_equal(answers[0], answers[2])


def test_weights_are_mapped_and_not_copied(shared: ModelStore) -> None:
    loader = ModelLoader(shared)
    model = loader.load("squeezenet1_1")
    blob = shared.blob_path(shared.manifest("squeezenet1_1").files[0].name)
    assert mapped(blob)
    lines = Path("/proc/self/maps").read_text().splitlines()
    starts = [int(line.split("-")[0], 16) for line in lines if blob.name in line]
    tensors = [table[key] for _, table, key in named_slots(module_of(loader, "squeezenet1_1"))]
    assert all(starts[0] < tensor.data_ptr() < starts[0] + blob.stat().st_size for tensor in tensors)
    model.unload()


def test_unload_gives_the_mapping_back_at_once(shared: ModelStore) -> None:
    blob = shared.blob_path(shared.manifest("squeezenet1_1").files[0].name)
    loader = ModelLoader(shared)  # the loader keeps the template; only the tensors go
    model = loader.load("squeezenet1_1")
    logits = classify(model, images())
    gc.disable()
    try:
        model.unload()
        assert not mapped(blob)
    finally:
        gc.enable()
    assert np.isfinite(logits).all()
    model.unload()
    with pytest.raises(StoreError, match="was unloaded"):
        classify(model, images())


def test_logits_outlive_the_model_even_if_they_are_a_view_of_its_weights(store: ModelStore) -> None:
    publish(store, [tiny("constant", "ConstantBuffer")], reachable=offline)
    model = ModelLoader(store).load("constant")
    logits = classify(model, images(2, 32))
    model.unload()
    assert not mapped(store.blob_path(store.manifest("constant").files[0].name))
    assert logits.tolist() == [[0, 1, 2, 3, 4]] * 2
    logits[0] = 9  # it is memory of its own
    assert logits[1].tolist() == [0, 1, 2, 3, 4]


def test_tied_weights_are_stored_and_loaded_once(shared: ModelStore) -> None:
    manifest = shared.manifest("tied")
    places = {place.name: place for place in manifest.tensors}
    assert dataclasses.replace(places["third.weight"], name="second.weight") == places["second.weight"]
    distinct = {(place.offset, place.nbytes) for place in manifest.tensors if place.nbytes}
    assert manifest.model.weights_bytes == sum(nbytes for _, nbytes in distinct)
    assert manifest.files[0].size_bytes < manifest.model.weights_bytes + 4096, "no room for a second copy"
    loader = ModelLoader(shared)
    model = loader.load("tied")
    module = module_of(loader, "tied")
    assert module.get_parameter("third.weight") is module.get_parameter("second.weight")
    model.unload()


def test_non_persistent_buffers_are_stored(shared: ModelStore) -> None:
    built = registry.build(tiny("tied"), "random:3")
    assert "scale" not in built.state_dict()
    assert any(place.name == "scale" and place.kind == "buffer" for place in shared.manifest("tied").tensors)
    model = ModelLoader(shared).load("tied")
    batch = images(4, 32)
    with torch.inference_mode():
        np.testing.assert_allclose(classify(model, batch), built(torch.from_numpy(batch)).numpy(), atol=1e-6)
    model.unload()


def test_template_holds_no_storage(shared: ModelStore) -> None:
    loader = ModelLoader(shared)
    loader.prepare("mobilenet_v3_small")
    module = module_of(loader, "mobilenet_v3_small")
    assert all(table[key].is_meta and not table[key].requires_grad for _, table, key in named_slots(module))
    assert not module.training


@pytest.fixture
def small(store: ModelStore) -> ModelStore:
    publish(store, [tiny("tied")], reachable=offline)
    return store


@pytest.mark.parametrize("left", [0, 100, -1])
def test_truncated_weights_are_refused_before_they_are_mapped(small: ModelStore, left: int) -> None:
    blob = small.blob_path(small.manifest("tied").files[0].name)
    loader = ModelLoader(small)
    loader.prepare("tied")
    blob.chmod(0o644)
    os.truncate(blob, left if left >= 0 else blob.stat().st_size + left)
    with pytest.raises(StoreError, match=r"have \d+ bytes instead of \d+; publish it again"):
        loader.load("tied")
    assert not mapped(blob)


def test_a_check_finds_what_a_load_would_fail_on(small: ModelStore) -> None:
    blob = small.blob_path(small.manifest("tied").files[0].name)
    loader = ModelLoader(small)
    loader.check("tied")
    loader.prepare("tied")
    loader.check("tied")
    blob.rename(small.root / "away")
    with pytest.raises(StoreError, match="publish it again"):
        loader.check("tied")
    (small.root / "away").rename(blob)
    blob.chmod(0o644)
    os.truncate(blob, 100)
    with pytest.raises(StoreError, match="have 100 bytes instead of"):
        loader.check("tied")


def test_missing_weights_are_refused_and_load_again_once_they_are_back(small: ModelStore) -> None:
    blob = small.blob_path(small.manifest("tied").files[0].name)
    loader = ModelLoader(small)
    loader.prepare("tied")
    blob.rename(small.root / "away")
    with pytest.raises(StoreError, match="are missing"):
        loader.load("tied")
    (small.root / "away").rename(blob)
    loader.load("tied").unload()


def test_corrupt_weights_are_refused_and_load_again_once_they_are_mended(small: ModelStore) -> None:
    blob = small.blob_path(small.manifest("tied").files[0].name)
    loader = ModelLoader(small)
    loader.load("tied").unload()
    good = blob.read_bytes()
    blob.chmod(0o644)
    blob.write_bytes(good[:-8] + bytes(8))
    for _ in range(2):
        with pytest.raises(StoreError, match="corrupt"):
            loader.load("tied")
    with pytest.raises(StoreError, match="corrupt"):
        ModelLoader(small).load("tied")
    blob.write_bytes(good)
    loader.load("tied").unload()


def test_weights_are_read_when_they_are_new_here_and_then_trusted_until_they_change(
    small: ModelStore, caplog: pytest.LogCaptureFixture
) -> None:
    blob = small.blob_path(small.manifest("tied").files[0].name)

    def times_read() -> int:
        caplog.clear()
        with caplog.at_level("INFO"):
            ModelLoader(small).load("tied").unload()
        return sum("reading weights" in record.getMessage() for record in caplog.records)

    assert times_read() == 0, "the publisher has read them"
    content = blob.read_bytes()
    blob.unlink()
    blob.write_bytes(content)
    assert times_read() == 1
    assert times_read() == 0


@pytest.mark.parametrize("release", [True, False])
def test_unloading_releases_the_page_cache_only_if_configured(small: ModelStore, release: bool) -> None:
    blob = small.blob_path(small.manifest("tied").files[0].name)
    model = ModelLoader(small, release_page_cache=release).load("tied")
    classify(model, images(1, 32))
    assert cached_pages(blob) > 0
    model.unload()
    if not release:
        assert cached_pages(blob) > 0
        return
    deadline_s = time.monotonic() + 30
    while cached_pages(blob):
        assert time.monotonic() < deadline_s


def test_unknown_model_is_refused(shared: ModelStore) -> None:
    with pytest.raises(StoreError, match="publish it first"):
        ModelLoader(shared).load("unknown")


def test_what_a_name_stands_for_is_what_the_loader_was_told_to_select(small: ModelStore) -> None:
    loader, changed = ModelLoader(small), tiny("tied", weights="random:4")
    loader.select(small.select([tiny("tied")]).manifests)
    model = loader.load("tied")
    before = classify(model, images(1, 32))
    publish(small, [changed], reachable=offline)
    assert np.array_equal(classify(model, images(1, 32)), before), "it was published by others"
    loader.select(small.select([changed]).manifests)
    with pytest.raises(ModelChanged, match="published again"):
        classify(model, images(1, 32))
    model.unload()
    model = loader.load("tied")
    assert not np.array_equal(classify(model, images(1, 32)), before)
    model.unload()


def test_a_loader_that_was_told_to_select_loads_nothing_else(small: ModelStore) -> None:
    loader = ModelLoader(small)
    loader.select({})
    with pytest.raises(StoreError, match="this deployment has not published model 'tied'"):
        loader.load("tied")


def test_builder_that_changed_since_publishing_is_refused(small: ModelStore) -> None:
    manifest = small.manifest("tied")
    for tensors in (manifest.tensors[1:], (*manifest.tensors, dataclasses.replace(manifest.tensors[0], name="more"))):
        small.commit(dataclasses.replace(manifest, tensors=tensors))
        with pytest.raises(StoreError, match="publish the model again"):
            ModelLoader(small).prepare("tied")


def test_tensors_may_lie_in_the_blob_of_another_model(small: ModelStore) -> None:
    publish(small, [tiny("other", weights="random:9")], reachable=offline)
    mine, other = small.manifest("tied"), small.manifest("other")
    borrowed = {place.name: place for place in other.tensors}
    places = tuple(borrowed[place.name] if place.name.startswith("head") else place for place in mine.tensors)
    small.commit(dataclasses.replace(mine, tensors=places, files=mine.files + other.files))
    loader = ModelLoader(small)
    model = loader.load("tied")
    expected = registry.build(tiny("other"), "random:9").get_parameter("head.weight")
    assert torch.equal(module_of(loader, "tied").get_parameter("head.weight"), expected)
    model.unload()
    assert not mapped(small.blob_path(other.files[0].name))


def test_different_models_load_in_parallel(shared: ModelStore) -> None:
    names = [entry.model_id for entry in VISION]
    alone = {}
    for name in names:
        model = ModelLoader(shared).load(name)
        alone[name] = classify(model, images())
        model.unload()
    loader = ModelLoader(shared)
    barrier = threading.Barrier(len(names))

    def cycle(name: str) -> bool:
        barrier.wait(10)
        for _ in range(5):
            model = loader.load(name)
            same = np.allclose(classify(model, images()), alone[name], atol=1e-5)
            model.unload()
            if not same:
                return False
        return True

    with ThreadPoolExecutor(len(names)) as pool:
        assert all(pool.map(cycle, names))


def test_no_pickle_is_read_when_loading(shared: ModelStore, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("a pickle was read")

    for owner, name in ((torch, "load"), (pickle, "load"), (pickle, "loads"), (pickle, "Unpickler")):
        monkeypatch.setattr(owner, name, refuse)
    model = ModelLoader(shared).load("shufflenet_v2_x0_5")
    assert classify(model, images()).shape == (1, 1000)
    model.unload()


@pytest.mark.parametrize(
    "change",
    [
        lambda batch: np.frombuffer(batch.tobytes(), np.float32).reshape(batch.shape),  # read-only
        lambda batch: np.asfortranarray(batch),
        lambda batch: batch[:, ::-1].copy()[:, ::-1],  # negative stride
        lambda batch: batch.astype(np.float64),
    ],
)
def test_any_memory_layout_is_taken(shared: ModelStore, change: Callable[[np.ndarray], np.ndarray]) -> None:
    model = ModelLoader(shared).load("tied")
    batch = images(2, 32)
    assert np.array_equal(classify(model, change(batch)), classify(model, batch))
    model.unload()


@pytest.mark.parametrize("shape", [(3, 224, 224), (1, 3, 224, 225), (1, 1, 224, 224), (0, 3, 224, 224), (1, 3, 224)])
def test_input_of_another_shape_is_the_fault_of_the_request(shared: ModelStore, shape: tuple[int, ...]) -> None:
    contract = shared.manifest("squeezenet1_1").model.contract
    with pytest.raises(InvalidRequest, match=r"'input' takes shape \[-1, 3, 224, 224\]|'batch' of input 'input'"):
        contract.sizes({"input": shape})


def test_catalog_entry_and_seed_give_the_same_file_every_time(store: ModelStore) -> None:
    publish(store, [vision("squeezenet1_1")], reachable=offline)
    first = store.manifest("squeezenet1_1").files
    publish(store, [vision("squeezenet1_1")], reachable=offline, force=True)
    assert store.manifest("squeezenet1_1").files == first


def test_a_batch_takes_the_workspace_of_one_image(small: ModelStore) -> None:
    loader = ModelLoader(small)
    loaded = loader.load("tied")
    seen: list[int] = []
    module_of(loader, "tied").register_forward_pre_hook(lambda module, inputs: seen.append(len(inputs[0])))
    shape = small.manifest("tied").model.inputs[0].shape[1:]
    batch = np.random.default_rng(0).standard_normal((3, *shape)).astype(np.float32)
    logits = classify(loaded, batch)
    assert seen == [1, 1, 1]
    assert np.array_equal(logits, np.concatenate([classify(loaded, image[None]) for image in batch]))
