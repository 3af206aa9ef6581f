"""Stack the inputs of several requests along the axis ``batch``, and give each its rows of the outputs."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from serve_app.core.contract import BATCH, Contract
from serve_app.tasks.tensors import Tensors


def join(contract: Contract, requests: Sequence[Tensors]) -> Tensors:
    """Return the inputs of all requests as one; all axes but ``batch`` must have equal sizes."""
    return {
        spec.name: np.concatenate([each[spec.name] for each in requests], axis=spec.axes.index(BATCH))
        for spec in contract.inputs
    }


def split(contract: Contract, outputs: Tensors, rows: Sequence[int]) -> list[Tensors]:
    """Return the outputs of each request, which has brought so many ``rows``.

    Raises:
        ValueError: an output has another number of rows than the inputs.
    """
    ends = np.cumsum(rows)
    parts: dict[str, list[np.ndarray]] = {}
    for spec in contract.outputs:
        array, axis = outputs[spec.name], spec.axes.index(BATCH)
        if array.shape[axis] != ends[-1]:
            raise ValueError(f"output {spec.name!r} has {array.shape[axis]} rows instead of {ends[-1]}")
        # Copied: a view would keep the outputs of all requests in memory until the last of them is answered.
        parts[spec.name] = [part.copy() for part in np.split(array, ends[:-1], axis)]
    return [{name: own[index] for name, own in parts.items()} for index in range(len(rows))]
