"""What happens to a loaded model when somebody writes to, truncates or removes its files in the store."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from model_support import images

from serve_app.models.loader import ModelLoader
from serve_app.store.model_store import ModelStore

pytestmark = pytest.mark.slow

SUPPORT = Path(__file__).parent.parent / "support"


def damaged(folder: Path, runtime: str, how: str, mode: str = "guarded") -> subprocess.CompletedProcess[str]:
    paths = os.pathsep.join([str(SUPPORT), str(SUPPORT.parent.parent)])
    return subprocess.run(
        [sys.executable, str(SUPPORT / "damaged_store_process.py"), str(folder), runtime, how, mode],
        env={**os.environ, "PYTHONPATH": paths},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


@pytest.mark.slow
@pytest.mark.parametrize("how", ["overwritten", "truncated", "removed"])
@pytest.mark.parametrize("runtime", ["torch", "onnxruntime"])
def test_damage_under_a_loaded_model_is_a_sentence_and_publishing_again_heals_it(
    tmp_path: Path, runtime: str, how: str
) -> None:
    if runtime == "onnxruntime":
        pytest.importorskip("onnx")
    done = damaged(tmp_path, runtime, how)
    assert done.returncode == 0, done.stderr
    changed, load, published, equal = done.stdout.splitlines()
    assert "was changed or removed after it was published; publish it again" in changed
    assert {"overwritten": "are corrupt", "truncated": "have 0 bytes instead of", "removed": "are missing"}[how] in load
    assert published == "published ('victim',)"
    assert equal == "equal True"


@pytest.mark.slow
def test_without_the_look_at_the_files_a_truncated_one_would_kill_the_worker(tmp_path: Path) -> None:
    assert damaged(tmp_path, "torch", "truncated", "unguarded").returncode == -signal.SIGBUS


def test_published_files_are_read_only(shared: ModelStore) -> None:
    for name in shared.blob_names():
        assert stat.S_IMODE(shared.blob_path(name).stat().st_mode) == 0o444


def test_a_guarded_model_answers_what_the_model_answers(shared: ModelStore) -> None:
    model = ModelLoader(shared).load("tied")
    first = model.run({"input": images(2, 32)})["logits"]
    assert (first == model.run({"input": images(2, 32)})["logits"]).all()
    model.unload()
