"""The warm-up of a worker before it measures its own memory."""

from __future__ import annotations

import logging
from typing import Any

import pytest
from model_support import mapped, offline, tiny
from numpy.typing import NDArray

from serve_app.core.catalog import Catalog
from serve_app.models.loader import ModelLoader
from serve_app.models.publishing.publish_catalog import publish
from serve_app.models.warm_up import warm_up
from serve_app.store.model_store import ModelStore
from serve_app.tasks.tensors import Tensors


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


class _Fussy:
    """A loaded model whose module raises what foreign code raises."""

    def run(self, inputs: Tensors, threads: int = 0) -> dict[str, NDArray[Any]]:
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    def unload(self) -> None:
        """Nothing to give back."""


def test_a_model_that_fails_in_its_own_way_does_not_prevent_a_start(
    shared: ModelStore, caplog: pytest.LogCaptureFixture
) -> None:
    class Loader(ModelLoader):
        def load(self, model_id: str) -> Any:
            return _Fussy()

    with caplog.at_level(logging.WARNING):
        warm_up(Loader(shared), shared.catalog([tiny("tied")]))
    assert "the worker starts cold: model tied: mat1 and mat2" in caplog.text
