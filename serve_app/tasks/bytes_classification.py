"""Task ``bytes-classification``: the beginning and the end of a file in, what kind of file it is out.

The input is made as magika makes its features: half of it is the beginning of the file without leading white space,
the other half the end without trailing white space, and what a short file leaves over is filled with a number that no
byte has.
"""

from __future__ import annotations

import numpy as np

from serve_app.errors import InvalidRequest
from serve_app.tasks.base import RawInput, Solution, TaskModel
from serve_app.tasks.classes import classification, wanted_labels
from serve_app.tasks.tensors import NUMPY_TYPES

#: White space is looked for in so many bytes at either end.
BLOCK = 4096

#: Stands for no byte.
PADDING = 256

#: Fewer bytes say too little.
LEAST_BYTES = 8


def solve(raw: RawInput, model: TaskModel) -> Solution:
    """The task; option ``top_k``, 5 by default."""
    count = wanted_labels(raw)
    if len(raw.data) < LEAST_BYTES:
        raise InvalidRequest(f"the body must have {LEAST_BYTES} bytes or more, not {len(raw.data)}; send a file")
    tensor = model.contract.inputs[0]
    features = features_of(raw.data, tensor.shape[-1] // 2)
    outputs = yield {tensor.name: features.astype(NUMPY_TYPES[tensor.datatype])[None]}
    return classification(outputs, model, count)


def features_of(data: bytes, length: int) -> np.ndarray[tuple[int], np.dtype[np.int32]]:
    """Return ``length`` numbers of the beginning and ``length`` of the end of a file."""
    beginning, end = data[:BLOCK].lstrip()[:length], data[-BLOCK:].rstrip()[-length:]
    features = np.full(2 * length, PADDING, np.int32)
    features[: len(beginning)] = np.frombuffer(beginning, np.uint8)
    if end:
        features[-len(end) :] = np.frombuffer(end, np.uint8)
    return features
