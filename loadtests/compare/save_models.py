"""Save the models of a comparison with ``torch.save``: ``python -m loadtests.compare.save_models SPEC WEIGHTS``."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

from serve_app.core.catalog import ModelEntry
from serve_app.models.builders.registry import build


def save(spec: Path, weights: str) -> None:
    """Save what is not there yet: state dicts, and whole modules where the specification names files for them."""
    for model_id, model in json.loads(spec.read_text()).items():
        files = {key: Path(model[key]) for key in ("file", "whole") if model[key]}
        if all(file.is_file() for file in files.values()):
            continue
        module = build(ModelEntry(model_id=model_id, builder=model["builder"], weights=weights), weights)
        for key, file in files.items():
            file.parent.mkdir(parents=True, exist_ok=True)
            # Renamed when it is whole: a run that was interrupted must not leave half a file.
            partial = file.with_suffix(".partial")
            torch.save(module.state_dict() if key == "file" else module, partial)
            partial.rename(file)


if __name__ == "__main__":
    save(Path(sys.argv[1]), sys.argv[2])
