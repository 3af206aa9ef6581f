"""Files of weights, as people have them."""

import json
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from model_support import tiny
from safetensors.torch import save_file
from torch import nn

from serve_app.errors import StoreError
from serve_app.models.builders import registry
from serve_app.models.sources.state_dicts import read_state

STATE = {"head.weight": torch.arange(6.0).reshape(2, 3), "head.bias": torch.ones(2)}


def save_shards(folder: Path) -> Path:
    folder.mkdir()
    names = {name: f"model-{index}-of-2.safetensors" for index, name in enumerate(STATE, start=1)}
    for name, file in names.items():
        save_file({name: STATE[name]}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names}))
    return folder


def save_folder(folder: Path) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    save_file(STATE, folder / "model.safetensors")
    return folder


def saved(path: Path, content: Any = STATE, **options: Any) -> Path:
    torch.save(content, path, **options)
    return path


def save_safetensors(path: Path) -> Path:
    save_file(STATE, path)
    return path


WAYS: dict[str, Callable[[Path], Path]] = {
    "safetensors": lambda path: save_safetensors(path / "a.safetensors"),
    "safetensors by another name": lambda path: save_safetensors(path / "a.bin"),
    "zipped": lambda path: saved(path / "a.pth"),
    "older than zip files": lambda path: saved(path / "a.pth", _use_new_zipfile_serialization=False),
    "within state_dict": lambda path: saved(path / "a.pt", {"epoch": 3, "state_dict": STATE}),
    "within model": lambda path: saved(path / "a.pt", {"model": STATE, "optimizer": {"lr": 0.1}}),
    "wrapped for training": lambda path: saved(path / "a.pt", {f"module.{key}": value for key, value in STATE.items()}),
    "folder": lambda path: save_folder(path / "model"),
    "folder of shards": lambda path: save_shards(path / "model"),
}


@pytest.mark.parametrize("way", WAYS)
def test_tensors_are_read_however_they_are_kept(tmp_path: Path, way: str) -> None:
    state = read_state(WAYS[way](tmp_path))
    assert state.keys() == STATE.keys()
    assert all(torch.equal(state[name], STATE[name]) for name in STATE)


class Payload:
    def __init__(self, path: Path) -> None:
        self._path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self._path,))


def test_pickle_of_more_than_tensors_is_refused_with_the_way_round(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=r"reading it would run code.*safetensors\.torch\.save_file"):
        read_state(saved(tmp_path / "a.pth", {"head.weight": Payload(tmp_path / "touched")}))
    assert not (tmp_path / "touched").exists()


def test_whole_module_is_refused_and_named(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=r"it asks for torch\.nn\.modules\.linear\.Linear.*save_file"):
        read_state(saved(tmp_path / "a.pth", nn.Linear(2, 2)))


def test_exported_program_is_refused_and_named_as_a_builder(tmp_path: Path) -> None:
    path = tmp_path / "a.pt2"
    with zipfile.ZipFile(path, "w") as archive:
        # As torch.export.save writes it.
        archive.writestr("a/models/model.json", "{}")
        archive.writestr("a/archive_format", "pt2")
    with pytest.raises(StoreError, match=rf"is an exported program.* use builder: export:{path}"):
        read_state(path)


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
def test_torchscript_is_refused(tmp_path: Path) -> None:
    torch.jit.script(nn.Linear(2, 2)).save(str(tmp_path / "a.pt"))  # type: ignore[no-untyped-call]
    with pytest.raises(StoreError, match=r"TorchScript program, whose code would run.*save_file"):
        read_state(tmp_path / "a.pt")


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b"\x08\x08\x12\x07pytorch an ONNX graph", r"a graph is named by builder: onnx:"),
        (b"", "neither safetensors nor a state dict"),
        (pickle.dumps([1, 2]), r"holds a list, no state dict|would run code|no whole file"),
        (b"\x09\0\0\0\0\0\0\0{truncated", "no whole safetensors file"),
    ],
)
def test_file_of_another_kind_is_refused(tmp_path: Path, content: bytes, complaint: str) -> None:
    path = tmp_path / "weights.onnx"
    path.write_bytes(content)
    with pytest.raises(StoreError, match=complaint):
        read_state(path)


def test_folder_without_weights_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=r"the folder has none of model\.safetensors"):
        read_state(tmp_path)


def test_index_that_leaves_its_folder_is_refused(tmp_path: Path) -> None:
    save_file(STATE, tmp_path / "outside.safetensors")
    folder = save_folder(tmp_path / "model")
    (folder / "model.safetensors").unlink()
    index = {"weight_map": {"head.weight": "../outside.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(StoreError, match="lies outside of the folder"):
        read_state(folder)


def test_checkpoint_of_training_fills_a_model(tmp_path: Path) -> None:
    source = registry.build(tiny("tied"), "random:5")
    path = saved(tmp_path / "checkpoint.pth", {"epoch": 1, "state_dict": source.state_dict()})
    module = registry.build(tiny("tied", weights=f"file:{path}"), f"file:{path}")
    assert all(torch.equal(value, source.state_dict()[name]) for name, value in module.state_dict().items())
