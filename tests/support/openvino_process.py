"""What a process keeps of OpenVINO's kernels once their models are gone: bytes, after convolutions of many shapes."""

from __future__ import annotations

import gc
import sys

import numpy as np

from serve_app.models.process_memory import give_back_free_memory, process_memory
from serve_app.models.runtimes.openvino_runtime import DEVICE, core, library, settings

SHAPES = 60


def resident_bytes() -> int:
    gc.collect()
    give_back_free_memory()
    return process_memory().rss_bytes


def run(ops: object, channels: int, side: int) -> None:
    given = ops.parameter([1, 8, side, side], np.float32)
    node = given
    for kernel in (3, 5, 1):
        inputs = node.output(0).shape[1]
        weights = ops.constant(np.full((channels, inputs, kernel, kernel), 0.01, np.float32))
        node = ops.relu(ops.convolution(node, weights, [1, 1], [1, 1], [1, 1], [1, 1]))
    model = library().Model([node], [given], "convolutions")
    core().compile_model(model, DEVICE, settings("float32"))(np.ones((1, 8, side, side), np.float32))


def main() -> None:
    import openvino.opset13 as ops

    for turn in range(3):
        run(ops, 8, 9 + turn)
    before = resident_bytes()
    for turn in range(SHAPES):
        run(ops, 8 + 8 * (turn % 6), 12 + turn)
    sys.stdout.write(str(resident_bytes() - before))


main()
