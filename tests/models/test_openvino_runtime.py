"""What holds of OpenVINO alone: its precision, and how a process uses it for the first time."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import runtime_models
from model_support import offline
from runtime_models import inputs

from serve_app.core.contract_declaration import TensorDeclaration
from serve_app.models.loader import ModelLoader
from serve_app.models.publishing.publish_catalog import publish
from serve_app.models.runtimes.processor import processor
from serve_app.store.model_store import ModelStore

pytestmark = pytest.mark.slow

ov = pytest.importorskip("openvino")

#: The threads wait for the interpreter lock, so that whichever lets it go loses it.
FIRST_USE = """
import sys, threading
from serve_app.models.runtimes.openvino_runtime import library
openvino = library()
sys.setswitchinterval(1e-9)
begun, go = [], []
def use():
    begun.append(1)
    while not go:
        pass
    openvino.Type.f32.to_dtype()
threads = [threading.Thread(target=use) for _ in range(12)]
for thread in threads:
    thread.start()
while len(begun) < len(threads):
    pass
go.append(1)
for thread in threads:
    thread.join()
"""


@pytest.mark.parametrize("attempt", range(2))
def test_threads_that_use_it_for_the_first_time_do_not_wait_for_each_other_for_ever(attempt: int) -> None:
    assert subprocess.run([sys.executable, "-c", FIRST_USE], timeout=90).returncode == 0


def test_it_computes_in_float32_unless_the_entry_says_bfloat16(tmp_path: Path) -> None:
    path, store, given = runtime_models.write_onnx(tmp_path / "network.onnx"), ModelStore(tmp_path / "store"), inputs()
    exact = ov.Core().compile_model(str(path), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    expected = exact.create_infer_request().infer(given)["mixed"]
    largest = float(np.abs(expected).max())
    differences = {}
    for dtype in ("float32", "bfloat16"):
        entry = runtime_models.onnx_entry(
            path, runtime="openvino", dtype=dtype, outputs=(TensorDeclaration(name="mixed"),)
        )
        assert not publish(store, [entry], reachable=offline).failures
        model = ModelLoader(store).load("network")
        answer = model.run(given)["mixed"]
        model.unload()
        assert answer.dtype == np.float32
        differences[dtype] = float(np.abs(answer - expected).max()) / largest
    assert differences["float32"] < 1e-5
    assert differences["bfloat16"] < 0.05
    if "bf16" in processor():
        assert differences["bfloat16"] > 1e-4, "it computes in bfloat16 where the processor can"
