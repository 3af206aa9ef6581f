"""The tensors of a file of weights: safetensors, PyTorch's own formats, or a folder in Hugging Face's layout.

No format runs code: pickles are read with ``weights_only``, and what needs more is refused.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from serve_app.errors import StoreError

#: Names under which checkpoints of training keep the weights.
_NESTED: Final = ("state_dict", "model_state_dict", "model", "net", "module", "params")

#: Prefixes that wrappers of training put before every name.
_WRAPPERS: Final = ("module.", "_orig_mod.")

#: Files of weights in a folder, the first choice first.
_IN_FOLDER: Final = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
    "diffusion_pytorch_model.safetensors",
)

_CONVERT: Final = (
    "save its weights where it was made with safetensors.torch.save_file(model.state_dict(), 'model.safetensors'), "
    "and name that file"
)


def read_state(path: Path) -> dict[str, torch.Tensor]:
    """Read the tensors of a file or folder, by name; what the file contains decides, not its ending.

    Raises:
        StoreError: it cannot be read without running code of it, or holds no tensors.
    """
    if path.is_dir():
        return _read_folder(path)
    try:
        with path.open("rb") as file:
            start = file.read(16)
    except OSError as error:
        raise StoreError(f"cannot read the weights {path}: {error.strerror or error}") from error
    if start[8:9] == b"{":
        return _read_safetensors(path)
    if start[:1] == b"\x80" or start[:2] == b"PK":
        return _read_pickle(path)
    raise StoreError(
        f"cannot read the weights {path}: it is neither safetensors nor a state dict of PyTorch"
        + (f"; a graph is named by builder: onnx:{path}" if path.suffix == ".onnx" else f"; {_CONVERT}")
    )


def load_strictly(module: torch.nn.Module, state: Mapping[str, torch.Tensor], source: str) -> None:
    """Copy a state dict into a module; names and shapes must match exactly.

    Raises:
        StoreError: they do not.
    """
    try:
        module.load_state_dict(state, strict=True)
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise StoreError(
            f"the weights {source} do not fit the model ({reason[:300]}); name weights that were saved from "
            "this architecture"
        ) from error


def _read_safetensors(path: Path) -> dict[str, torch.Tensor]:
    try:
        state: dict[str, torch.Tensor] = load_file(path)
    except (OSError, SafetensorError) as error:
        raise StoreError(f"cannot read the weights {path}: {error}; it is no whole safetensors file") from error
    return state


def _read_pickle(path: Path) -> dict[str, torch.Tensor]:
    if _is_torchscript(path):
        raise StoreError(
            f"cannot read the weights {path}: it is a TorchScript program, whose code would run; {_CONVERT}"
        )
    if _is_exported(path):
        raise StoreError(
            f"cannot read the weights {path}: it is an exported program, which has its structure too; leave weights "
            f"out, and use builder: export:{path}"
        )
    try:
        # Opened here: torch leaves the file open where it fails.
        with path.open("rb") as file:
            content = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # unpickling raises whatever the content makes it raise
        reason = " ".join(str(error).split())
        if "weights_only" in reason or "Weights only" in reason:
            raise StoreError(
                f"cannot read the weights {path}: it is a pickle of more than tensors, and reading it would run code "
                f"({_global_in(reason)}); {_CONVERT}"
            ) from error
        raise StoreError(f"cannot read the weights {path}: {reason[:200]}; it is no whole file") from error
    return _tensors(content, path)


def _is_torchscript(path: Path) -> bool:
    return any(name.endswith("/constants.pkl") or "/code/" in name for name in _members(path))


def _is_exported(path: Path) -> bool:
    return any(name.endswith("/archive_format") for name in _members(path))


def _members(path: Path) -> list[str]:
    """Return what is in an archive; nothing if the file is none, as those of torch before 1.6."""
    if not zipfile.is_zipfile(path):
        return []
    with zipfile.ZipFile(path) as archive:
        return archive.namelist()


def _global_in(reason: str) -> str:
    """Return what a pickle asks for, from torch's long message."""
    _, _, found = reason.partition("Unsupported global: GLOBAL ")
    return f"it asks for {found.split()[0]}" if found else reason[:100]


def _tensors(content: Any, path: Path) -> dict[str, torch.Tensor]:
    """Find the state dict in what a pickle holds."""
    for name in _NESTED:
        if isinstance(content, dict) and isinstance(content.get(name), dict):
            return _tensors(content[name], path)
    if not isinstance(content, dict) or not content:
        raise StoreError(f"cannot read the weights {path}: it holds a {type(content).__name__}, no state dict")
    odd = next((name for name, value in content.items() if not isinstance(value, torch.Tensor)), None)
    if odd is not None:
        raise StoreError(
            f"cannot read the weights {path}: {odd!r} in it is a {type(content[odd]).__name__}, no tensor; {_CONVERT}"
        )
    for prefix in _WRAPPERS:
        if all(name.startswith(prefix) for name in content):
            content = {name.removeprefix(prefix): value for name, value in content.items()}
    state: dict[str, torch.Tensor] = content  # with the versions of its modules, which torch keeps as an attribute
    return state


def _read_folder(folder: Path) -> dict[str, torch.Tensor]:
    """Read a folder in Hugging Face's layout, of one file or of several with an index."""
    name = next((name for name in _IN_FOLDER if (folder / name).is_file()), None)
    if name is None:
        raise StoreError(f"cannot read the weights {folder}: the folder has none of {', '.join(_IN_FOLDER)}")
    if not name.endswith(".index.json"):
        return read_state(folder / name)
    try:
        shards = sorted(set(json.loads((folder / name).read_text())["weight_map"].values()))
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise StoreError(f"cannot read the weights {folder / name}: {error}") from error
    state: dict[str, torch.Tensor] = {}
    for shard in shards:
        if Path(shard).name != shard:
            raise StoreError(f"cannot read the weights {folder / name}: {shard!r} in it lies outside of the folder")
        state |= read_state(folder / shard)
    return state
