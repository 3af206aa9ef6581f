"""The recipe for scikit-learn: a forest that is converted, published and loaded answers as scikit-learn does."""

from __future__ import annotations

import runpy
from pathlib import Path

import numpy as np
import pytest

from serve_app.config.catalog import load_catalog
from serve_app.config.edge import load_edge
from serve_app.models.loader import ModelLoader
from serve_app.models.publishing.publish_catalog import publish
from serve_app.store.model_store import ModelStore

FOLDER = Path(__file__).parents[2] / "deploy" / "examples" / "tabular"


@pytest.mark.slow
def test_a_forest_answers_as_in_scikit_learn(tmp_path: Path) -> None:
    datasets = pytest.importorskip("sklearn.datasets")
    pytest.importorskip("skl2onnx")
    recipe = runpy.run_path(str(FOLDER / "train.py"))
    forest = recipe["train"]()
    recipe["write"](forest, tmp_path / recipe["MODEL"])
    (tmp_path / "catalog.yaml").write_text((FOLDER / "catalog.yaml").read_text())
    store = ModelStore(tmp_path / "store")
    report = publish(store, load_catalog(tmp_path / "catalog.yaml"))
    assert (report.failures, report.published) == ((), ("iris-forest",))
    features = datasets.load_iris().data.astype(np.float32)
    loaded = ModelLoader(store).load("iris-forest")
    answers = loaded.run({"X": features})
    loaded.unload()
    assert np.array_equal(answers["label"], forest.predict(features))
    np.testing.assert_allclose(answers["probabilities"], forest.predict_proba(features), atol=1e-5)
    assert answers["label"][0] == 0


def test_the_settings_of_the_example_name_its_catalog() -> None:
    settings = load_edge(FOLDER / "edge.yaml")
    assert [entry.model_id for entry in load_catalog(settings.catalog)] == ["iris-forest"]
