"""Configuration files are found from any folder, and never another file than the one that was meant."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from serve_app.config.catalog import load_catalog
from serve_app.config.default_files import DEFAULTS, find, find_default, resolve, shipped_dir
from serve_app.config.edge import load_edge
from serve_app.errors import ConfigError
from serve_app.serving.launch.serve_config import read_serve_file

DEPLOY = Path(__file__).parents[2] / "deploy"


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def touch(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    return path


def test_a_checkout_ships_its_deploy_folder() -> None:
    assert shipped_dir() == DEPLOY
    assert all((DEPLOY / name).is_file() for name in DEFAULTS)


def test_the_defaults_name_each_other_from_an_empty_folder() -> None:
    serve_file = read_serve_file(find_default("local.yaml"))
    assert serve_file.path == DEPLOY / "local.yaml"
    assert serve_file.edge_path() == find(Path("deploy/edge.yaml")) == DEPLOY / "edge.yaml"
    assert load_catalog(load_edge(serve_file.edge_path()).catalog)


@pytest.mark.parametrize("name", DEFAULTS)
def test_deploy_in_the_working_directory_comes_before_what_is_shipped(folder: Path, name: str) -> None:
    assert find(Path("deploy") / name) == find_default(name) == DEPLOY / name
    own = touch(folder / "deploy" / name)
    assert find(Path("deploy") / name) == find_default(name) == own


def test_a_default_comes_from_the_working_directory_first(folder: Path) -> None:
    touch(folder / "deploy/local.yaml")
    own = touch(folder / "local.yaml")
    assert find_default("local.yaml") == own
    assert find(Path("deploy/local.yaml")) == folder / "deploy/local.yaml"


def test_a_file_that_another_one_names_is_beside_that_one_first(folder: Path) -> None:
    naming = touch(folder / "mine" / "local.yaml")
    assert find(Path("deploy/edge.yaml"), named_by=naming) == DEPLOY / "edge.yaml"
    here = touch(folder / "edge.yaml")
    assert find(Path("edge.yaml"), named_by=naming) == here
    beside = touch(folder / "mine" / "edge.yaml")
    assert find(Path("edge.yaml"), named_by=naming) == find(Path("deploy/edge.yaml"), named_by=naming) == beside


def test_a_copy_of_the_shipped_files_names_its_own_from_anywhere(folder: Path) -> None:
    copies = folder / "copies"
    shutil.copytree(DEPLOY, copies)
    serve_file = read_serve_file(copies / "local.yaml")
    assert serve_file.edge_path() == copies / "edge.yaml"
    assert load_edge(serve_file.edge_path()).catalog == copies / "catalog.yaml"


def test_only_the_name_of_a_default_finds_a_shipped_file(folder: Path) -> None:
    """Another file in the place of the user's own would be served without a word."""
    for name in ("edge.yaml", "deploy/cluster.yaml", "deploy/cluster-edge.yaml", "deploy/prometheus/rules.yml"):
        with pytest.raises(ConfigError) as caught:
            find(Path(name))
        assert caught.value.message == f"{name}: no such file; looked for {folder / name}"


def test_a_missing_file_is_named_with_the_places_searched(folder: Path) -> None:
    naming = folder / "mine" / "local.yaml"
    with pytest.raises(ConfigError) as caught:
        find(Path("nowhere.yaml"), named_by=naming)
    assert caught.value.message == (
        f"nowhere.yaml: no such file; looked for {folder}/mine/nowhere.yaml and {folder}/nowhere.yaml"
    )
    assert resolve(Path("nowhere.yaml"), named_by=naming) == folder / "mine" / "nowhere.yaml"
    with pytest.raises(ConfigError, match="no such file"):
        load_edge(folder / "nowhere.yaml")
    with pytest.raises(ConfigError, match="no such file"):
        find(folder)
