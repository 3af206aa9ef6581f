import logging
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from model_support import images, tiny, vision
from safetensors.torch import save_file

from serve_app.core.catalog import ImageInput, ModelEntry
from serve_app.errors import StoreError
from serve_app.models import torchvision_compat
from serve_app.models.builders import registry
from serve_app.models.torchvision_compat import import_torchvision

pytestmark = pytest.mark.slow

models = import_torchvision().models


def logits(module: torch.nn.Module, side: int = 224) -> np.ndarray:
    with torch.inference_mode():
        return module(torch.from_numpy(images(2, side))).numpy()


def save_checkpoint(hub: Path, name: str, state: dict[str, torch.Tensor]) -> None:
    torch.save(state, hub / models.get_model_weights(name).DEFAULT.url.rpartition("/")[2])


def test_declaring_the_operators_twice_is_harmless() -> None:
    torchvision_compat.declare_missing_operators()
    torchvision_compat.declare_missing_operators()
    assert hasattr(torch.ops.torchvision, "nms")


def test_operators_are_not_declared_where_the_extension_can_be_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    declared: list[tuple] = []
    monkeypatch.setattr(torch.library, "define", lambda *schema: declared.append(schema))
    torchvision_compat.declare_missing_operators(lambda: True)
    assert declared == []


@pytest.mark.parametrize("name", ["googlenet", "inception_v3"])
def test_seeded_inception_models_answer_like_torchvision_without_their_auxiliary_heads(name: str) -> None:
    torch.manual_seed(2)
    expected = getattr(models, name)(weights=None, init_weights=True).eval()
    module = registry.build(vision(name), "random:2")
    assert not any("aux" in key.lower() for key in module.state_dict())
    np.testing.assert_allclose(logits(module), logits(expected), atol=1e-5)


def test_pretrained_googlenet_transforms_its_input_as_its_weights_expect(hub: Path) -> None:
    torch.manual_seed(2)
    save_checkpoint(hub, "googlenet", models.googlenet(weights=None, init_weights=True).state_dict())
    expected = models.googlenet(weights="DEFAULT").eval()
    module = registry.build(vision("googlenet", "pretrained"), "pretrained")
    assert module.transform_input is True
    assert registry.build_on_meta("torchvision:googlenet", "pretrained").transform_input is True
    assert registry.build_on_meta("torchvision:googlenet", "random:0").transform_input is False
    assert np.array_equal(logits(module), logits(expected))


def test_densenet_checkpoints_with_the_old_names_are_understood(hub: Path) -> None:
    state = models.densenet121(weights=None).state_dict()
    old = {re.sub(r"(denselayer\d+\.(?:norm|conv))([12])", r"\1.\2", key): value for key, value in state.items()}
    old = {key: value for key, value in old.items() if not key.endswith("num_batches_tracked")}
    assert old.keys() != state.keys()
    save_checkpoint(hub, "densenet121", old)
    expected = models.densenet121(weights="DEFAULT").eval()
    assert np.array_equal(logits(registry.build(vision("densenet121"), "pretrained"), 64), logits(expected, 64))


def test_models_that_insist_on_a_version_load_from_checkpoint_and_file(hub: Path, tmp_path: Path) -> None:
    source = registry.build(vision("mnasnet0_5"), "random:4")
    save_checkpoint(hub, "mnasnet0_5", source.state_dict())
    save_file(source.state_dict(), tmp_path / "own.safetensors")
    for weights in ("pretrained", f"file:{tmp_path / 'own.safetensors'}"):
        assert np.array_equal(logits(registry.build(vision("mnasnet0_5"), weights)), logits(source))


def test_vision_transformer_takes_the_image_size_of_its_weights() -> None:
    large = registry.build_on_meta("torchvision:vit_b_16@IMAGENET1K_SWAG_E2E_V1", "pretrained")
    assert (large.image_size, registry.build_on_meta("torchvision:vit_b_16", "pretrained").image_size) == (384, 224)


class Payload:
    """A pickle that runs code when it is read carelessly."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return logging.getLogger().error, ("the payload ran",)


def test_checkpoint_that_is_more_than_tensors_is_refused_unread(hub: Path, caplog: pytest.LogCaptureFixture) -> None:
    save_checkpoint(hub, "squeezenet1_1", {"classifier.1.weight": Payload()})  # type: ignore[dict-item]
    with pytest.raises(StoreError, match="it is a pickle of more than tensors, and reading it would run code"):
        registry.build(vision("squeezenet1_1"), "pretrained")
    assert "the payload ran" not in caplog.text


def test_building_leaves_the_random_state_of_the_caller_alone() -> None:
    torch.manual_seed(11)
    expected = torch.rand(3)
    torch.manual_seed(11)
    registry.build(tiny("tied"), "random:3")
    assert torch.equal(torch.rand(3), expected)


def test_weights_of_a_file_are_used(tmp_path: Path) -> None:
    source = registry.build(vision("squeezenet1_1"), "random:4")
    save_file(source.state_dict(), tmp_path / "own.safetensors")
    weights = f"file:{tmp_path / 'own.safetensors'}"
    module = registry.build(vision("squeezenet1_1", weights), weights)
    assert np.array_equal(logits(module), logits(source))


def test_file_with_auxiliary_heads_is_taken(tmp_path: Path) -> None:
    torch.manual_seed(2)
    source = models.googlenet(weights=None, init_weights=True).eval()
    save_file(source.state_dict(), tmp_path / "own.safetensors")
    weights = f"file:{tmp_path / 'own.safetensors'}"
    assert np.array_equal(logits(registry.build(vision("googlenet", weights), weights)), logits(source))


@pytest.mark.parametrize("change", ["missing", "unknown", "shape"])
def test_file_that_does_not_fit_exactly_is_refused(tmp_path: Path, change: str) -> None:
    state = dict(registry.build(tiny("tied"), "random:4").state_dict())
    state = {key: value.clone() for key, value in state.items()}
    if change == "missing":
        del state["head.bias"]
    elif change == "unknown":
        state["foot.bias"] = torch.zeros(1)
    else:
        state["head.bias"] = torch.zeros(6)
    save_file(state, tmp_path / "own.safetensors")
    with pytest.raises(StoreError, match="do not fit the model"):
        registry.build(tiny("tied"), f"file:{tmp_path / 'own.safetensors'}")


@pytest.mark.parametrize(("name", "complaint"), [("junk", "it is no whole file"), ("absent", "there is no file")])
def test_file_that_is_missing_or_broken_is_refused(tmp_path: Path, name: str, complaint: str) -> None:
    (tmp_path / "junk").write_bytes(b"PK\3\4 a pickle, perhaps")
    with pytest.raises(StoreError, match=complaint):
        registry.build(tiny("tied"), f"file:{tmp_path / name}")


def test_metadata_is_that_of_the_named_weights() -> None:
    newest = registry.metadata(vision("resnet50"))
    oldest = registry.metadata(ModelEntry(model_id="r", builder="torchvision:resnet50@IMAGENET1K_V1"))
    assert (newest.accuracy, newest.task.image.resize_px) == (0.80858, 232)
    assert (oldest.accuracy, oldest.task.image.resize_px) == (0.7613, 256)
    assert oldest.task.labels == newest.task.labels
    assert registry.metadata(vision("efficientnet_b3")).task.image == ImageInput(
        resize_px=320, crop_px=300, interpolation="bicubic"
    )
    assert registry.metadata(tiny("tied")).task.image == ImageInput()


@pytest.mark.parametrize(
    ("builder", "complaint"),
    [
        ("torchvision:resnet5", "did you mean resnet50"),
        ("torchvision:quantized_resnet18", "packs its weights outside of parameters and buffers"),
        ("torchvision:resnet50@BEST", r"it has \['IMAGENET1K_V1', 'IMAGENET1K_V2'\]"),
        ("no_such_package:factory", "cannot be imported"),
        ("tiny_models:no_such_factory", "cannot be imported"),
        ("tiny_models:not_a_module", "returned a int, not a torch.nn.Module"),
    ],
)
def test_builder_that_does_not_exist_is_refused_with_advice(builder: str, complaint: str) -> None:
    with pytest.raises(StoreError, match=complaint):
        registry.build(ModelEntry(model_id="x", builder=builder), "random:0")


def test_model_of_timm_without_classes_is_an_embedder() -> None:
    import_torchvision()
    pytest.importorskip("timm")
    features, classes = (
        registry.metadata(ModelEntry(model_id="model", builder=f"timm:{name}")).task
        for name in ("eva02_tiny_patch14_224", "mobilenetv2_100")
    )
    assert (features.kind, classes.kind) == ("embedding", "image-classification")
    assert features.image is not None


def test_absent_timm_is_refused_with_the_command_that_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(StoreError, match=r"pip install 'edgeserve\[timm\]'"):
        registry.resolve("timm:mobilenetv1_100")


def test_boxes_are_suppressed_as_by_definition() -> None:
    ops = import_torchvision().ops
    generator = torch.Generator().manual_seed(0)
    corners = torch.rand(200, 2, generator=generator) * 100
    boxes = torch.cat([corners, corners + torch.rand(200, 2, generator=generator) * 60], dim=1)
    scores = torch.rand(200, generator=generator)
    overlaps = ops.box_iou(boxes, boxes)
    kept: list[int] = []
    for position in scores.argsort(descending=True, stable=True).tolist():
        if all(overlaps[position, other] <= 0.4 for other in kept):
            kept.append(position)
    assert ops.nms(boxes, scores, 0.4).tolist() == kept
    assert 0 < len(kept) < 200


@pytest.mark.parametrize(
    ("boxes", "scores", "kept"),
    [
        ([], [], []),
        ([[0, 0, 10, 10]], [0.5], [0]),
        ([[0, 0, 10, 10], [0, 0, 10, 10], [20, 20, 30, 30]], [0.5, 0.9, 0.1], [1, 2]),
        # An intersection over union of exactly the threshold is not more than it.
        ([[0, 0, 10, 10], [0, 0, 10, 5]], [0.9, 0.8], [0, 1]),
        # Boxes without an area overlap nothing.
        ([[5, 5, 5, 5], [5, 5, 5, 5]], [0.9, 0.8], [0, 1]),
    ],
)
def test_boxes_at_the_edges_are_suppressed_rightly(
    boxes: list[list[float]], scores: list[float], kept: list[int]
) -> None:
    nms = import_torchvision().ops.nms
    assert nms(torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4), torch.tensor(scores), 0.5).tolist() == kept


def test_regions_of_a_ramp_are_aligned_to_known_values() -> None:
    ramp = torch.arange(36.0).reshape(1, 1, 6, 6)
    align = import_torchvision().ops.roi_align
    # The mean of a linear ramp is its value in the middle: rows 0.5 and 2.5 times 6, and the same columns.
    aligned = align(ramp, torch.tensor([[0.0, 0.5, 0.5, 4.5, 4.5]]), (2, 2), 1.0, 2, True)
    assert torch.allclose(aligned.flatten(), torch.tensor([7.0, 9.0, 19.0, 21.0]))
    assert align(ramp, torch.zeros(0, 5), (2, 2), 1.0, 2, True).shape == (0, 1, 2, 2)
    many = torch.tensor([[0.0, 0.5, 0.5, 4.5, 4.5]]).repeat(40, 1)
    assert torch.equal(align(ramp, many, (2, 2), 1.0, 2, True), aligned.repeat(40, 1, 1, 1))
