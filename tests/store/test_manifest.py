import dataclasses
import json
from collections.abc import Callable
from typing import Any

import pytest

from serve_app.errors import StoreError
from serve_app.store.manifest import Manifest
from serve_app.store.model_store import ModelStore

Change = Callable[[dict[str, Any]], object]


def test_manifest_survives_json(shared: ModelStore) -> None:
    for model_id in shared.published():
        manifest = shared.manifest(model_id)
        assert Manifest.from_json(manifest.to_json(), "again") == manifest


def test_manifest_of_before_forms_is_read(shared: ModelStore) -> None:
    raw = json.loads(shared.manifest("tied").to_json())
    del raw["model"]["private_bytes"], raw["model"]["profile"]["tier"]
    model = Manifest.from_json(json.dumps(raw).encode(), "models/tied.json").model
    assert model.own_bytes == 0
    # What else may have all of its weights in memory of its own.
    assert dataclasses.replace(model, runtime="onnxruntime").own_bytes == model.weights_bytes


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda raw: raw.pop("files"), r"missing keys \['files'\]"),
        (lambda raw: raw.update(color="red"), r"unknown keys \['color'\]"),
        (lambda raw: raw.update(format=1), "format 1 is not the format 5"),
        (lambda raw: raw["execution"].update(runtime="steam"), "'steam' is not one of"),
        (lambda raw: raw["tensors"][0].update(layout="channels_last"), "cannot be channels_last"),
        (lambda raw: raw["tensors"][0].update(offset=1), "within an element"),
        (lambda raw: raw["model"].update(weights_bytes="many"), "model.weights_bytes: expected int, found str"),
        (lambda raw: raw["model"].update(weights_bytes=True), "model.weights_bytes: expected int, found bool"),
        (lambda raw: raw["model"]["profile"].update(exec_s=-1), "exec_s of tied must be >= 0"),
        (lambda raw: raw["model"]["task"]["image"].update(mean=["a"]), "model.task.image.mean.0.: expected float"),
        (lambda raw: raw["model"]["task"].update(labels="dog"), "model.task.labels: expected a list, found str"),
        (lambda raw: raw["tensors"][0].update(kind="gradient"), "'gradient' is not one of"),
        (lambda raw: raw["tensors"][0].update(dtype="F8"), "unknown dtype 'F8'"),
        (lambda raw: raw["tensors"][0].update(nbytes=1), "does not match its shape and dtype"),
        (lambda raw: raw["tensors"][0].update(offset=-4), "negative offset"),
        (lambda raw: raw["tensors"][0].update(offset=10**12), "ends after the end of its file"),
        (lambda raw: raw["tensors"].append(raw["tensors"][0]), "is listed twice"),
        (lambda raw: raw["files"].clear(), "not among the files"),
        (lambda raw: raw["files"][0].update(name="../../etc/passwd"), "not named after its sha256"),
        (lambda raw: raw["files"].append([]), r"files\[1\]: expected an object, found list"),
    ],
)
def test_malformed_manifest_is_refused_with_file_and_reason(shared: ModelStore, change: Change, complaint: str) -> None:
    raw = json.loads(shared.manifest("tied").to_json())
    change(raw)
    with pytest.raises(StoreError, match=complaint) as caught:
        Manifest.from_json(json.dumps(raw).encode(), "models/tied.json")
    assert "models/tied.json" in str(caught.value)


@pytest.mark.parametrize("text", [b"", b"{", b"[]", b"null", b"\xff\xfe", b"[" * 100_000])
def test_text_that_is_no_manifest_is_refused(text: bytes) -> None:
    with pytest.raises(StoreError, match=r"models/x\.json is malformed"):
        Manifest.from_json(text, "models/x.json")
