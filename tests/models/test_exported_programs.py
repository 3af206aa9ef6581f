"""Programs of torch.export are served with their own interface, and rebuilt from a structure without weights."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from any_models import Tabular, UNet
from model_support import offline
from torch import nn
from torch.export import Dim

from serve_app.core.catalog import ModelEntry
from serve_app.core.contract import Axis
from serve_app.core.contract_declaration import TensorDeclaration
from serve_app.models.loader import ModelLoader
from serve_app.models.publishing.publish_catalog import publish
from serve_app.store.model_store import ModelStore

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning"),
]


class Mixed(nn.Module):
    """Takes a keyword and a constant; keeps a plain tensor and a buffer that no state dict has."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(200, 300)
        self.register_buffer("shift", torch.rand(300), persistent=False)
        self.plain = torch.rand(300)

    def forward(self, x: torch.Tensor, *, count: torch.Tensor, twice: bool) -> dict[str, Any]:
        answer = self.layer(x) * self.shift + self.plain
        return {"numbers": answer * 2 if twice else answer, "counts": (count + 1, count - 1)}


def save(module: nn.Module, path: Path, *arguments: Any, **fields: Any) -> nn.Module:
    torch.export.save(torch.export.export(module.eval(), *arguments, **fields), path)
    return module


def entry(path: Path, **fields: Any) -> ModelEntry:
    return ModelEntry(model_id="model", builder=f"export:{path}", **fields)


def refusal(store: ModelStore, wanted: ModelEntry) -> str:
    (failure,) = publish(store, [wanted], reachable=offline).failures
    assert "\n" not in failure.message
    return failure.message


def run(store: ModelStore, **inputs: Any) -> dict[str, Any]:
    model = ModelLoader(store).load("model")
    try:
        return model.run(inputs)
    finally:
        model.unload()


def test_program_says_its_axes_and_answers_at_every_size(store: ModelStore, tmp_path: Path) -> None:
    sides = {2: 4 * Dim("_h", min=8, max=24), 3: 4 * Dim("_w", min=8, max=24)}
    shapes = {"scan": {0: Dim("batch", max=4), **sides}}
    bare = save(UNet(), tmp_path / "unet.pt2", (torch.rand(2, 1, 64, 96),), dynamic_shapes=shapes)
    assert not publish(store, [entry(tmp_path / "unet.pt2")], reachable=offline).failures
    contract = store.manifest("model").model.contract
    assert [(axis.name, axis.least, axis.most, axis.multiple) for axis in contract.axes] == [
        ("batch", 1, 4, 1),
        ("scan_2", 32, 96, 4),
        ("scan_3", 32, 96, 4),
    ]
    for height, width in ((32, 96), (64, 36)):
        scan = np.random.default_rng(0).standard_normal((2, 1, height, width), dtype=np.float32)
        with torch.inference_mode():
            expected = bare(torch.from_numpy(scan))["mask"]
        assert np.allclose(run(store, scan=scan)["mask"], expected, atol=1e-5)


def test_keywords_constants_and_plain_tensors_are_kept(store: ModelStore, tmp_path: Path) -> None:
    batch = Dim("batch", max=4)
    example = torch.rand(2, 200), torch.arange(4).reshape(2, 2)
    bare = save(
        Mixed(), tmp_path / "mixed.pt2", example[:1], {"count": example[1], "twice": True},
        dynamic_shapes={"x": {0: batch}, "count": {0: batch}, "twice": None},
    )  # fmt: skip
    assert not publish(store, [entry(tmp_path / "mixed.pt2")], reachable=offline).failures
    (tmp_path / "mixed.pt2").unlink()
    with torch.inference_mode():
        expected = bare(example[0], count=example[1], twice=True)
    answers = run(store, x=example[0].numpy(), count=example[1].numpy())
    assert np.allclose(answers["numbers"], expected["numbers"], atol=1e-5)
    assert np.array_equal(answers["counts.output_0" if "counts.output_0" in answers else "counts_0"], example[1] + 1)
    manifest = store.manifest("model")
    (structure,) = (file for file in manifest.files if file.role == "graph")
    assert structure.size_bytes < manifest.model.weights_bytes / 5
    assert {place.name for place in manifest.tensors} >= {"program.plain", "program.shift"}


def test_axis_without_a_range_needs_a_limit(store: ModelStore, tmp_path: Path) -> None:
    save(Tabular(), tmp_path / "free.pt2", (torch.rand(2, 3, 20),), dynamic_shapes=({1: Dim("rows")},))
    assert "add limits: {features_1: LARGEST}" in refusal(store, entry(tmp_path / "free.pt2"))


def test_program_with_a_pickle_is_refused_unread(store: ModelStore, tmp_path: Path) -> None:
    save(Tabular(), tmp_path / "plain.pt2", (torch.rand(2, 20),))
    with zipfile.ZipFile(tmp_path / "plain.pt2") as plain, zipfile.ZipFile(tmp_path / "evil.pt2", "w") as evil:
        for name in plain.namelist():
            content = plain.read(name)
            if "/data/sample_inputs/" in name:
                content = b"cposix\nsystem\n(S'touch " + str(tmp_path / "ran").encode() + b"'\ntR."
            evil.writestr(name.replace("plain/", "evil/"), content)
    assert "may run any code" in refusal(store, entry(tmp_path / "evil.pt2"))
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("content", "fields", "cure"),
    [
        (b"no archive", {}, "write it with torch.export.save"),
        (None, {}, "no file"),
        (b"no archive", {"weights": "random:1"}, "leave out weights"),
    ],
)
def test_what_is_no_program_is_refused(
    store: ModelStore, tmp_path: Path, content: bytes | None, fields: dict[str, str], cure: str
) -> None:
    if content is not None:
        (tmp_path / "x.pt2").write_bytes(content)
    assert cure in refusal(store, entry(tmp_path / "x.pt2", **fields))


def test_torchscript_and_aoti_have_no_builder(store: ModelStore) -> None:
    for kind in ("torchscript", "aoti"):
        message = refusal(store, ModelEntry(model_id="model", builder=f"{kind}:x.pt"))
        assert "use export:FILE.pt2" in message


def test_axes_of_a_program_may_be_renamed_and_keep_their_limits(store: ModelStore, tmp_path: Path) -> None:
    shapes = {"scan": {0: Dim("batch", max=4), 2: 4 * Dim("_h", min=8, max=24), 3: 4 * Dim("_w", min=8, max=24)}}
    save(UNet(), tmp_path / "unet.pt2", (torch.rand(2, 1, 64, 96),), dynamic_shapes=shapes)
    scan = TensorDeclaration(name="scan", shape=("batch", 1, "height", "width"))
    wanted = entry(tmp_path / "unet.pt2", inputs=(scan,), limits=(Axis(name="height", most=64),))
    assert not publish(store, [wanted], reachable=offline).failures
    axes = {axis.name: (axis.least, axis.most, axis.multiple) for axis in store.manifest("model").model.contract.axes}
    assert axes == {"batch": (1, 4, 1), "height": (32, 64, 4), "width": (32, 96, 4)}
