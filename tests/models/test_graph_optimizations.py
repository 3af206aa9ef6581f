"""The optimizations of publishing make a module faster and keep its answers."""

from __future__ import annotations

import dataclasses
import logging
from functools import partial

import numpy as np
import pytest
import tiny_models
import torch
from model_support import classify, images, module_of, offline, tiny, vision

from serve_app.errors import StoreError
from serve_app.models.builders import registry
from serve_app.models.graph_optimizations import fold, foldable_norms, named_slots, optimize, order_of_use
from serve_app.models.loader import ModelLoader
from serve_app.models.publishing.publish_catalog import publish
from serve_app.store.manifest import ExecutionFormat, FoldedNorm
from serve_app.store.model_store import ModelStore

pytestmark = pytest.mark.slow

FIRST = FoldedNorm(conv="first", norm="first_norm")
SECOND = FoldedNorm(conv="second", norm="second_norm")


def built(factory: str) -> torch.nn.Module:
    return registry.build(tiny("m", factory), "random:3")


def executed(module: torch.nn.Module, batch: torch.Tensor, execution: ExecutionFormat) -> list[torch.Tensor]:
    layout = torch.channels_last if execution.channels_last else torch.contiguous_format
    return [module(batch.to(memory_format=layout))]


def logits(module: torch.nn.Module, batch: np.ndarray) -> np.ndarray:
    with torch.inference_mode():
        return module(torch.from_numpy(batch)).numpy()


@pytest.mark.parametrize(
    ("factory", "folded"),
    [
        ("Convolved", (FIRST, SECOND)),
        ("ReadsItsConvolution", (SECOND,)),
        ("ConvolvesTwice", (FIRST,)),
        ("SharedNorm", ()),
        ("Branching", (SECOND,)),
        ("TiedConvolutions", (FIRST,)),
        ("Tied", ()),
        ("LooksAtValues", ()),
    ],
)
def test_published_model_folds_what_it_can_and_answers_as_built(
    store: ModelStore, factory: str, folded: tuple[FoldedNorm, ...]
) -> None:
    assert publish(store, [tiny("m", factory)], reachable=offline).published == ("m",)
    manifest = store.manifest("m")
    assert manifest.execution.folded == folded
    assert manifest.execution.channels_last == (factory != "Tied")
    batch = images(2, 32, seed=4)
    model = ModelLoader(store).load("m")
    np.testing.assert_allclose(classify(model, batch), logits(built(factory), batch), rtol=1e-4, atol=1e-5)
    model.unload()


def test_folded_norms_take_no_room_in_the_store(store: ModelStore) -> None:
    publish(store, [tiny("m", "Convolved")], reachable=offline)
    assert {place.name for place in store.manifest("m").tensors} == {
        f"{layer}.{part}" for layer in ("first", "second", "head") for part in ("weight", "bias")
    }


def test_folding_can_be_taken_back() -> None:
    module, batch = built("Convolved"), images(2, 32)
    expected = logits(module, batch)
    undo = fold(module, foldable_norms(module, "m"))
    assert isinstance(module.first_norm, torch.nn.Identity)
    assert not np.array_equal(logits(module, batch), expected)
    undo()
    assert isinstance(module.first_norm, torch.nn.BatchNorm2d)
    assert np.array_equal(logits(module, batch), expected)


def test_module_with_hooks_is_left_as_it_is() -> None:
    module = built("Convolved")
    module.first_norm.register_forward_hook(lambda module, inputs, output: output * 2)
    assert foldable_norms(module, "m") == (SECOND,)


def test_module_that_cannot_be_traced_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    assert foldable_norms(built("LooksAtValues"), "m") == ()
    assert "m keeps its batch norms, torch.fx cannot trace it" in caplog.text


def test_module_that_fails_with_another_memory_layout_is_run_without(
    store: ModelStore, caplog: pytest.LogCaptureFixture
) -> None:
    publish(store, [tiny("m", "NeedsContiguous")], reachable=offline)
    assert store.manifest("m").execution == ExecutionFormat(folded=(FIRST, SECOND))
    assert {place.layout for place in store.manifest("m").tensors} == {"row_major"}
    assert "m is not run with channels last in memory: RuntimeError: view size" in caplog.text


def test_module_whose_answers_would_change_is_left_as_it_is(caplog: pytest.LogCaptureFixture) -> None:
    module, batch = built("Convolved"), images(2, 32)
    with caplog.at_level(logging.WARNING):
        expected = [torch.from_numpy(logits(module, batch) + 1)]
        execute = partial(executed, module, torch.from_numpy(batch))
        assert (
            optimize(module, execute, expected, ExecutionFormat(), "m", foldable_norms(module, "m"))
            == ExecutionFormat()
        )
    assert isinstance(module.first_norm, torch.nn.BatchNorm2d)
    assert caplog.text.count("its outputs would change by") == 3


def test_weights_lie_in_the_order_of_their_use(store: ModelStore) -> None:
    publish(store, [tiny("m", "Convolved")], reachable=offline)
    places = sorted(store.manifest("m").tensors, key=lambda place: place.offset)
    assert [place.name.partition(".")[0] for place in places] == ["first"] * 2 + ["second"] * 2 + ["head"] * 2


def test_weights_that_only_functions_use_lie_in_order_as_well() -> None:
    """Attention hands its weights to a function; no module is called that owns them."""
    module = registry.build(vision("vit_b_16"), "random:1")
    order = order_of_use(module, partial(module, torch.zeros(1, 3, 224, 224)))
    layers = [f"encoder.layers.encoder_layer_{number}.self_attention" for number in range(12)]
    used = [name for layer in layers for name in (f"{layer}.in_proj_weight", f"{layer}.out_proj.weight")]
    assert sorted(used, key=order.__getitem__) == used
    assert max(order, key=order.__getitem__).startswith("heads.head.")


def test_tensors_that_the_probe_does_not_use_come_last() -> None:
    module = built("LooksAtValues")
    order = order_of_use(module, partial(module, torch.full((1, 3, 32, 32), 1e9)))
    first = min(order, key=order.__getitem__)
    assert first == "second_norm.bias"
    assert order["first.weight"] == max(order.values())
    assert order.keys() == {name for name, _, _ in named_slots(module)}


def test_convolutions_are_mapped_with_their_channels_last(store: ModelStore) -> None:
    publish(store, [tiny("m", "Convolved")], reachable=offline)
    loader = ModelLoader(store)
    model = loader.load("m")
    weight = module_of(loader, "m").get_parameter("first.weight")
    assert weight.shape == (8, 3, 3, 3)
    assert weight.is_contiguous(memory_format=torch.channels_last)
    model.unload()


def test_model_in_bfloat16_takes_half_the_memory_and_answers_nearly_alike(store: ModelStore) -> None:
    publish(store, [tiny("full", "Convolved"), tiny("half", "Convolved", dtype="bfloat16")], reachable=offline)
    full, half = (store.manifest(name).model for name in ("full", "half"))
    assert (half.dtype, half.weights_bytes) == ("bfloat16", full.weights_bytes / 2)
    loader, batch = ModelLoader(store), images(2, 32)
    answers = []
    for name in ("full", "half"):
        model = loader.load(name)
        answers.append(classify(model, batch))
        model.unload()
    assert answers[1].dtype == np.float32
    np.testing.assert_allclose(answers[1], answers[0], atol=0.05 * np.abs(answers[0]).max())
    assert not np.array_equal(answers[1], answers[0])


def test_another_dtype_in_the_catalog_is_published_again(store: ModelStore) -> None:
    publish(store, [tiny("m", "Convolved")], reachable=offline)
    assert publish(store, [tiny("m", "Convolved", dtype="bfloat16")], reachable=offline).published == ("m",)


def test_builder_without_the_folded_layers_is_refused(store: ModelStore) -> None:
    publish(store, [tiny("m", "Convolved")], reachable=offline)
    manifest = store.manifest("m")
    execution = ExecutionFormat(folded=(FoldedNorm(conv="tenth", norm="tenth_norm"),))
    store.commit(dataclasses.replace(manifest, execution=execution))
    with pytest.raises(StoreError, match=r"does not have the layers .* publish the model again"):
        ModelLoader(store).prepare("m")


def test_factories_of_this_file_have_norms_that_matter() -> None:
    """Without such norms a wrong folding would go unnoticed."""
    for factory in (tiny_models.Convolved, tiny_models.TiedConvolutions):
        norm = factory().first_norm
        assert norm.running_mean.abs().max() > 0.1
