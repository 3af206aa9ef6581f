"""The warm-up of a worker before it measures its own memory."""

from __future__ import annotations

import logging

import pytest
from model_support import mapped, offline, tiny

from serve_app.core.catalog import Catalog
from serve_app.models.loader import ModelLoader
from serve_app.models.publishing.publish_catalog import publish
from serve_app.models.warm_up import warm_up
from serve_app.store.model_store import ModelStore


def test_a_warm_up_leaves_no_model_behind(shared: ModelStore) -> None:
    catalog = shared.catalog([tiny("tied")])
    warm_up(ModelLoader(shared), catalog)
    assert not any(mapped(shared.blob_path(file.name)) for file in shared.manifest("tied").files)


def test_a_model_that_cannot_be_loaded_does_not_prevent_a_start(
    store: ModelStore, caplog: pytest.LogCaptureFixture
) -> None:
    publish(store, [tiny("tied")], reachable=offline)
    catalog = store.catalog([tiny("tied")])
    for file in store.manifest("tied").files:
        store.blob_path(file.name).unlink()
    with caplog.at_level(logging.WARNING):
        warm_up(ModelLoader(store), catalog)
    assert "the worker starts cold" in caplog.text


def test_a_worker_without_models_starts_without_warnings(store: ModelStore, caplog: pytest.LogCaptureFixture) -> None:
    warm_up(ModelLoader(store), Catalog(()))
    assert not caplog.records
