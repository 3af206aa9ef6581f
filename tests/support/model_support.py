"""Catalog entries and inputs that the tests of the store, the loader and the publisher share."""

from __future__ import annotations

import ctypes
import mmap
import os
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn

from serve_app.core.catalog import ModelEntry
from serve_app.core.task import ImageInput
from serve_app.models.loader import ModelLoader
from serve_app.models.runtimes.base import LoadedModel
from serve_app.models.runtimes.torch_runtime import PreparedModule
from serve_app.store.durable_files import sha256_of
from serve_app.store.model_store import ModelStore

SMALL_INPUT = ImageInput(resize_px=32, crop_px=32)


def tiny(name: str, factory: str = "Tied", weights: str = "random:3", **fields: object) -> ModelEntry:
    """A small module, which is not compiled unless ``runtime`` says so: that takes longer than all the rest."""
    fields = {"runtime": "torch", **fields}
    return ModelEntry(model_id=name, builder=f"tiny_models:{factory}", weights=weights, input=SMALL_INPUT, **fields)


def vision(name: str, weights: str = "random:7", **fields: object) -> ModelEntry:
    """A model of torchvision, which is not compiled unless ``runtime`` says so."""
    return ModelEntry(model_id=name, builder=f"torchvision:{name}", weights=weights, **{"runtime": "torch", **fields})


VISION = tuple(vision(name) for name in ("squeezenet1_1", "shufflenet_v2_x0_5", "mobilenet_v3_small"))


def images(count: int = 1, side: int = 224, seed: int = 1) -> NDArray[np.float32]:
    return np.random.default_rng(seed).standard_normal((count, 3, side, side), dtype=np.float32)


def classify(model: LoadedModel, batch: NDArray[Any]) -> NDArray[Any]:
    """The logits of a classifier, in memory, for images."""
    return model.run({"input": batch})["logits"]


def module_of(loader: ModelLoader, model_id: str) -> nn.Module:
    """The module that a loader keeps of a model of torch."""
    prepared = loader.prepare(model_id)
    assert isinstance(prepared, PreparedModule)
    return prepared.template.module


def offline(url: str) -> bool:
    return False


def check_content(store: ModelStore, model_id: str) -> None:
    """Assert that every file of a published model has the content that its name says, whatever the store remembers."""
    store.check_sizes(model_id)
    for file in store.manifest(model_id).files:
        assert sha256_of(store.blob_path(file.name)) == file.sha256


def mapped(path: Path) -> bool:
    """Whether this process has the file in its memory map."""
    return path.name in Path("/proc/self/maps").read_text()


def cached_pages(path: Path) -> int:
    """How many pages of a file the kernel has in memory (mincore(2))."""
    size_bytes = path.stat().st_size
    with path.open("rb") as file, mmap.mmap(file.fileno(), size_bytes, access=mmap.ACCESS_COPY) as mapped:
        pages = (ctypes.c_ubyte * -(-size_bytes // mmap.PAGESIZE))()
        address = ctypes.addressof(ctypes.c_char.from_buffer(mapped))
        assert ctypes.CDLL(None).mincore(ctypes.c_void_p(address), ctypes.c_size_t(size_bytes), pages) == 0
        return sum(page & 1 for page in pages)


def forget_pages(path: Path) -> None:
    """Make the kernel drop what it has of a file in memory."""
    with path.open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
