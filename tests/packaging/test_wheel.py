"""The wheel as a user meets it: installed elsewhere, it serves from an empty folder."""

from __future__ import annotations

import shutil
import tempfile
import zipfile
from collections.abc import Iterator
from email import message_from_string
from pathlib import Path

import pytest
import yaml
from deployment_support import LOCATIONS, encoded, family_of, free_port
from PIL import Image
from wheel_support import ROOT, Installation, build_wheel, install

from serve_app import __version__
from serve_app.config.default_files import SHIPPED, shipped_file

MODELS = ("squeezenet1_1", "shufflenet_v2_x0_5")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_wheel(ROOT, tmp_path_factory.mktemp("dist"))


@pytest.fixture(scope="module")
def installed(wheel: Path) -> Iterator[Installation]:
    # Ray's sockets live below its folder, and their paths must be short.
    folder = Path(tempfile.mkdtemp(prefix="es-"))
    variables = {
        "RAY_TMPDIR": str(folder),
        "XDG_CACHE_HOME": str(folder / "cache"),
        "EDGESERVE_STORE": str(folder / "store"),
    }
    try:
        yield install(wheel, folder, dependencies=False, variables=variables)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def empty(installed: Installation) -> Iterator[Path]:
    """The working directory of the commands, empty before and after."""
    assert not list(installed.work.iterdir())
    yield installed.work
    for path in installed.work.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def configure(folder: Path) -> str:
    """Edit what ``edgeserve init`` has written: small models, and a free port. Returns the address."""
    entry = {"weights": "random:0", "family": "imagenet"}
    models = {name: {"builder": f"torchvision:{name}", **entry} for name in MODELS}
    (folder / "catalog.yaml").write_text(yaml.safe_dump({"models": models}))
    local, port = folder / "local.yaml", free_port()
    local.write_text(local.read_text().replace("port: 8000", f"port: {port}"))
    return f"http://127.0.0.1:{port}"


def test_the_wheel_has_all_code_and_the_shipped_files(wheel: Path) -> None:
    code = {str(path.relative_to(ROOT)) for path in (ROOT / "serve_app").rglob("*.py")}
    with zipfile.ZipFile(wheel) as content:
        names = set(content.namelist())
        assert {*code, "serve_app/py.typed", "serve_app/workload/default_profiles.csv"} <= names
        for name in SHIPPED:
            assert content.read(f"serve_app/defaults/{name}") == shipped_file(name).read_bytes()
    assert {name.split("/")[0] for name in names} == {"serve_app", f"edgeserve-{__version__}.dist-info"}


def test_the_wheel_says_what_it_is(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as content:
        folder = f"edgeserve-{__version__}.dist-info"
        metadata = message_from_string(content.read(f"{folder}/METADATA").decode())
        assert f"{folder}/licenses/LICENSE" in content.namelist()
    assert (metadata["Name"], metadata["Version"]) == ("edgeserve", __version__)
    assert (metadata["License-Expression"], metadata["Author"]) == ("Apache-2.0", "The EdgeServe developers")
    urls = {url.split(",")[0] for url in metadata.get_all("Project-URL", [])}
    assert urls == {"Homepage", "Source", "Issues", "Changelog"}


def test_code_and_defaults_come_from_the_wheel(installed: Installation, empty: Path) -> None:
    script = (
        "import serve_app; from serve_app.config.default_files import find_default;"
        "from serve_app.serving.launch.serve_config import read_serve_file;"
        "from serve_app.config.edge import load_edge;"
        "local = read_serve_file(find_default('local.yaml')); edge = local.edge_path();"
        "print(serve_app.__file__, local.path, edge, load_edge(edge).catalog, sep='\\n')"
    )
    package = installed.site_packages / "serve_app"
    defaults = [package / "defaults" / name for name in ("local.yaml", "edge.yaml", "catalog.yaml")]
    assert installed.python(script).split() == [str(path) for path in (package / "__init__.py", *defaults)]
    refused = installed.edgeserve("publish", "nonsense", fails=True).stderr
    assert f"no model nonsense in {package}/defaults/catalog.yaml" in refused


def test_serve_finds_the_defaults_and_what_init_has_written(installed: Installation, empty: Path) -> None:
    """``serve run`` calls the builder in the working directory, with the arguments as they are in the file."""
    script = (
        "import sys, yaml; from serve_app.config.default_files import find; from pathlib import Path;"
        "files = [yaml.safe_load(Path(name).read_text()) for name in sys.argv[1:]];"
        "print({str(find(Path(app['args']['edge']))) for file in files for app in file['applications']})"
    )
    package = installed.site_packages / "serve_app"
    shipped = f"sys.argv.append('{package}/defaults/local.yaml')"
    assert installed.python(f"import sys; {shipped}; {script}") == f"{{'{package}/defaults/edge.yaml'}}\n"
    installed.edgeserve("init")
    assert installed.python(f"import sys; sys.argv.append('local.yaml'); {script}") == f"{{'{empty}/edge.yaml'}}\n"


def test_simulate_works_in_an_empty_folder(installed: Installation, empty: Path) -> None:
    trace = "zipf:models=12&requests=300&rate=0.2"
    assert "lru" in installed.edgeserve("simulate", "--trace", trace, "--policy", "lru").stdout


def test_what_init_writes_serves_a_photo_and_stops(installed: Installation, empty: Path) -> None:
    photo = installed.folder / "photo.jpg"
    photo.write_bytes(encoded(Image.new("RGB", (320, 240), "orange"), "JPEG"))
    installed.edgeserve("init")
    url = configure(empty)
    started = installed.edgeserve("up", "--detach").stdout
    try:
        assert f"configuration {empty}/local.yaml" in started
        answer = installed.edgeserve("infer", MODELS[0], str(photo), "--url", url, "--location", "tokyo").stdout
        # By then it may have been preloaded.
        assert f"\n{MODELS[0]} at " in answer
        assert answer.count("%") == 5
        shown = installed.edgeserve("status", "--url", url).stdout
        assert all(f"\n{location} holds " in shown for location in LOCATIONS)
    finally:
        installed.edgeserve("down")
    assert not family_of(installed.folder.parent)
