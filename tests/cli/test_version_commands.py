"""``edgeserve versions``, ``rollback``, ``canary``, ``remove``, ``store gc``: what they say and what they change."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from serve_app.cli.main import main
from serve_app.store.model_store import ModelStore
from serve_app.store.projects import ModelVersions, Project, first_published


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModelStore:
    """A store in which the project of the working directory has two versions of ``toy``; their files do not matter."""
    (tmp_path / "edge.yaml").write_text("catalog: catalog.yaml\nstore: store\nlocations: {paris: {memory: 64MiB}}\n")
    (tmp_path / "catalog.yaml").write_text("models:\n  toy: {builder: 'torchvision:squeezenet1_1'}\n")
    monkeypatch.chdir(tmp_path)
    store = ModelStore(tmp_path / "store")
    versions = first_published("f-a", 1.0).published("f-b", 2.0)
    store.projects.update(project(), lambda state: state.with_versions("toy", versions))
    return store


def project() -> Project:
    return Project.of(Path("catalog.yaml"))


def toy(store: ModelStore) -> ModelVersions:
    state = store.projects.read(project().key)
    assert state is not None
    return state.versions("toy")


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    printed = capsys.readouterr()
    assert printed.err.count("\n") <= 1, "an error is one line"
    return int(ended.value.code or 0), printed.out, printed.err


def test_versions_say_which_of_them_answers(store: ModelStore, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "versions", "--json")
    rows = json.loads(out)
    assert code == 0
    assert [(row["model"], row["version"], row["state"]) for row in rows] == [("toy", 1, "-"), ("toy", 2, "current")]
    assert "current" in run(capsys, "versions", "toy")[1]


def test_a_rollback_says_what_answers_now(store: ModelStore, capsys: pytest.CaptureFixture[str]) -> None:
    assert "version 1 of toy answers" in run(capsys, "rollback", "toy")[1]
    assert (toy(store).current, toy(store).at_once) == (1, True)
    assert "version 2 of toy answers" in run(capsys, "rollback", "toy", "--to", "2")[1]
    assert "nothing changes: version 2 of toy answers" in run(capsys, "rollback", "toy", "--to", "2")[1]


def test_a_canary_has_its_share_and_is_promoted(store: ModelStore, capsys: pytest.CaptureFixture[str]) -> None:
    run(capsys, "rollback", "toy")
    assert "version 2 answers 10% of the requests" in run(capsys, "canary", "toy", "10%")[1]
    assert (toy(store).canary, toy(store).canary_share) == (2, 0.1)
    assert "version 2 of toy answers" in run(capsys, "canary", "toy", "100%")[1]
    assert (toy(store).current, toy(store).canary) == (2, None)


def test_a_version_or_a_model_is_removed(store: ModelStore, capsys: pytest.CaptureFixture[str]) -> None:
    assert "without version 1" in run(capsys, "remove", "toy", "--version", "1")[1]
    assert toy(store).numbers == (2,)
    assert "toy is removed" in run(capsys, "remove", "toy")[1]
    assert run(capsys, "versions")[0] == 1


def test_store_gc_prints_the_bytes(store: ModelStore, capsys: pytest.CaptureFixture[str]) -> None:
    (store.root / "blobs").mkdir(exist_ok=True)
    (store.root / "blobs" / f"{'0' * 64}.weights").write_bytes(bytes(1000))
    assert "1000 bytes (0.0 MB) would be freed" in run(capsys, "store", "gc", "--dry-run")[1]
    assert (store.root / "blobs" / f"{'0' * 64}.weights").exists()
    code, out, _ = run(capsys, "store", "gc", "--keep", "1")
    assert code == 0
    assert "toy version 1 is no longer needed" in out
    assert "1000 bytes (0.0 MB) freed" in out
    assert not (store.root / "blobs" / f"{'0' * 64}.weights").exists()


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (("rollback", "nobody"), 1, "model 'nobody' of .* is not published; run: edgeserve publish nobody"),
        (("rollback", "toy", "--to", "7"), 1, "there is no version 7; there are 1, 2"),
        (("remove", "toy", "--version", "2"), 1, "version 2 answers requests; make another one current first"),
        (("canary", "toy", "much"), 2, "'much' is not a share of the requests; write it like 10%"),
        (("canary", "toy", "110%"), 2, "is not a share"),
        (("publish", "--canary", "-1"), 2, "is not a share"),
        (("store",), 2, "Missing command"),
        (("store", "gc", "--keep", "0"), 2, "0 is not in the range"),
    ],
)
def test_what_cannot_be_done_is_one_line_that_says_why(
    store: ModelStore, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], code: int, says: str
) -> None:
    before = toy(store)
    ended, _, err = run(capsys, *arguments)
    assert ended == code
    assert re.search(says, err)
    assert toy(store) == before
