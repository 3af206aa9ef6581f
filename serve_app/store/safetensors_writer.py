"""Write safetensors files whose layout is known before the first byte is written.

The reference writer copies every tensor into memory first and reports a full disk as its own kind of error. This one
streams, raises plain ``OSError`` and returns the absolute offset of every tensor. Equal tensors give equal files.
Format: https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from serve_app.store.manifest import ITEM_BYTES

#: The first tensor starts at a multiple of this; a cache line, and a multiple of every element size.
DATA_ALIGNMENT = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class BlobTensor:
    """Name, safetensors dtype and shape of one tensor of a file to be written."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Return the bytes of the tensor in the file."""
        return math.prod(self.shape) * ITEM_BYTES[self.dtype]


@dataclass(frozen=True, slots=True, kw_only=True)
class BlobLayout:
    """A file to be written: its header, its tensors in file order, and the absolute offset of each by name."""

    header: bytes
    order: tuple[BlobTensor, ...]
    offsets: dict[str, int]


def plan_blob(tensors: Sequence[BlobTensor]) -> BlobLayout:
    """Lay tensors out without holes, each aligned to its element size.

    Tensors with larger elements go first; within one element size the given order is kept, so that a file which is
    read from front to back follows the order of execution.
    """
    order = tuple(sorted(tensors, key=lambda tensor: -ITEM_BYTES[tensor.dtype]))
    entries: dict[str, object] = {}
    starts: dict[str, int] = {}
    end = 0
    for tensor in order:
        starts[tensor.name] = end
        end += tensor.nbytes
        entries[tensor.name] = {
            "dtype": tensor.dtype,
            "shape": tensor.shape,
            "data_offsets": (starts[tensor.name], end),
        }
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % DATA_ALIGNMENT)
    header = len(text).to_bytes(8, "little") + text
    return BlobLayout(header=header, order=order, offsets={name: len(header) + start for name, start in starts.items()})


def write_blob(path: Path, layout: BlobLayout, data: Iterable[memoryview]) -> None:
    """Write the file; ``data`` yields the bytes of the tensors in ``layout.order``.

    Raises:
        OSError: the disk is full, or the path cannot be written.
    """
    with path.open("wb") as file:
        file.write(layout.header)
        for tensor, view in zip(layout.order, data, strict=True):
            if view.nbytes != tensor.nbytes:
                raise ValueError(f"tensor {tensor.name!r} has {view.nbytes} bytes instead of {tensor.nbytes}")
            file.write(view)
