"""``edgeserve init`` writes files that belong together, and never over files that exist."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from ray.autoscaler._private.util import prepare_config, validate_config

from serve_app.cli.main import cli, main
from serve_app.config import default_files
from serve_app.config.catalog import load_catalog
from serve_app.config.default_files import SHIPPED, find, find_default
from serve_app.config.edge import load_edge
from serve_app.config.yaml_files import load_yaml
from serve_app.serving.launch.serve_config import read_serve_file


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def init(*arguments: str) -> Result:
    result = CliRunner().invoke(cli, ["init", *arguments])
    assert result.exit_code == 0, result.output
    return result


def test_it_says_what_it_wrote_and_what_comes_next(folder: Path) -> None:
    result = init()
    assert result.stderr.splitlines() == [f"wrote {name}" for name in SHIPPED]
    assert result.stdout.endswith("with: edgeserve up\n")
    assert {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()} == set(SHIPPED)
    assert init("other folder").stdout.endswith("with: edgeserve up 'other folder/local.yaml'\n")


@pytest.mark.parametrize("name", ["local.yaml", "prometheus/rules.yml"])
def test_no_file_is_overwritten_without_force(folder: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    own = folder / name
    own.parent.mkdir(exist_ok=True)
    own.write_text("mine")
    with pytest.raises(SystemExit) as caught:
        main(["init"])
    assert caught.value.code == 1
    assert capsys.readouterr().err == f"edgeserve: {name} exists and is left as it is; --force overwrites it\n"
    assert [path for path in folder.rglob("*") if path.is_file()] == [own]
    assert own.read_text() == "mine"
    init("--force")
    assert own.read_text() != "mine"


def test_files_written_over_the_shipped_ones_are_still_those_of_before(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    init("elsewhere")
    # A checkout has Ray's file under the name that the Serve file gets here.
    (folder / "cluster.yaml").write_text(default_files.shipped_file("ray-cluster.yaml").read_text())
    shutil.copytree(default_files.shipped_dir(), folder / "deploy")
    monkeypatch.setattr(default_files, "_PACKAGE", folder / "serve_app")
    init("--force")
    assert all((folder / name).read_bytes() == (folder / "elsewhere" / name).read_bytes() for name in SHIPPED)


@pytest.mark.parametrize("name", ["local.yaml", "cluster.yaml"])
def test_serve_files_name_what_is_beside_them(folder: Path, name: str) -> None:
    init("mine")
    serve_file = read_serve_file(Path("mine") / name)
    edge = folder / "mine" / name.replace("local", "edge").replace("cluster", "cluster-edge")
    assert serve_file.edge_path() == edge
    settings = load_edge(edge)
    assert settings.catalog == folder / "mine/catalog.yaml"
    assert load_catalog(settings.catalog)
    assert set(serve_file.locations) == set(settings.locations)


def test_in_its_folder_the_commands_and_serve_find_its_files(folder: Path) -> None:
    init()
    for name in ("local.yaml", "edge.yaml"):
        assert find_default(name) == folder / name
    edges = {app["args"]["edge"] for app in load_yaml(folder / "local.yaml")["applications"]}
    assert [find(Path(edge)) for edge in edges] == [folder / "edge.yaml"]


def test_no_file_names_one_of_the_repository(folder: Path) -> None:
    init()
    for name in SHIPPED:
        text = (folder / name).read_bytes().decode(errors="replace")
        assert "deploy/" not in text
        assert "serve_app/docs" not in text


def test_the_file_for_ray_copies_its_folder_and_deploys_the_file_beside_it(folder: Path) -> None:
    init()
    content = load_yaml(folder / "ray-cluster.yaml")
    validate_config(prepare_config(content))
    assert content["file_mounts"]["~/edgeserve/"] == "./"
    commands = " ".join([*content["setup_commands"], *content["head_start_ray_commands"]])
    assert "--edge cluster-edge.yaml" in commands
    assert "~/edgeserve/stop-ray.sh" in commands
    text = (folder / "ray-cluster.yaml").read_text()
    assert "ray up ray-cluster.yaml" in text
    assert "edgeserve up cluster.yaml --detach" in text
