"""The example of a model of one's own: ``edgeserve up`` could read its files, and its models run as published."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from serve_app.config.catalog import load_catalog
from serve_app.config.edge import load_edge
from serve_app.models.loader import ModelLoader
from serve_app.models.publishing.publish_catalog import publish
from serve_app.serving.launch.serve_config import read_serve_file
from serve_app.store.model_store import ModelStore

FOLDER = Path(__file__).parents[2] / "deploy" / "examples" / "own_model"


@pytest.fixture
def beside_the_example(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where and how its first lines say to run it."""
    monkeypatch.chdir(FOLDER)
    monkeypatch.syspath_prepend(FOLDER)


def test_the_files_agree_with_each_other(beside_the_example: None) -> None:
    serve_file = read_serve_file(Path("local.yaml"))
    settings = load_edge(serve_file.edge_path())
    assert set(serve_file.locations) == set(settings.locations)
    assert {entry.family for entry in load_catalog(settings.catalog)} == {"stripes"}


def test_the_models_of_the_example_are_published_and_run(beside_the_example: None, tmp_path: Path) -> None:
    import torch
    from edge_models import large, small

    entries = load_catalog(load_edge(Path("edge.yaml")).catalog)
    store = ModelStore(tmp_path)
    report = publish(store, entries)
    assert report.failures == ()
    assert set(report.published) == {"stripes_small", "stripes_large"}
    loader = ModelLoader(store)
    image = np.random.default_rng(0).standard_normal((1, 3, 64, 64), dtype=np.float32)
    for entry, factory, seed in zip(entries, (small, large), (1, 2), strict=True):
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            module = factory().eval()
        with torch.inference_mode():
            expected = module(torch.from_numpy(image)).numpy()
        loaded = loader.load(entry.model_id)
        assert np.abs(loaded.run({"input": image})["logits"] - expected).max() < 1e-4
        loaded.unload()
