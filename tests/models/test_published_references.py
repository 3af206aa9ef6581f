"""Models of a catalog whose files are elsewhere, published as a user does it."""

import hashlib
from pathlib import Path

import numpy as np
import pytest
import torch
from file_server import FileServer, serving
from model_support import classify, images, offline, tiny

from serve_app.config.catalog import load_catalog
from serve_app.errors import ConfigError
from serve_app.models.builders import registry
from serve_app.models.loader import ModelLoader
from serve_app.models.publishing.publish_catalog import PublishEvent, publish
from serve_app.models.sources.fetcher import Fetcher
from serve_app.store.model_store import ModelStore

pytestmark = pytest.mark.slow

MODEL = """
models:
  cats:
    builder: tiny_models:Tied
    weights: {weights}
    input: {{resize_px: 32, crop_px: 32}}
    task: {{kind: image-classification, labels: "{labels}"}}
"""


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    path = tmp_path / "weights" / "best.pth"
    path.parent.mkdir()
    torch.save({"epoch": 7, "state_dict": registry.build(tiny("tied"), "random:9").state_dict()}, path)
    return path


def digest_of(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def labels_of(count: int) -> list[str]:
    return [f"label {index}" for index in range(count)]


def test_weights_beside_the_catalog_are_published_once_and_changes_are_noticed(
    store: ModelStore, tmp_path: Path, checkpoint: Path
) -> None:
    catalog = tmp_path / "catalog.yaml"
    (tmp_path / "labels.txt").write_text("\n".join(labels_of(5)))
    catalog.write_text(
        MODEL.format(weights=f'"file:weights/best.pth#sha256={digest_of(checkpoint)[:12]}"', labels="file:labels.txt")
    )
    assert publish(store, load_catalog(catalog), reachable=offline).published == ("cats",)
    assert publish(store, load_catalog(catalog), reachable=offline).skipped == ("cats",)
    torch.save(registry.build(tiny("tied"), "random:10").state_dict(), checkpoint)
    (failure,) = publish(store, load_catalog(catalog), reachable=offline).failures
    assert "has the digest" in failure.message


def test_weights_and_labels_of_a_web_server_are_published(store: ModelStore, tmp_path: Path, checkpoint: Path) -> None:
    catalog, events = tmp_path / "catalog.yaml", list[PublishEvent]()
    labels = FileServer("\n".join(labels_of(5)).encode())
    with serving(FileServer(checkpoint.read_bytes())) as weights, serving(labels):
        catalog.write_text(MODEL.format(weights=f'"{weights.url}"', labels=labels.url))
        entries = load_catalog(catalog)
        fetcher = Fetcher(tmp_path / "downloads")
        assert publish(store, entries, on_progress=events.append, fetcher=fetcher).published == ("cats",)
    done = [(event.bytes, event.total_bytes) for event in events if event.stage == "downloading"]
    assert done[-1] == (checkpoint.stat().st_size,) * 2
    (model,) = store.catalog(store.fingerprinted(entries)).models
    assert (model.weights_actual, list(model.labels)) == (weights.url, labels_of(5))
    loaded = ModelLoader(store).load("cats")
    with torch.inference_mode():
        module = registry.build(tiny("tied"), f"file:{checkpoint}")
        expected = module(torch.from_numpy(images(1, 32))).numpy()
    np.testing.assert_allclose(classify(loaded, images(1, 32)), expected, atol=1e-6)
    loaded.unload()


def test_weights_that_cannot_be_fetched_have_no_stand_in(store: ModelStore, tmp_path: Path) -> None:
    catalog = tmp_path / "catalog.yaml"
    catalog.write_text(MODEL.format(weights="http://127.0.0.1:9/best.pth", labels="http://127.0.0.1:9/labels.txt"))
    report = publish(store, load_catalog(catalog), fetcher=Fetcher(tmp_path / "downloads"))
    assert (report.published, report.fallbacks) == ((), ())
    assert "cannot download http://127.0.0.1:9/" in report.failures[0].message


def test_reference_that_names_nothing_is_an_error_of_the_catalog(tmp_path: Path) -> None:
    catalog = tmp_path / "catalog.yaml"
    catalog.write_text(MODEL.format(weights="hf://repository", labels="file:labels.txt"))
    (tmp_path / "labels.txt").write_text("cat")
    with pytest.raises(ConfigError, match=r"models\.cats: .*must be hf://ORG/REPO"):
        load_catalog(catalog)
