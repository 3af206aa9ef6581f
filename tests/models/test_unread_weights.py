"""A factory reads its weights once, when it is published, and no worker reads them again."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from model_support import offline
from reading_models import Wide
from safetensors.torch import save_file

from serve_app.core.catalog import ModelEntry
from serve_app.core.contract_declaration import TensorDeclaration
from serve_app.core.task import TaskSpec
from serve_app.models.builders import registry
from serve_app.models.builders.unread_weights import bytes_read
from serve_app.models.loader import ModelLoader
from serve_app.models.publishing.publish_catalog import publish
from serve_app.store.model_store import ModelStore

pytestmark = pytest.mark.slow

FEATURES = TensorDeclaration(name="features", datatype="FP32", shape=("batch", 20))


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Wide:
    """Return a module whose weights are in both files that the factories read."""
    torch.manual_seed(5)
    module = Wide().eval()
    torch.save(module.state_dict(), tmp_path / "weights.pth")
    save_file(module.state_dict(), tmp_path / "weights.safetensors")
    monkeypatch.setenv("READ_WEIGHTS", str(tmp_path / "weights.pth"))
    return module


def entry(factory: str) -> ModelEntry:
    return ModelEntry(
        model_id="reads", builder=f"reading_models:{factory}", weights="pretrained", task=TaskSpec(), inputs=(FEATURES,)
    )


@pytest.mark.parametrize("factory", ["by_torch_load", "by_place", "by_safetensors"])
def test_worker_reads_no_weights_for_the_structure(
    store: ModelStore, module: Wide, factory: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if factory == "by_safetensors":
        monkeypatch.setenv("READ_WEIGHTS", str(tmp_path / "weights.safetensors"))
    report = publish(store, [entry(factory)], reachable=offline)
    assert not report.failures, report.failures
    loader, before = ModelLoader(store), bytes_read()
    loader.prepare("reads")
    assert bytes_read() - before < 300_000
    model = loader.load("reads")
    features = np.linspace(-1, 1, 40, dtype=np.float32).reshape(2, 20)
    with torch.inference_mode():
        expected = module(torch.from_numpy(features)).numpy()
    np.testing.assert_allclose(next(iter(model.run({"features": features}).values())), expected, atol=1e-5)
    model.unload()


def test_structure_has_no_storage_and_torch_load_is_as_before(module: Wide, tmp_path: Path) -> None:
    built = registry.build_on_meta("reading_models:by_torch_load", "pretrained")
    assert all(parameter.is_meta for parameter in built.parameters())
    state = torch.load(tmp_path / "weights.pth", weights_only=True)
    assert torch.equal(state["head.bias"], module.head.bias)


def test_factory_that_reads_in_another_way_is_refused_with_the_cure(store: ModelStore, module: Wide) -> None:
    (failure,) = publish(store, [entry("by_hand")], reachable=offline).failures
    assert re.search(r"reads 4\.\d MB .*every worker would; .*weights: file:PATH", failure.message)
    assert not store.has("reads")
