"""Tell classes from features: whether the numbers of a module are those of a classifier's last layer.

Nothing in a module says what its numbers mean. A classifier of images ends in a matrix product, the linear layer that
has a row for each class; an encoder ends in what comes before that: pooling, a norm, an activation, or a vector that is
brought to length 1, and gives many numbers. Where the end is that of an encoder, the catalog must say what the numbers
are.
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

#: What is the last of an encoder: pooling, norms and activations.
_ENDS: Final = frozenset({
    "adaptive_avg_pool1d", "adaptive_avg_pool2d", "_adaptive_avg_pool2d", "adaptive_avg_pool3d",
    "_adaptive_avg_pool3d", "avg_pool2d", "max_pool2d", "max_pool2d_with_indices", "mean", "amax",
    "layer_norm", "native_layer_norm", "batch_norm", "native_batch_norm", "_native_batch_norm_legit_no_training",
    "group_norm", "native_group_norm", "linalg_vector_norm", "norm", "rsqrt", "clamp_min",
    "relu", "relu_", "leaky_relu", "elu", "gelu", "silu", "silu_", "hardswish", "hardswish_", "hardtanh", "hardtanh_",
    "tanh", "clamp",
})  # fmt: skip

#: Fewer numbers are taken for classes in any case: features are many.
_FEATURES: Final = 64

#: What may follow the last layer of a classifier: other shapes and types, scales, sums, and probabilities.
_AFTER: Final = frozenset({
    "view", "_unsafe_view", "reshape", "_reshape_alias", "flatten", "squeeze", "unsqueeze", "select", "slice",
    "expand", "expand_as", "permute", "transpose", "t", "detach", "alias", "clone", "contiguous", "_to_copy", "to",
    "cat", "stack", "add", "add_", "sub", "mul", "mul_", "div", "div_", "softmax", "_softmax", "log_softmax",
    "_log_softmax", "sigmoid",
})  # fmt: skip


def require_known_meaning(entry: ModelEntry, outputs: Sequence[TensorSpec], execute: Callable[[], object]) -> None:
    """Require of a factory's module that it does not end as an encoder does, or that its entry says what it gives.

    Args:
        entry: what the catalog asks for.
        outputs: of the module, which has the shape of a classifier.
        execute: runs the module once.

    Raises:
        StoreError: it ends as an encoder does, and the entry names neither task nor accuracy.
    """
    says = entry.task is not None or entry.accuracy is not None
    numbers = outputs[0].shape[-1]
    if says or numbers < _FEATURES or not is_factory(entry.builder):
        return
    if _last_operator(execute) in _ENDS:
        raise StoreError(
            f"{entry.builder} ends as an encoder does, so its {numbers} numbers may be features as well as "
            "classes; add task: embedding, or task: image-classification"
        )


def _last_operator(execute: Callable[[], object]) -> str:
    """Return the last operator of a run that is none of those that may follow a classifier's last layer."""
    recorder = OperatorRecorder()
    with torch.inference_mode(), recorder:
        execute()
    return next((name for name in reversed(recorder.names) if name not in _AFTER), "")
