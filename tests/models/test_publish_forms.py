"""Compiled forms of published modules: who gets one, what answers, and what happens where it cannot be used."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from model_support import classify, images, offline, tiny, vision

from serve_app.core.catalog import ModelEntry
from serve_app.core.forms import key_of_tier
from serve_app.errors import ModelChanged, StoreError
from serve_app.models.loader import ModelLoader
from serve_app.models.publishing import publish_forms
from serve_app.models.publishing.publish_catalog import PublishReport, publish
from serve_app.models.runtimes.environment import environments
from serve_app.store.manifest import ManifestKey
from serve_app.store.model_store import ModelStore, Selection

pytestmark = pytest.mark.slow

#: Runs several times as fast when it is compiled, and loads in milliseconds.
ENTRY = vision("squeezenet1_1", runtime="auto")


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> ModelStore:
    """A store with one model, published for this machine."""
    store = ModelStore(tmp_path_factory.mktemp("compiled"))
    report = publish(store, [ENTRY], reachable=offline)
    assert report.published == (ENTRY.model_id,)
    return store


def form_of(store: ModelStore, entry: ModelEntry) -> ManifestKey:
    key = store.find(entry)
    assert key is not None
    return store.forms.key(key, "onnxruntime", environments()["onnxruntime"])


def answers(store: ModelStore, selection: Selection, name: str, batch: np.ndarray) -> np.ndarray:
    loader = ModelLoader(store)
    loader.select(selection.manifests)
    model = loader.load(name)
    try:
        return classify(model, batch)
    finally:
        model.unload()


def publish_again(store: ModelStore, entry: ModelEntry, **how: bool) -> tuple[PublishReport, list[str]]:
    stages: list[str] = []
    report = publish(store, [entry], reachable=offline, on_progress=lambda event: stages.append(event.stage), **how)
    return report, stages


def test_a_compiled_model_answers_like_the_module_and_takes_its_place(compiled: ModelStore) -> None:
    as_published, here = compiled.select([ENTRY]), compiled.select([ENTRY], environments=environments())
    assert [selection.catalog[ENTRY.model_id].form for selection in (as_published, here)] == ["mapped", "onnxruntime"]
    batch = images(3)
    expected = answers(compiled, as_published, ENTRY.model_id, batch)
    actual = answers(compiled, here, ENTRY.model_id, batch)
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-4 * np.abs(expected).max())
    model, before = here.catalog[ENTRY.model_id], as_published.catalog[ENTRY.model_id]
    assert model.profile.exec_s < before.profile.exec_s
    assert (model.contract, model.labels, model.weights_actual) == (
        before.contract, before.labels, before.weights_actual,
    )  # fmt: skip


def test_a_model_in_memory_goes_on_when_another_form_is_there(compiled: ModelStore) -> None:
    loader = ModelLoader(compiled)
    loader.select(compiled.select([ENTRY]).manifests)
    mapped = loader.load(ENTRY.model_id)
    loader.select(compiled.select([ENTRY], environments=environments()).manifests)
    other = loader.load(key_of_tier(ENTRY.model_id, 0))
    assert (mapped.form, other.form) == ("mapped", "onnxruntime")
    np.testing.assert_allclose(classify(mapped, images()), classify(other, images()), rtol=0, atol=1e-3)
    mapped.unload()
    other.unload()


def test_a_form_of_what_the_model_was_before_answers_no_more(compiled: ModelStore) -> None:
    changed = replace(ENTRY, weights="random:9", fingerprint="")
    publish(compiled, [changed], reachable=offline, compiled=False)
    loader = ModelLoader(compiled)
    loader.select(compiled.select([ENTRY], environments=environments()).manifests)
    form = loader.load(key_of_tier(ENTRY.model_id, 0))
    loader.select(compiled.select([changed], environments=environments()).manifests)
    with pytest.raises(ModelChanged, match="published again"):
        classify(form, images())
    form.unload()
    with pytest.raises(StoreError, match="has not published"):
        loader.load(key_of_tier(ENTRY.model_id, 0))


def test_a_machine_with_another_library_or_processor_serves_the_model_as_it_was_published(compiled: ModelStore) -> None:
    elsewhere = compiled.select([ENTRY], environments={"onnxruntime": "onnxruntime 0.1 abacus"})
    assert elsewhere.catalog[ENTRY.model_id].form == "mapped"


def test_an_entry_that_names_its_runtime_gets_what_it_names(compiled: ModelStore) -> None:
    entry = replace(ENTRY, runtime="torch", fingerprint="")
    publish(compiled, [entry], reachable=offline)
    assert compiled.select([entry], environments=environments()).catalog[ENTRY.model_id].form == "mapped"


def test_publishing_again_compiles_nothing_that_is_there(compiled: ModelStore) -> None:
    report, stages = publish_again(compiled, ENTRY)
    assert (report.skipped, stages) == ((ENTRY.model_id,), ["skipped"])


def test_a_damaged_form_is_made_again(compiled: ModelStore) -> None:
    weights = next(file for file in compiled.read(form_of(compiled, ENTRY)).files if file.role == "weights")
    path = compiled.blob_path(weights.name)
    path.chmod(0o644)
    path.write_bytes(b"\0" * weights.size_bytes)
    report, stages = publish_again(compiled, ENTRY)
    assert (report.published, stages) == ((), ["skipped", "compiling"])
    here = compiled.select([ENTRY], environments=environments())
    expected = answers(compiled, compiled.select([ENTRY]), ENTRY.model_id, images())
    np.testing.assert_allclose(answers(compiled, here, ENTRY.model_id, images()), expected, rtol=0, atol=1e-3)


@pytest.mark.parametrize("harm", ["truncated", "deleted", "overwritten", "manifest"])
def test_a_model_whose_form_is_damaged_is_served_as_it_was_published(
    compiled: ModelStore, tmp_path: Path, harm: str
) -> None:
    store = ModelStore(shutil.copytree(compiled.root, tmp_path / "store", copy_function=shutil.copy))
    selection, form = store.select([ENTRY], environments=environments()), form_of(store, ENTRY)
    expected = answers(store, store.select([ENTRY]), ENTRY.model_id, images())
    serving, starting = ModelLoader(store), ModelLoader(store)
    for loader in (serving, starting):
        loader.select(selection.manifests)
    assert serving.prepare(ENTRY.model_id).manifest.model.form == "onnxruntime"
    for file in store.read(form).files:
        path = store.forms.path(form) if harm == "manifest" else store.blob_path(file.name)
        path.chmod(0o644)
        match harm:
            case "truncated":
                path.write_bytes(b"\0" * 100)
            case "overwritten":
                path.write_bytes(b"\0" * file.size_bytes)
            case _:
                path.unlink(missing_ok=True)
        if harm == "manifest":
            break
    for loader in (serving, starting):
        loader.check(ENTRY.model_id)
        model = loader.load(ENTRY.model_id)
        np.testing.assert_allclose(classify(model, images()), expected, rtol=0, atol=1e-3)
        model.unload()
        loader.check(ENTRY.model_id)
    if harm != "manifest":
        assert serving.load(ENTRY.model_id).form == "mapped"
        with pytest.raises(StoreError, match="publish it again"):
            serving.load(key_of_tier(ENTRY.model_id, 0))


def test_a_module_that_decides_by_its_numbers_is_served_as_it_was_published(store: ModelStore) -> None:
    entry = tiny("choosy", "LooksAtValues", runtime="auto")
    report, stages = publish_again(store, entry)
    assert report.published == ("choosy",)
    assert stages[-1] == "compiling"
    assert store.select([entry], environments=environments()).catalog["choosy"].form == "mapped"
    key = store.find(entry)
    assert key is not None
    refusal = store.forms.refusal(store.forms.key(key, "onnxruntime", environments()["onnxruntime"]))
    assert refusal is not None
    assert "numbers in its tensors" in refusal.reason
    assert publish_again(store, entry)[1] == ["skipped"], "it is not tried again"
    assert publish_again(store, entry, force=True)[1][-1] == "compiling"


def test_a_form_that_answers_otherwise_is_not_served(store: ModelStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        publish_forms, "trial_inputs", lambda contract: [{"input": images(1, 32)}, {"input": images(2, 32)}]
    )
    entry = tiny("other", "Convolved", runtime="auto")
    publish(store, [entry], reachable=offline)
    assert store.select([entry], environments=environments()).catalog["other"].form == "mapped"


def test_an_exporter_that_fails_in_its_own_way_stops_no_other_model(
    store: ModelStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object) -> None:
        raise RuntimeError("an operator is unknown")

    monkeypatch.setattr(publish_forms, "export_graph", fails)
    entries = [tiny(name, "Convolved", runtime="auto") for name in ("first", "second")]
    assert publish(store, entries, reachable=offline).published == ("first", "second")
    key = store.find(entries[1])
    assert key is not None
    form = store.forms.key(key, "onnxruntime", environments()["onnxruntime"])
    refusal = store.forms.refusal(form)
    assert refusal is not None
    assert refusal.reason == "RuntimeError: an operator is unknown"


def test_a_full_disk_is_no_reason_against_a_form(store: ModelStore, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object) -> None:
        raise StoreError("the disk is full; make room") from OSError("no space left")

    with monkeypatch.context() as broken:
        broken.setattr(publish_forms, "export_graph", fails)
        entry = tiny("convolved", "Convolved", runtime="auto")
        publish(store, [entry], reachable=offline)
    assert publish_again(store, entry)[1] == ["skipped", "compiling"], "it is tried again"
    assert store.forms.path(form_of(store, entry)).is_file()


def test_the_files_of_a_form_go_with_its_model(store: ModelStore, tmp_path: Path) -> None:
    entry = tiny("convolved", "Convolved", runtime="auto")
    publish(store, [entry], reachable=offline)
    form = form_of(store, entry)
    names = {file.name for file in store.read(form).files}
    store.sweep()
    assert names <= store.blob_names(), "a sweep keeps them"
    key = store.find(entry)
    assert key is not None
    store.manifest_path(key).unlink()
    store.sweep()
    assert not store.blob_names()
    assert not store.forms.path(form).exists()
