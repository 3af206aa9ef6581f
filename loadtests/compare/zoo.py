"""The models of a comparison: published for EdgeServe, and the same saved with ``torch.save`` for the others."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml

from loadtests.compare.figures import models_at_once
from loadtests.compare.processes import ROOT, SideFailed
from serve_app.config.catalog import load_catalog
from serve_app.core.task import ImageInput
from serve_app.store.model_store import ModelStore

CATALOG = Path("deploy/catalog.yaml")
WEIGHTS = "random:0"
_TORCHVISION = "torchvision:"
_PUBLISH_S = 1200.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """Which models, and what they see. ``input_px`` None: what each of them was made for."""

    name: str
    about: str
    input_px: int | None
    without: tuple[str, ...] = ()


SETTINGS = {
    "small": Setting(
        name="small",
        about="images of 96 px: loads weigh more than executions",
        input_px=96,
        # Its constructor is for one size.
        without=("vit_b_16",),
    ),
    "full": Setting(name="full", about="images as the models were made for, 224 px or more", input_px=None),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Zoo:
    """The models of one setting, on disk.

    ``catalog`` is served in compiled forms, and ``mapped_catalog`` as it was published. ``spec`` is a file that tells
    the other sides where what is; ``sizes`` are bytes of weights by model. Every side has ``memory_bytes``: EdgeServe
    counts each model's workspace as well, and who counts models may hold ``slots``.
    """

    setting: Setting
    folder: Path
    store: Path
    catalog: Path
    mapped_catalog: Path
    spec: Path
    sizes: Mapping[str, int]
    memory_bytes: int
    slots: int


def prepare(setting: Setting, cache: Path, *, share: float, whole: bool, say: Callable[[str], None]) -> Zoo:
    """Publish and save what is not there yet.

    Args:
        setting: which models.
        cache: a folder that is kept.
        share: of the bytes of all weights that memory has room for.
        whole: save whole modules, too.
        say: is told what takes long.

    Raises:
        SideFailed: it cannot be done.
    """
    folder = cache / setting.name
    folder.mkdir(parents=True, exist_ok=True)
    store, catalog, mapped_catalog = cache / "store", folder / "catalog.yaml", folder / "mapped.yaml"
    # The others build theirs by name with torchvision.
    entries = [
        entry
        for entry in load_catalog(CATALOG)
        if entry.builder.startswith(_TORCHVISION) and entry.model_id not in setting.without
    ]
    models = {
        _model_id(entry.model_id, setting): {
            "builder": entry.builder.partition("@")[0],
            "weights": WEIGHTS,
            **_input(setting),
        }
        for entry in entries
    }
    catalog.write_text(yaml.safe_dump({"models": models}))
    mapped = {model_id: {**model, "runtime": "torch"} for model_id, model in models.items()}
    mapped_catalog.write_text(yaml.safe_dump({"models": mapped}))
    say(f"publishing and compiling {len(models)} models, where that is not done yet")
    for each in (catalog, mapped_catalog):
        edge = folder / f"publish-{each.name}"
        edge.write_text(
            yaml.safe_dump({"catalog": str(each), "store": str(store), "locations": {"edge": {"memory": "1GiB"}}})
        )
        _run("-m", "serve_app", "publish", "--edge", str(edge), variables={"EDGESERVE_STORE": str(store)})
    published = ModelStore(store).catalog(load_catalog(catalog)).models
    sizes = {model.model_id: model.weights_bytes for model in published}
    memory_bytes = int(share * sum(sizes.values()))
    largest = max(published, key=lambda model: model.profile.size_bytes)
    if largest.profile.size_bytes > memory_bytes:
        raise SideFailed(f"{largest.model_id} does not fit into {memory_bytes} bytes; ask for a larger share")
    spec = folder / "models.json"
    content = {
        model.model_id: {
            "builder": model.builder,
            "file": str(cache / "saved" / f"{_architecture(model.builder)}.pt"),
            "whole": str(cache / "saved" / f"{_architecture(model.builder)}.module.pt") if whole else None,
            "image": asdict(model.task.image or ImageInput()),
            "bytes": model.weights_bytes,
        }
        for model in published
    }
    spec.write_text(json.dumps(content))
    _run("-m", "loadtests.compare.save_models", str(spec), WEIGHTS)
    return Zoo(
        setting=setting,
        folder=folder,
        store=store,
        catalog=catalog,
        mapped_catalog=mapped_catalog,
        spec=spec,
        sizes=sizes,
        memory_bytes=memory_bytes,
        slots=models_at_once(len(sizes), share),
    )


def _model_id(name: str, setting: Setting) -> str:
    # Both settings are in one store, where equal weights lie once.
    return name if setting.input_px is None else f"{name}-{setting.input_px}px"


def _architecture(builder: str) -> str:
    return builder.partition(":")[2]


def _input(setting: Setting) -> dict[str, Any]:
    size = setting.input_px
    return {} if size is None else {"input": {"resize_px": size, "crop_px": size}}


def _run(*arguments: str, variables: Mapping[str, str] | None = None) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **(variables or {})}
    try:
        subprocess.run(
            [sys.executable, *arguments],
            env=environment,
            cwd=ROOT,
            check=True,
            capture_output=True,
            text=True,
            timeout=_PUBLISH_S,
        )
    except subprocess.CalledProcessError as error:
        last = (error.stderr.strip() or error.stdout.strip() or "no output").splitlines()[-1]
        raise SideFailed(f"{arguments[1]} failed: {last}") from None
    except subprocess.TimeoutExpired:
        raise SideFailed(f"{arguments[1]} took more than {_PUBLISH_S:.0f} s") from None
