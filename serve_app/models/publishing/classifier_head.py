"""Tell classes from features: whether the numbers of a module are those of a classifier's last layer.

Nothing in a module says what its numbers mean. A classifier of images ends in a matrix product, the linear layer that
has a row for each class; an encoder ends in what comes before that: pooling, a norm, an activation, or a vector that is
brought to length 1. Where the end is not that of a classifier, the catalog must say what the numbers are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final

import torch

from serve_app.core.catalog import ModelEntry
from serve_app.core.contract import TensorSpec
from serve_app.errors import StoreError
from serve_app.models.builders.registry import is_factory
from serve_app.models.torch_internals import OperatorRecorder

#: Matrix products, of which a linear layer is one.
_PRODUCTS: Final = frozenset({"addmm", "mm", "bmm", "baddbmm", "linear", "matmul", "addmv", "mv", "mkldnn_linear"})

#: What may follow the last layer of a classifier: other shapes and types, scales, sums, and probabilities.
_AFTER: Final = frozenset({
    "view", "_unsafe_view", "reshape", "_reshape_alias", "flatten", "squeeze", "unsqueeze", "select", "slice", "expand",
    "permute", "transpose", "t", "detach", "alias", "clone", "contiguous", "_to_copy", "to", "cat", "stack",
    "add", "add_", "sub", "mul", "mul_", "div", "div_", "softmax", "_softmax", "log_softmax", "_log_softmax", "sigmoid",
})  # fmt: skip


def require_known_meaning(entry: ModelEntry, outputs: Sequence[TensorSpec], execute: Callable[[], object]) -> None:
    """Require of a factory's module that its numbers are classes, or that its entry says what they are.

    Args:
        entry: what the catalog asks for.
        outputs: of the module, which has the shape of a classifier.
        execute: runs the module once.

    Raises:
        StoreError: it ends as an encoder does, and the entry names neither task nor accuracy.
    """
    says = entry.task is not None or entry.accuracy is not None
    if says or not is_factory(entry.builder):
        return
    last = _last_operator(execute)
    if last not in _PRODUCTS:
        numbers = outputs[0].shape[-1]
        raise StoreError(
            f"{entry.builder} does not end in a linear layer, so its {numbers} numbers may be features as well as "
            "classes; add task: embedding, or task: image-classification"
        )


def _last_operator(execute: Callable[[], object]) -> str:
    """Return the last operator of a run that is none of those that may follow a classifier's last layer."""
    recorder = OperatorRecorder()
    with torch.inference_mode(), recorder:
        execute()
    return next((name for name in reversed(recorder.names) if name not in _AFTER), "")
