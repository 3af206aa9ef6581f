"""Find the batch norms of a foreign module in a process of its own, which a trace may end.

A trace calls the module with symbols instead of tensors. A module that hands them to a native library, as a wrapper of
another runtime does, may crash there; the publisher goes on.
"""

from __future__ import annotations

import logging
from typing import Any

from torch import nn

from serve_app.core.catalog import ModelEntry
from serve_app.errors import StoreError
from serve_app.models.builders.registry import build_on_meta
from serve_app.models.graph_optimizations import foldable_norms, has_norms
from serve_app.models.profiling.fresh_process import call_in_fresh_process
from serve_app.models.profiling.measure_published import KNOWN_BUILDERS
from serve_app.store.manifest import FoldedNorm

logger = logging.getLogger(__name__)


def norms_to_fold(entry: ModelEntry, weights: str, module: nn.Module) -> tuple[FoldedNorm, ...]:
    """Return the batch norms of a built module that can be folded; none where a trace fails or crashes."""
    if not has_norms(module):
        return ()
    if entry.builder.startswith(KNOWN_BUILDERS):
        return foldable_norms(module, entry.model_id)
    arguments = {"builder": entry.builder, "weights": weights, "name": entry.model_id}
    try:
        found = call_in_fresh_process(f"{__name__}:trace_here", arguments, f"the trace of {entry.builder}")
    except StoreError as error:
        logger.warning("model %s keeps its batch norms: %s", entry.model_id, error)
        return ()
    return tuple(FoldedNorm(**pair) for pair in found["folded"])


def trace_here(builder: str, weights: str, name: str) -> dict[str, Any]:
    """Trace a module without its weights; return the pairs."""
    folded = foldable_norms(build_on_meta(builder, weights), name)
    return {"folded": [{"conv": pair.conv, "norm": pair.norm} for pair in folded]}
