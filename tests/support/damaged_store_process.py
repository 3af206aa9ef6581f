"""A process that loads a model, damages its files in the store and runs it, and may die of that."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import numpy as np
import tagger_model
from model_support import images, offline, tiny

from serve_app.config.catalog import load_catalog
from serve_app.core.catalog import ModelEntry
from serve_app.errors import ModelChanged, StoreError
from serve_app.models.loader import ModelLoader
from serve_app.models.publishing.publish_catalog import publish
from serve_app.store.model_store import ModelStore


def damage(path: Path, how: str) -> None:
    """Do to a published file what an operator or a bad disk may do."""
    if how == "removed":
        path.unlink()
        return
    path.chmod(0o644)
    if how == "truncated":
        os.truncate(path, 0)
    else:
        path.write_bytes(bytes(path.stat().st_size))


def entry_and_inputs(folder: Path, runtime: str) -> tuple[ModelEntry, dict[str, np.ndarray]]:
    if runtime == "torch":
        return tiny("victim"), {"input": images(1, 32)}
    import yaml

    tagger_model.write(folder / "tagger.onnx")
    content = {"models": {"victim": {"builder": "onnx:tagger.onnx", **tagger_model.ENTRY}}}
    (folder / "catalog.yaml").write_text(yaml.safe_dump(content))
    inputs = {
        "tokens": np.array([[1, 2, 3]]),
        "state": np.zeros((1, 1, tagger_model.WIDTH), np.float32),
        "gain": np.float32(1),
    }
    return load_catalog(folder / "catalog.yaml")[0], inputs


def say(line: str) -> None:
    sys.stdout.write(line + "\n")


def main(folder: Path, runtime: str, how: str, guarded: bool) -> None:
    """Print what the model says when its weights were damaged while it was loaded, and after publishing again."""
    store, loader = ModelStore(folder / "store"), ModelLoader(ModelStore(folder / "store"))
    entry, inputs = entry_and_inputs(folder, runtime)
    other = tiny("other", weights="random:5")
    publish(store, [entry, other], reachable=offline)
    weights = next(file for file in store.manifest("victim").files if file.role == "weights")
    model, neighbor = loader.load("victim"), loader.load("other")
    before = model.run(inputs)
    damage(store.blob_path(weights.name), how)
    if not guarded:
        model._model.run(inputs)  # type: ignore[attr-defined]
    try:
        model.run(inputs)
    except ModelChanged as error:
        say(str(error))
    neighbor.run({"input": images(1, 32)})
    model.unload()
    try:
        loader.load("victim")
    except StoreError as error:
        say(str(error))
    say(f"published {publish(store, [entry, other], reachable=offline).published}")
    healed = loader.load("victim").run(inputs)
    say(f"equal {all(np.array_equal(before[name], healed[name]) for name in before)}")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], sys.argv[3], sys.argv[4] == "guarded")
