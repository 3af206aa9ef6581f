"""Build a model and write its files in a process of its own: whatever its code does there, the publisher goes on.

Factories, exported programs and native libraries may crash, end their process, or take all memory. What they change in
their process, such as a library that they patch, is gone with it.
"""

from __future__ import annotations

import base64
import logging
import pickle
from pathlib import Path
from typing import Any

from serve_app.core.catalog import ModelEntry
from serve_app.errors import EdgeServeError
from serve_app.models.builders import registry
from serve_app.models.profiling.fresh_process import call_in_fresh_process, tell
from serve_app.models.publishing.described import ModuleStage, OnStage
from serve_app.models.publishing.publish_graph import publish_graph
from serve_app.models.publishing.publish_module import publish_module
from serve_app.models.threads import parallel_inferences, use_threads
from serve_app.store.manifest import Manifest
from serve_app.store.model_store import ModelStore

logger = logging.getLogger(__name__)


def publish_apart(store: ModelStore, entry: ModelEntry, weights: str, file: Path | None, on_stage: OnStage) -> Manifest:
    """Build, write, compare and measure a model; return its manifest, which is to be committed.

    Args:
        store: where to; the caller holds ``store.exclusive``.
        entry: what the catalog asks for.
        weights: the weights to use, which may differ from those that the entry asks for.
        file: of these weights, or of the graph; None if the builder brings them.
        on_stage: called with every stage, and the bytes of the weights.

    Raises:
        DownloadFailed: the library of the builder cannot fetch the weights.
        StoreError: the model cannot be built or served, or its process crashes.
    """
    arguments = {
        "root": str(store.root.absolute()),
        # Between two processes of one program.
        "entry": base64.b64encode(pickle.dumps(entry)).decode(),
        "weights": weights,
        "file": None if file is None else str(file),
        "parallel": parallel_inferences(),
    }
    made = call_in_fresh_process(
        f"{__name__}:publish_here",
        arguments,
        entry.builder,
        "built and run",
        lambda told: on_stage(told["stage"], told["bytes"]),
    )
    return Manifest.from_json(made["manifest"].encode(), f"of {entry.model_id}")


def publish_here(root: str, entry: str, weights: str, file: str | None, parallel: int) -> dict[str, Any]:
    """Do so in this process, whose caller holds the store; the arguments and the result can be carried by JSON."""
    wanted: ModelEntry = pickle.loads(base64.b64decode(entry))
    store = ModelStore(Path(root))
    store.assume_exclusive()
    # Threads of one inference wait for each other actively: on a busy machine two take several times as long as one.
    use_threads(1, parallel)
    path = None if file is None else Path(file)

    def on_stage(stage: ModuleStage, weights_bytes: int) -> None:
        tell({"stage": stage, "bytes": weights_bytes})

    try:
        if wanted.builder.startswith("onnx:"):
            assert path is not None
            manifest = publish_graph(store, wanted, path, on_stage)
        else:
            manifest = publish_module(store, wanted, weights, registry.build_with(wanted, weights, path), on_stage)
    except EdgeServeError:
        raise
    except Exception:
        logger.exception("publishing model %s", wanted.model_id)
        raise
    return {"manifest": manifest.to_json().decode()}
