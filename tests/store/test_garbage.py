"""What ``edgeserve store gc`` removes, and what stays."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
from model_support import check_content, offline, tiny

from serve_app.models.publishing.publish_catalog import publish
from serve_app.store.garbage import collect
from serve_app.store.model_store import ModelStore
from serve_app.store.projects import Project

FIRST, SECOND = tiny("tied"), tiny("tied", weights="random:4")


@pytest.fixture
def mine(store: ModelStore, tmp_path: Path) -> Project:
    """A project that has published two versions."""
    path = tmp_path / "mine.yaml"
    path.touch()
    project = Project.of(path)
    for entry in (FIRST, SECOND):
        publish(store, [entry], reachable=offline, project=project)
    return project


def blobs(store: ModelStore) -> int:
    return len(store.blob_names())


def test_without_keep_every_version_stays(store: ModelStore, mine: Project) -> None:
    garbage = collect(store, mine, [SECOND])
    assert (garbage.freed_bytes, garbage.versions, blobs(store)) == (0, (), 2)


def test_versions_beyond_keep_go_with_their_files(store: ModelStore, mine: Project) -> None:
    planned = collect(store, mine, [SECOND], keep=1, dry_run=True)
    assert blobs(store) == 2
    before = sum(path.stat().st_size for path in store.root.rglob("*") if path.parent.name in ("blobs", "tied"))
    garbage = collect(store, mine, [SECOND], keep=1)
    after = sum(path.stat().st_size for path in store.root.rglob("*") if path.parent.name in ("blobs", "tied"))
    assert garbage == planned
    assert garbage.versions == (("tied", 1),)
    assert garbage.freed_bytes == before - after > 0
    check_content(store, "tied")
    assert store.select([SECOND], mine.key).catalog.versions("tied") == (2,)


def test_what_another_project_has_published_stays(store: ModelStore, mine: Project, tmp_path: Path) -> None:
    other = tmp_path / "other.yaml"
    other.touch()
    others = Project.of(other)
    publish(store, [FIRST], reachable=offline, project=others)
    collect(store, mine, [SECOND], keep=1)
    assert blobs(store) == 2
    other.unlink()
    store.projects.use(others.key, ("tied",))
    collect(store, mine, [SECOND], keep=1)
    assert blobs(store) == 2, "a deployment still serves it"
    lease = store.root / "projects" / f"{others.key}.lease"
    os.utime(lease, (time.time() - 3600,) * 2)
    assert collect(store, mine, [SECOND], keep=1).projects == (str(other.resolve()),)
    assert blobs(store) == 1


def test_a_model_that_left_the_catalog_stays_while_a_deployment_serves_it(store: ModelStore, mine: Project) -> None:
    store.projects.use(mine.key, ("tied",))
    collect(store, mine, [])
    assert blobs(store) == 2
    store.projects.use(mine.key, ())
    assert collect(store, mine, []).versions == (("tied", 1), ("tied", 2))
    assert blobs(store) == 0


def test_a_model_that_was_removed_goes_although_the_catalog_still_has_it(store: ModelStore, mine: Project) -> None:
    store.projects.update(mine, lambda state: state.with_versions("tied", None))
    collect(store, mine, [SECOND])
    assert blobs(store) == 0


def test_manifests_of_earlier_formats_go(store: ModelStore, mine: Project) -> None:
    old = store.root / "models" / "old.json"
    old.write_text('{"format": 2, "files": []}')
    collect(store, mine, [SECOND])
    assert not old.exists()


def test_what_was_published_for_no_project_stays_while_the_catalog_asks_for_it(
    store: ModelStore, tmp_path: Path
) -> None:
    publish(store, [FIRST], reachable=offline)
    project = Project.of(tmp_path / "catalog.yaml")
    collect(store, project, [FIRST])
    assert blobs(store) == 1
    collect(store, project, [SECOND])
    assert blobs(store) == 0
