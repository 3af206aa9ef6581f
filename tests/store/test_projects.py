"""The versions of a project: what publishing, rolling back, canaries and removing make of them."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from model_support import offline, tiny
from safetensors.torch import save_file
from tiny_models import Tied

from serve_app.core.versions import VersionRoute, split_key, version_key
from serve_app.errors import NotFound, StoreError
from serve_app.models.publishing.publish_catalog import publish
from serve_app.store.model_store import ModelStore
from serve_app.store.projects import ModelVersions, Project, ProjectState, first_published


def published(*contents: str) -> ModelVersions:
    """The versions after these contents were published one after the other."""
    versions = first_published(f"f-{contents[0]}", 1.0)
    for second, content in enumerate(contents[1:], 2):
        versions = versions.published(f"f-{content}", float(second))
    return versions


def test_other_content_is_a_new_version_that_answers_once_it_is_loaded() -> None:
    versions = published("a", "b")
    assert (versions.numbers, versions.route) == ((1, 2), VersionRoute(current=2))


def test_publishing_what_was_published_last_changes_nothing_even_after_a_rollback() -> None:
    back = published("a", "b").rolled_back()
    assert back.route == VersionRoute(current=1, at_once=True)
    assert back.published("f-b", 9.0) is back


def test_publishing_the_content_of_an_earlier_version_goes_back_to_its_number() -> None:
    versions = published("a", "b", "a")
    assert (versions.numbers, versions.current) == ((1, 2), 1)
    assert versions.published("g-b", 9.0).current == 2, "also from another entry"


def test_numbers_are_never_used_again() -> None:
    versions = published("a", "b").rolled_back().without(2)
    assert versions.published("f-c", 9.0).numbers == (1, 3)


def test_rolling_back_goes_one_back_or_to_the_number_and_ends_a_canary() -> None:
    versions = published("a", "b", "c").with_canary(1, 0.5)
    assert versions.rolled_back().route == VersionRoute(current=2, at_once=True)
    assert versions.rolled_back(1).rolled_back(3).current == 3
    with pytest.raises(NotFound, match="version 1 is the first"):
        published("a").rolled_back()
    with pytest.raises(NotFound, match="there is no version 7; there are 1, 2, 3"):
        versions.rolled_back(7)


def test_a_canary_has_a_share_until_it_ends_or_becomes_current() -> None:
    versions = published("a").published("f-b", 2.0, canary_share=0.1)
    assert versions.route == VersionRoute(current=1, canary=2, canary_share=0.1)
    assert versions.with_canary(2, 0.0).route == VersionRoute(current=1)
    assert versions.with_canary(2, 1.0).route == VersionRoute(current=2)
    assert versions.without(2).route == VersionRoute(current=1)


def test_the_version_that_answers_cannot_be_removed_or_trimmed() -> None:
    versions = published("a", "b", "c").rolled_back(1)
    with pytest.raises(StoreError, match="version 1 answers requests"):
        versions.without(1)
    assert versions.trimmed(1).numbers == (1, 3)
    assert versions.with_canary(2, 0.5).trimmed(1).numbers == (1, 2, 3)


def test_keys_are_names_for_first_versions_and_cannot_be_mistaken_for_names_otherwise() -> None:
    assert [version_key("m", number) for number in (1, 2)] == ["m", "m@2"]
    assert [split_key(key) for key in ("m", "m@12")] == [("m", 1), ("m", 12)]
    with pytest.raises(ValueError, match="must be letters"):
        tiny("m@2")


def test_the_state_survives_the_file_and_counts_its_changes(tmp_path: Path) -> None:
    store, project = ModelStore(tmp_path / "store"), Project.of(tmp_path / "catalog.yaml")
    assert store.projects.read(project.key) is None
    versions = published("a", "b").with_canary(1, 0.25)
    written = store.projects.update(project, lambda state: state.with_versions("m", versions))
    assert written.serial == 1
    assert store.projects.read(project.key) == written
    signature = store.projects.signature(project.key)
    assert store.projects.update(project, lambda state: state) == written
    assert store.projects.signature(project.key) == signature, "nothing is written where nothing changes"


def test_a_malformed_state_is_a_sentence(tmp_path: Path) -> None:
    store, project = ModelStore(tmp_path), Project.of(tmp_path / "catalog.yaml")
    store.projects.update(project, lambda state: state.with_versions("m", published("a")))
    path = tmp_path / "projects" / f"{project.key}.json"
    path.write_text(json.dumps({"models": 3}))
    with pytest.raises(StoreError, match=r"cannot be read .* remove it and publish again"):
        store.projects.read(project.key)


def test_a_model_that_the_project_has_removed_is_not_served_from_what_others_published(tmp_path: Path) -> None:
    store, entry = ModelStore(tmp_path / "store"), tiny("tied")
    mine, others = Project.of(tmp_path / "a.yaml"), Project.of(tmp_path / "b.yaml")
    for project in (mine, others):
        publish(store, [entry], reachable=offline, project=project)
    store.projects.update(mine, lambda state: state.with_versions("tied", None))
    catalog = store.select([entry], mine.key).catalog
    assert len(catalog) == 0
    assert "has not published it; run: edgeserve publish tied" in catalog.problems["tied"]
    assert "tied" in store.select([entry], others.key).catalog


def test_a_node_with_a_store_of_its_own_serves_the_versions_of_the_configuration(tmp_path: Path) -> None:
    """It has published the same entries; what came of them there has other content, as for another processor."""
    here, there = ModelStore(tmp_path / "here"), ModelStore(tmp_path / "there")
    project = Project.of(tmp_path / "catalog.yaml")
    first, second = (tiny("tied", weights=f"random:{seed}") for seed in (3, 4))
    for entry in (first, second):
        publish(here, [entry], reachable=offline, project=project)
        publish(there, [entry], reachable=offline)
    for key in there.all_manifest_keys():
        manifest = there.read(key)
        there.manifest_path(key).unlink()
        execution = dataclasses.replace(manifest.execution, made_for="another processor")
        there.commit(dataclasses.replace(manifest, execution=execution))
    state = here.projects.read(project.key)
    selection = there.select(there.fingerprinted([second]), project.key, state)
    assert selection.catalog.versions("tied") == (1, 2)
    weights = {key: there.read(manifest).model.weights_actual for key, manifest in selection.manifests.items()}
    assert weights == {"tied": "random:3", "tied@2": "random:4"}


def test_of_two_states_the_one_that_changed_more_often_counts(tmp_path: Path) -> None:
    store, entry = ModelStore(tmp_path / "store"), tiny("tied")
    project = Project.of(tmp_path / "catalog.yaml")
    publish(store, [entry], reachable=offline, project=project)
    older = store.projects.read(project.key)
    publish(store, [tiny("tied", weights="random:4")], reachable=offline, project=project)
    assert store.select([entry], project.key, older).catalog.named("tied")[0].version == 2
    newer = ProjectState(catalog="c", host="h", models=older.models if older else {}, serial=99)
    assert store.select([entry], project.key, newer).catalog.named("tied")[0].version == 1


def test_a_changed_weights_file_is_a_new_version_and_the_old_one_stays(tmp_path: Path) -> None:
    store, project = ModelStore(tmp_path / "store"), Project.of(tmp_path / "catalog.yaml")
    path = tmp_path / "weights.safetensors"
    entry = tiny("tied", weights=f"file:{path}")
    for seed in (1, 2):
        torch.manual_seed(seed)
        save_file({name: tensor.clone() for name, tensor in Tied().state_dict().items()}, path)
        assert publish(store, [entry], reachable=offline, project=project).published == ("tied",)
        assert publish(store, [entry], reachable=offline, project=project).skipped == ("tied",)
    selection = store.select([entry], project.key)
    assert selection.catalog.versions("tied") == (1, 2)
    assert selection.catalog.named("tied")[0].version == 2
    files = {store.read(key).files for key in selection.manifests.values()}
    assert len(files) == 2
