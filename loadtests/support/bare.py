"""One model run by the bare libraries: ``python -m loadtests.support.bare BUILDER WEIGHTS SHAPE THREADS``.

It answers each line ``NAME COUNT`` with the seconds of so many executions, in a line of JSON; the first line that it
prints has the names that it knows.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from numpy.typing import NDArray

from serve_app.core.catalog import ModelEntry
from serve_app.models.builders.registry import build_with

_OPSET = 18

Run = Callable[[], object]


def contenders(module: torch.nn.Module, image: NDArray[Any], threads: int) -> dict[str, Run]:
    """Return what runs a module once: torch eagerly, and ONNX Runtime and OpenVINO as their documentation shows it."""
    given = torch.from_numpy(image)

    def eager() -> object:
        with torch.inference_mode():
            return module(given)

    runs: dict[str, Run] = {"eager": eager}
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        path = Path(folder) / "graph.onnx"
        torch.backends.mha.set_fastpath_enabled(False)
        torch.onnx.export(module, (given,), str(path), dynamo=False, opset_version=_OPSET, input_names=["input"])
        torch.backends.mha.set_fastpath_enabled(True)
        runs["onnxruntime"] = _onnxruntime(path, image, threads)
        with contextlib.suppress(ImportError):
            runs["openvino"] = _openvino(path, image, threads)
    return runs


def _onnxruntime(path: Path, image: NDArray[Any], threads: int) -> Run:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return lambda: session.run(None, {"input": image})


def _openvino(path: Path, image: NDArray[Any], threads: int) -> Run:
    openvino = importlib.import_module("openvino")

    config = {
        "PERFORMANCE_HINT": "LATENCY",
        # It computes in bfloat16 else, where the processor can.
        "INFERENCE_PRECISION_HINT": "f32",
        "INFERENCE_NUM_THREADS": threads,
        "ENABLE_CPU_PINNING": False,
    }
    compiled = openvino.Core().compile_model(openvino.convert_model(str(path)), "CPU", config)
    asked = compiled.create_infer_request()
    return lambda: asked.infer([image], share_inputs=True)


def main() -> None:
    """Build, then measure what is asked for."""
    builder, weights, shape, threads = sys.argv[1:]
    torch.set_num_threads(int(threads))
    module = build_with(ModelEntry(model_id="bare", builder=builder, weights=weights), weights, None).eval()
    image = np.random.default_rng(0).standard_normal(json.loads(shape), np.float32)
    runs = contenders(module, image, int(threads))
    click.echo(json.dumps(list(runs)))
    for line in sys.stdin:
        name, count = line.split()
        seconds = []
        for _ in range(int(count)):
            began_s = time.perf_counter()
            runs[name]()
            seconds.append(time.perf_counter() - began_s)
        click.echo(json.dumps(seconds))


if __name__ == "__main__":
    main()
