"""Models of transformers are served from a folder, and built by workers from the configuration alone."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from model_support import offline

from serve_app.core.catalog import ModelEntry
from serve_app.core.contract import Axis
from serve_app.models.loader import ModelLoader
from serve_app.models.publishing.publish_catalog import publish
from serve_app.models.torchvision_compat import import_torchvision
from serve_app.store.model_store import ModelStore
from serve_app.tasks.tensors import complete

import_torchvision()
transformers: Any = pytest.importorskip("transformers")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning"),
]

SMALL: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
LIMITS = (Axis(name="sequence", most=32), Axis(name="batch", most=4))


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def bert_classifier() -> Any:
    return transformers.BertForSequenceClassification(transformers.BertConfig(vocab_size=99, num_labels=3, **SMALL))


def bert() -> Any:
    return transformers.BertModel(transformers.BertConfig(vocab_size=99, **SMALL))


def gpt2() -> Any:
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=99, n_embd=32, n_layer=2, n_head=4))


def llama() -> Any:
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=99, num_key_value_heads=2, **SMALL))


def saved(make: Any, folder: Path) -> Any:
    torch.manual_seed(0)
    model = make().eval()
    model.save_pretrained(folder)
    return model


def entry(folder: Path, **fields: Any) -> ModelEntry:
    return ModelEntry(**{"model_id": "model", "builder": f"transformers:{folder}", "limits": LIMITS} | fields)


@pytest.mark.parametrize(
    ("make", "outputs"),
    [
        (bert_classifier, ["logits"]),
        (bert, ["last_hidden_state", "pooler_output"]),
        (gpt2, ["logits"]),
        (llama, ["logits"]),
    ],
)
def test_text_model_answers_as_the_library(store: ModelStore, tmp_path: Path, make: Any, outputs: list[str]) -> None:
    bare = saved(make, tmp_path / "model")
    assert not publish(store, [entry(tmp_path / "model")], reachable=offline).failures
    shutil.rmtree(tmp_path / "model")
    contract = store.manifest("model").model.contract
    assert [spec.name for spec in contract.outputs] == outputs
    model = ModelLoader(store).load("model")
    try:
        for rows, length in ((1, 7), (3, 30)):
            ids = np.random.default_rng(0).integers(0, 99, (rows, length))
            mask = np.ones((rows, length), np.int64)
            mask[0, length // 2 :] = 0
            with torch.inference_mode():
                expected = bare(input_ids=torch.from_numpy(ids), attention_mask=torch.from_numpy(mask))
            answers = model.run(complete({"input_ids": ids, "attention_mask": mask}, contract)[0])
            for name in outputs:
                assert np.allclose(answers[name], expected[name], atol=1e-5), name
    finally:
        model.unload()


def test_vision_model_says_the_size_of_its_images(store: ModelStore, tmp_path: Path) -> None:
    config = transformers.ViTConfig(image_size=32, patch_size=8, num_labels=7, **SMALL)
    saved(lambda: transformers.ViTForImageClassification(config), tmp_path / "model")
    assert not publish(store, [entry(tmp_path / "model", limits=())], reachable=offline).failures
    (pixels,) = store.manifest("model").model.contract.inputs
    assert (pixels.name, pixels.shape) == ("pixel_values", (-1, 3, 32, 32))


def test_random_weights_need_the_configuration_alone(store: ModelStore, tmp_path: Path) -> None:
    saved(bert, tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").unlink()
    assert not publish(store, [entry(tmp_path / "model", weights="random:1")], reachable=offline).failures
    (failure,) = publish(store, [entry(tmp_path / "model")], reachable=offline).failures
    assert "the folder needs config.json and model.safetensors" in failure.message


def test_sequence_without_a_limit_is_refused(store: ModelStore, tmp_path: Path) -> None:
    saved(bert, tmp_path / "model")
    (failure,) = publish(store, [entry(tmp_path / "model", limits=())], reachable=offline).failures
    assert "axis 'sequence' of input 'input_ids' is free and has no limit" in failure.message


def test_name_that_neither_folder_nor_hub_has_is_refused(store: ModelStore) -> None:
    (failure,) = publish(store, [ModelEntry(model_id="model", builder="transformers:none/such")]).failures
    assert "is no folder, and cannot be fetched from the hub" in failure.message
