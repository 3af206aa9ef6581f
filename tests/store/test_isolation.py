"""Catalogs that share a store and the names of their models do not answer for each other."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import tagger_model
import yaml
from model_support import images, offline, tiny
from safetensors.torch import save_file
from tiny_models import Tied

from serve_app.config.catalog import load_catalog
from serve_app.core.catalog import ModelEntry
from serve_app.core.contract_declaration import TensorDeclaration
from serve_app.core.task import TaskSpec
from serve_app.models.loader import ModelLoader
from serve_app.models.publishing.publish_catalog import publish
from serve_app.store.model_store import ModelStore
from serve_app.store.projects import Project

MINE, OTHERS = tiny("tied", weights="random:3"), tiny("tied", weights="random:4")


def project(folder: Path) -> Project:
    folder.mkdir(exist_ok=True)
    return Project.of(folder / "catalog.yaml")


def answer(store: ModelStore, entry: ModelEntry, key: str) -> np.ndarray:
    """What a worker of a deployment answers that has just started."""
    loader, selection = ModelLoader(store), store.select([entry], key)
    loader.select(selection.manifests)
    model = loader.load(selection.catalog.named(entry.model_id)[0].model_id)
    try:
        return model.run({"input": images(1, 32)})["logits"]
    finally:
        model.unload()


def test_a_model_of_the_same_name_that_another_project_publishes_changes_no_answer(tmp_path: Path) -> None:
    store, a, b = ModelStore(tmp_path / "store"), project(tmp_path / "a"), project(tmp_path / "b")
    publish(store, [MINE], reachable=offline, project=a)
    before = answer(store, MINE, a.key)
    assert publish(store, [OTHERS], reachable=offline, project=b).published == ("tied",)
    assert np.array_equal(answer(store, MINE, a.key), before)
    assert not np.array_equal(answer(store, OTHERS, b.key), before)
    assert publish(store, [MINE], reachable=offline, project=a).skipped == ("tied",), "neither displaces the other"


def test_projects_of_the_same_entry_share_one_manifest(tmp_path: Path) -> None:
    store, a, b = ModelStore(tmp_path / "store"), project(tmp_path / "a"), project(tmp_path / "b")
    publish(store, [MINE], reachable=offline, project=a)
    assert publish(store, [MINE], reachable=offline, project=b).skipped == ("tied",)
    assert len(store.all_manifest_keys()) == 1
    assert [store.select([MINE], each.key).manifests for each in (a, b)] == [{"tied": store.all_manifest_keys()[0]}] * 2


def test_what_is_laid_over_a_published_model_needs_no_publishing(tmp_path: Path) -> None:
    store = ModelStore(tmp_path)
    (first,) = store.fingerprinted([dataclasses.replace(MINE, task=TaskSpec(kind="image-classification"))])
    for change in (
        {"family": "toys"},
        {"accuracy": 0.5},
        {"pinned": True},
        {"min_copies": 2},
        {"agreement": 0.9},
        {"task": TaskSpec(kind="image-classification", labels=("a", "b"))},
    ):
        assert store.fingerprinted([dataclasses.replace(first, fingerprint="", **change)])[0] == dataclasses.replace(
            first, **change
        )


def test_forms_of_lower_precision_are_of_the_same_published_model(tmp_path: Path) -> None:
    plain = dataclasses.replace(MINE, runtime="auto")
    first, second = ModelStore(tmp_path).fingerprinted([plain, dataclasses.replace(plain, lowered="auto")])
    assert first.fingerprint == second.fingerprint


@pytest.mark.parametrize(
    "change",
    [
        {"weights": "random:4"},
        {"builder": "tiny_models:Other"},
        {"dtype": "bfloat16"},
        {"runtime": "onnxruntime"},
        {"inputs": (TensorDeclaration(name="x", datatype="FP32", shape=(1, 2)),)},
        {"task": TaskSpec(kind="tensors")},
    ],
    ids=lambda change: next(iter(change)),
)
def test_what_decides_the_content_is_in_the_fingerprint(tmp_path: Path, change: dict[str, object]) -> None:
    store = ModelStore(tmp_path)
    first, second = store.fingerprinted([MINE, dataclasses.replace(MINE, **change)])
    assert first.fingerprint != second.fingerprint


@pytest.mark.parametrize("reference", ["weights", "builder", "tokenizer"])
def test_a_changed_file_is_another_content_and_a_moved_one_is_not(tmp_path: Path, reference: str) -> None:
    def entry(path: Path) -> ModelEntry:
        if reference == "tokenizer":
            return dataclasses.replace(MINE, task=TaskSpec(kind="tensors", tokenizer=f"file:{path}"))
        kind = "file" if reference == "weights" else "onnx"
        return dataclasses.replace(MINE, **{reference: f"{kind}:{path}"})

    store, path, moved = ModelStore(tmp_path / "store"), tmp_path / "a.bin", tmp_path / "b.bin"
    path.write_bytes(b"first")
    moved.write_bytes(b"first")
    first, same = store.fingerprinted([entry(path), entry(moved)])
    path.write_bytes(b"other")
    (changed,) = store.fingerprinted([entry(path)])
    assert first.fingerprint == same.fingerprint
    assert first.fingerprint != changed.fingerprint
    path.unlink()
    assert store.fingerprinted([entry(path)])[0].fingerprint == "", "unknown"


def test_tensors_that_a_graph_keeps_in_another_file_count(tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    weight = onnx.numpy_helper.from_array(np.arange(4096, dtype=np.float32), "w")
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("Add", ["x", "w"], ["y"])],
        "g",
        [onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [4096])],
        [onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [4096])],
        [weight],
    )
    path = tmp_path / "model.onnx"
    onnx.save_model(
        onnx.helper.make_model(graph), path, save_as_external_data=True, location="beside.data", size_threshold=0
    )
    store, entry = ModelStore(tmp_path / "store"), dataclasses.replace(MINE, builder=f"onnx:{path}")
    (before,) = store.fingerprinted([entry])
    beside = tmp_path / "beside.data"
    beside.write_bytes(bytes(len(beside.read_bytes())))
    assert store.fingerprinted([entry])[0].fingerprint != before.fingerprint


def test_the_fingerprint_travels_to_nodes_without_the_file(tmp_path: Path) -> None:
    store, path = ModelStore(tmp_path / "store"), tmp_path / "tokenizer.json"
    path.write_text("{}")
    entry = dataclasses.replace(MINE, task=TaskSpec(kind="tensors", tokenizer=f"file:{path}"))
    (known,) = store.fingerprinted([entry])
    path.unlink()
    assert ModelStore(tmp_path / "elsewhere").fingerprinted([known]) == (known,)


def test_a_source_file_may_go_once_it_is_published(tmp_path: Path) -> None:
    store, path = ModelStore(tmp_path / "store"), tmp_path / "weights.safetensors"
    save_file({name: tensor.clone() for name, tensor in Tied().state_dict().items()}, path)
    entry = tiny("tied", weights=f"file:{path}")
    assert publish(store, [entry], reachable=offline).published == ("tied",)
    path.unlink()
    assert publish(store, [entry], reachable=offline).skipped == ("tied",)
    assert "tied" in store.catalog([entry])


def test_manifests_of_an_earlier_format_are_ignored_and_published_again(tmp_path: Path) -> None:
    store = ModelStore(tmp_path / "store")
    publish(store, [MINE], reachable=offline)
    (key,) = store.all_manifest_keys()
    blob = next(iter(store.blob_names()))
    old = store.root / "models" / "tied.json"
    old.write_text(f'{{"format": 2, "files": [{{"name": "{blob}"}}]}}')
    store.manifest_path(key).unlink()
    assert "tied" not in store.catalog([MINE])
    assert publish(store, [MINE], reachable=offline).published == ("tied",)
    assert "tied" in store.catalog([MINE])
    assert store.outdated_manifests() == (old,), "an earlier version of EdgeServe may still read it"


def test_a_graph_that_was_optimized_for_another_machine_is_published_again(tmp_path: Path) -> None:
    pytest.importorskip("onnx")
    tagger_model.write(tmp_path / "tagger.onnx")
    (tmp_path / "catalog.yaml").write_text(
        yaml.safe_dump({"models": {"tagger": {"builder": "onnx:tagger.onnx", **tagger_model.ENTRY}}})
    )
    store, entries = ModelStore(tmp_path / "store"), load_catalog(tmp_path / "catalog.yaml")
    publish(store, entries, reachable=offline)
    assert publish(store, entries, reachable=offline).skipped == ("tagger",)
    (key,) = store.all_manifest_keys()
    manifest = store.read(key)
    store.manifest_path(key).unlink()
    execution = dataclasses.replace(manifest.execution, made_for="another processor")
    store.commit(dataclasses.replace(manifest, execution=execution))
    assert publish(store, entries, reachable=offline).published == ("tagger",)
