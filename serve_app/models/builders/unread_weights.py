"""Build the structure of a module without reading the weights that its factory reads.

A worker builds every module without storage, and binds stored weights later. A factory that reads a file of weights
would read it in every worker. ``torch.load`` can leave the content of tensors unread, and safetensors maps files, so
that what nobody looks at is not read.
"""

from __future__ import annotations

import contextlib
import functools
import os
import threading
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

#: A publisher refuses a factory that reads more than this for a structure: configurations and vocabularies are less.
MOST_READ_BYTES = 1_000_000

#: What the kernel says this process has read.
_IO = Path("/proc/self/io")

#: What fills a tensor with random numbers, or calls what does.
_INITIALIZERS = frozenset({
    torch.Tensor.normal_, torch.Tensor.uniform_, torch.Tensor.bernoulli_, torch.Tensor.exponential_,
    torch.Tensor.random_,
    *(getattr(nn.init, name) for name in dir(nn.init) if name.endswith("_") and not name.startswith("_")),
})  # fmt: skip

_one_at_a_time = threading.RLock()


class _Uninitialized(TorchFunctionMode):
    """Fills no tensor with random numbers: without storage there is nothing to fill.

    torch would find out what that does to shapes and types by its compiler's tables, which takes seconds to import.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Called by torch for every function in this thread."""
        kwargs = kwargs or {}
        if func in _INITIALIZERS:
            tensor = args[0] if args else kwargs.get("tensor")
            if isinstance(tensor, torch.Tensor) and tensor.is_meta:
                return tensor
        return func(*args, **kwargs)


@contextlib.contextmanager
def without_reading_weights() -> Iterator[None]:
    """Let ``torch.load`` give tensors without storage meanwhile, and fill none, in this thread."""
    with _one_at_a_time, _Uninitialized():
        before = torch.load
        torch.load = _load_structure(before, threading.get_ident())
        try:
            yield
        finally:
            torch.load = before


def bytes_read() -> int:
    """Return how many bytes this process has read from files and pipes so far; 0 where the kernel does not tell."""
    try:
        fields = dict(line.split(": ") for line in _IO.read_text().splitlines())
    except OSError:
        return 0
    return int(fields.get("rchar", 0))


def _load_structure(load: Callable[..., Any], thread: int) -> Callable[..., Any]:
    @functools.wraps(load)
    def load_structure(f: Any, *arguments: Any, **keywords: Any) -> Any:
        if threading.get_ident() != thread:
            return load(f, *arguments, **keywords)
        if isinstance(f, str | os.PathLike) and zipfile.is_zipfile(f):
            # What is mapped is read when it is touched, and moving to meta touches nothing.
            keywords["mmap"] = True
        keywords["map_location"] = "meta"
        # The first of them is the place.
        if arguments[1:]:
            keywords["pickle_module"] = arguments[1]
        return load(f, **keywords)

    return load_structure
