import dataclasses
import errno
import json
import os
import resource
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from model_support import SMALL_INPUT, VISION, check_content, offline, tiny
from safetensors import safe_open

from serve_app.core.task import ImageInput
from serve_app.errors import StoreError
from serve_app.models.publishing.publish_catalog import publish
from serve_app.store.durable_files import explain_os_errors
from serve_app.store.model_store import ModelStore
from serve_app.store.safetensors_writer import BlobTensor, plan_blob, write_blob


@pytest.fixture
def small(store: ModelStore) -> ModelStore:
    """A store of its own with one small model, for tests that damage it."""
    assert not publish(store, [tiny("tied")], reachable=offline).failures
    return store


def blob_of(store: ModelStore, model_id: str = "tied") -> Path:
    return store.blob_path(store.manifest(model_id).files[0].name)


def test_routers_read_the_store_without_torch() -> None:
    program = (
        "import sys, serve_app.store.model_store, serve_app.store.manifest, serve_app.tasks.image_classification\n"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True, cwd=Path(__file__).parents[2])


def test_store_holds_nothing_but_json_and_safetensors(shared: ModelStore) -> None:
    files = [path for path in shared.root.rglob("*") if path.is_file()]
    assert {path.suffix for path in files} == {"", ".json", ".safetensors"}
    assert [path.name for path in files if not path.suffix] == ["lock"]
    for path in files:
        if path.suffix == ".json":
            json.loads(path.read_bytes())
        elif path.suffix == ".safetensors":
            with safe_open(path, "np") as blob:
                assert list(blob.keys())


def test_offsets_of_the_plan_are_those_that_safetensors_reads(tmp_path: Path) -> None:
    tensors = [
        BlobTensor(name="odd", dtype="U8", shape=(3,)),
        BlobTensor(name="half", dtype="F16", shape=(2,)),
        BlobTensor(name="wide", dtype="I64", shape=()),
    ]
    layout = plan_blob(tensors)
    content = {"odd": b"\1\2\3", "half": b"\0\x3c\0\x40", "wide": (7).to_bytes(8, "little")}
    path = tmp_path / "blob.safetensors"
    write_blob(path, layout, (memoryview(content[tensor.name]) for tensor in layout.order))
    with safe_open(path, "np") as blob:
        assert blob.get_tensor("odd").tolist() == [1, 2, 3]
        assert blob.get_tensor("half").tolist() == [1.0, 2.0]
        assert blob.get_tensor("wide") == 7
    data = path.read_bytes()
    assert all(data[start:].startswith(content[name]) for name, start in layout.offsets.items())
    assert all(layout.offsets[name] % size == 0 for name, size in (("odd", 1), ("half", 2), ("wide", 8)))


def test_an_empty_store_publishes_nothing_and_is_not_made_by_reading(tmp_path: Path) -> None:
    store = ModelStore(tmp_path / "absent")
    assert store.published() == ()
    assert not store.has("tied")
    assert len(store.catalog([tiny("tied")])) == 0
    with pytest.raises(StoreError, match="'tied' is not in the store"):
        store.manifest("tied")
    assert not store.root.exists()


def test_names_that_leave_the_store_are_refused(store: ModelStore) -> None:
    with pytest.raises(StoreError, match="is not the name of a model"):
        store.manifest("../../etc/passwd")


def test_flipped_bit_that_sizes_do_not_show_is_found(small: ModelStore) -> None:
    blob = blob_of(small)
    check_content(small, "tied")
    content = bytearray(blob.read_bytes())
    content[-1] ^= 1
    blob.chmod(0o644)
    blob.write_bytes(content)
    small.check_sizes("tied")
    with pytest.raises(StoreError, match="are corrupt"):
        small.require_verified(small.manifest("tied").files[0], "tied")


def test_publishing_with_force_heals_a_corrupt_blob(small: ModelStore) -> None:
    blob = blob_of(small)
    blob.chmod(0o644)
    blob.write_bytes(bytes(blob.stat().st_size))
    publish(small, [tiny("tied")], reachable=offline, force=True)
    check_content(small, "tied")


@pytest.mark.parametrize("damage", ["truncate", "remove"])
def test_incomplete_blob_is_found_and_published_again(small: ModelStore, damage: str) -> None:
    blob = blob_of(small)
    if damage == "truncate":
        blob.chmod(0o644)
        os.truncate(blob, blob.stat().st_size - 1)
    else:
        blob.unlink()
    with pytest.raises(StoreError, match="instead of" if damage == "truncate" else "missing"):
        small.check_sizes("tied")
    assert publish(small, [tiny("tied")], reachable=offline).published == ("tied",)
    check_content(small, "tied")


def test_catalog_lays_the_entry_over_the_manifest(small: ModelStore) -> None:
    entry = tiny("tied", family="toys", accuracy=0.25, pinned=True)
    model = small.catalog([tiny("missing"), entry])["tied"]
    assert (model.family, model.profile.accuracy, model.pinned) == ("toys", 0.25, True)
    brighter = ImageInput(resize_px=40, crop_px=32, mean=(0, 0, 0))
    entry = dataclasses.replace(entry, input=brighter)
    assert small.catalog([entry])["tied"].task.image == brighter
    assert small.catalog([tiny("tied")])["tied"].task.image == SMALL_INPUT


def test_catalog_keeps_the_order_of_the_entries(shared: ModelStore) -> None:
    backwards = tuple(reversed(VISION))
    assert [model.model_id for model in shared.catalog(backwards).models] == [entry.model_id for entry in backwards]


def test_catalog_leaves_out_what_was_published_from_another_entry(
    small: ModelStore, caplog: pytest.LogCaptureFixture
) -> None:
    assert "tied" not in small.catalog([tiny("tied", weights="random:4")])
    assert "its entry changed" in caplog.text


def test_one_malformed_manifest_does_not_hide_the_other_models(
    small: ModelStore, caplog: pytest.LogCaptureFixture
) -> None:
    bad, tied = small.fingerprinted([tiny("bad"), tiny("tied")])
    path = small.root / "models" / "bad" / f"{bad.fingerprint}-{'0' * 16}.json"
    path.parent.mkdir()
    path.write_text("{")
    catalog = small.catalog([bad, tied])
    assert [model.model_id for model in catalog.models] == ["tied"]
    assert "is malformed" in catalog.problems["bad"]
    assert f"{path} is malformed" in caplog.text


def test_manifest_under_the_name_of_another_model_is_refused(small: ModelStore) -> None:
    shutil.copytree(small.root / "models" / "tied", small.root / "models" / "other")
    with pytest.raises(StoreError, match="is of model 'tied'"):
        small.manifest("other")


def test_commit_refuses_a_manifest_whose_weights_are_not_there(small: ModelStore) -> None:
    manifest = small.manifest("tied")
    blob_of(small).unlink()
    with pytest.raises(StoreError, match="missing"):
        small.commit(manifest)


def test_sweep_removes_what_no_manifest_refers_to(small: ModelStore) -> None:
    orphan = small.root / "blobs" / f"{'0' * 64}.safetensors"
    orphan.write_bytes(b"orphan")
    dead = subprocess.Popen(["true"])
    dead.wait()
    (small.root / "tmp" / f"{dead.pid}-abc.safetensors").write_bytes(b"half")
    (small.root / "tmp" / "garbage").write_bytes(b"?")
    alive = small.root / "tmp" / "1-abc.safetensors"
    alive.write_bytes(b"being written")
    assert small.sweep() == len(b"orphan") + len(b"half") + len(b"?")
    assert not orphan.exists()
    assert alive.exists()
    alive.unlink()
    check_content(small, "tied")


def test_sweep_keeps_weights_while_a_manifest_cannot_be_read(small: ModelStore) -> None:
    later = small.root / "models" / "later.json"
    later.write_text('{"format": 2}')
    orphan = small.root / "blobs" / f"{'0' * 64}.safetensors"
    orphan.write_bytes(b"perhaps of the later format")
    small.sweep()
    assert orphan.exists()


def test_second_publisher_waits_for_the_first(store: ModelStore) -> None:
    waited, done = threading.Event(), threading.Event()

    def second() -> None:
        with ModelStore(store.root).exclusive(on_wait=waited.set):
            done.set()

    with store.exclusive(), store.exclusive():
        thread = threading.Thread(target=second)
        thread.start()
        assert waited.wait(10)
        assert not done.is_set()
    thread.join(10)
    assert done.is_set()


def test_equal_blobs_are_stored_once(store: ModelStore) -> None:
    first = store.put_blob(lambda path: path.write_bytes(b"weights") and None)
    inode = store.blob_path(first.name).stat().st_ino
    assert store.put_blob(lambda path: path.write_bytes(b"weights") and None) == first
    assert store.blob_path(first.name).stat().st_ino == inode


@pytest.fixture
def no_room() -> Iterator[None]:
    """Limit files to 64 KiB, which to a writer is the same as a full disk; models are written by a child process."""

    def limit(size: int) -> None:
        for process in (psutil.Process(), *psutil.Process().children(recursive=True)):
            resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (size, hard))

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    limit(64 * 1024)
    yield
    limit(soft)


@pytest.mark.usefixtures("no_room")
def test_file_that_cannot_grow_fails_with_advice_and_leaves_nothing(store: ModelStore) -> None:
    report = publish(store, [tiny("tied")], reachable=offline)
    assert "make room" in report.failures[0].message
    assert not list((store.root / "blobs").iterdir())
    assert not store.has("tied")


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting needs root")
def test_full_disk_leaves_weights_usable_and_nothing_behind(small: ModelStore, monkeypatch: pytest.MonkeyPatch) -> None:
    def write_half(path: Path, text: str) -> int:
        path.write_bytes(text.encode()[: len(text) // 2])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    os.utime(blob_of(small))
    before = set((small.root / "verified").iterdir())
    monkeypatch.setattr(Path, "write_text", write_half)
    small.require_verified(small.manifest("tied").files[0], "tied")
    assert set((small.root / "verified").iterdir()) == before


def test_full_disk_fails_with_advice_and_leaves_nothing(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", disk], check=False).returncode:
        pytest.skip("this machine does not allow mounting")
    try:
        store = ModelStore(disk)
        report = publish(
            store, [tiny("tied"), tiny("wide", "wide"), tiny("other", weights="random:5")], reachable=offline
        )
        assert report.published == ("tied", "other")
        assert "No space left on device; " in report.failures[0].message
        assert not list((disk / "tmp").iterdir())
        check_content(store, "tied")
    finally:
        subprocess.run(["umount", disk], check=True)


@pytest.mark.parametrize(
    ("number", "advice"),
    [(errno.ENOSPC, "make room"), (errno.EACCES, "give this user the right"), (errno.EIO, "check the store directory")],
)
def test_os_errors_say_what_to_do(tmp_path: Path, number: int, advice: str) -> None:
    with pytest.raises(StoreError, match=advice), explain_os_errors("write", tmp_path / "absent" / "deeper"):
        raise OSError(number, os.strerror(number))


def test_store_below_a_file_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="Not a directory"):
        publish(ModelStore(tmp_path / "file"), [tiny("tied")], reachable=offline)
