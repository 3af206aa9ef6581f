"""Where the reference workload is looked up, and what replaces it."""

from __future__ import annotations

from pathlib import Path

import pytest

from serve_app.errors import TraceError
from serve_app.simulator.studies.reference_workload import GENERATED, PROFILES_FILE, TRACE_FILE, find_reference


@pytest.fixture(autouse=True)
def empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, with no folder named in the environment."""
    monkeypatch.delenv("EDGESERVE_TRACES", raising=False)
    folder = tmp_path / "working" / "directory"
    folder.mkdir(parents=True)
    monkeypatch.chdir(folder)
    return folder


def recorded(folder: Path) -> Path:
    folder.mkdir(parents=True)
    for name in (TRACE_FILE, PROFILES_FILE):
        (folder / name).touch()
    return folder


def test_the_folder_traces_of_the_working_directory_is_the_default(empty_folder: Path) -> None:
    recorded(empty_folder / "traces")
    reference = find_reference(None)
    assert (reference.trace, reference.models) == (f"azure:traces/{TRACE_FILE}", Path("traces", PROFILES_FILE))
    assert reference.warning is None


def test_the_environment_overrides_the_default_and_the_argument_both(
    empty_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorded(empty_folder / "traces")
    monkeypatch.setenv("EDGESERVE_TRACES", str(recorded(tmp_path / "environment")))
    assert find_reference(None).models == tmp_path / "environment" / PROFILES_FILE
    assert find_reference(recorded(tmp_path / "argument")).models == tmp_path / "argument" / PROFILES_FILE


def test_no_folder_outside_of_the_working_directory_is_tried(empty_folder: Path) -> None:
    recorded(empty_folder.parent / "traces")
    recorded(empty_folder.parent / "shared" / "traces")
    reference = find_reference(None)
    assert (reference.trace, reference.models) == (GENERATED, None)
    assert reference.warning is not None
    assert "--data or EDGESERVE_TRACES" in reference.warning


def test_a_named_folder_without_the_files_is_an_error(empty_folder: Path) -> None:
    recorded(empty_folder / "traces")
    with pytest.raises(TraceError, match="name the folder that has both, or leave --data out"):
        find_reference(Path("absent"))
