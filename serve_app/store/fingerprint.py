"""Fingerprints of catalog entries: two entries have the same one if publishing them gives the same model.

Everything in an entry counts but for what is laid over a published model later. A local file counts by its content and
not by its path, so a changed file is noticed, and the same file at another path is not published twice.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import importlib.metadata
import json
import mmap
import os
import re
import secrets
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

from serve_app.core.catalog import ModelEntry
from serve_app.core.task import ImageInput, TaskSpec
from serve_app.store.durable_files import sha256_of, stat_signature

#: What ``ModelStore.catalog`` takes from the entry whenever it reads the store.
OVERLAY_FIELDS: Final = frozenset(
    {"model_id", "family", "accuracy", "pinned", "min_copies", "lowered", "agreement", "fingerprint"}
)
_OVERLAY_TASK_FIELDS: Final = frozenset(
    {"image", "labels", "activation", "pooling", "normalize", "min_score", "max_overlap", "sample_rate", "context"}
)

#: Kinds of references to a file of this machine.
_FILE = re.compile(r"(file|onnx|openvino|export|transformers):(.+)", re.DOTALL)
_PACKAGE = re.compile(r"package:([^/:]+)")

#: A file whose content is in other files besides, as an ONNX graph keeps its large tensors.
_EXTERNAL_DATA: Final = re.compile(rb"\x0a\x08location\x12([\x01-\x7f])")

#: Digests of smaller files are not kept from one process to the next.
_KEPT_FROM_BYTES: Final = 2**20


class Fingerprints:
    """Computes fingerprints; digests of large files are kept by the stat signature of the file.

    Args:
        cache: the folder of the digests; it need not exist or be writable.
    """

    def __init__(self, cache: Path) -> None:
        self._cache = cache
        self._digests: dict[str, tuple[list[int], str]] = {}

    def of(self, entry: ModelEntry) -> str:
        """Return the fingerprint of an entry, 32 hexadecimal digits; empty if a local file that it names is missing."""
        files: list[str] = []

        def plain(value: Any) -> Any:
            if isinstance(value, str):
                return self._reference(value, files)
            if isinstance(value, TaskSpec):
                return {key: plain(item) for key, item in _fields(value, _OVERLAY_TASK_FIELDS)}
            if isinstance(value, ImageInput):
                return [value.crop_px, value.channels]
            if dataclasses.is_dataclass(value):
                return {key: plain(item) for key, item in _fields(value, frozenset())}
            if isinstance(value, list | tuple | set | frozenset):
                return [plain(item) for item in value]
            if isinstance(value, dict):
                return {str(key): plain(item) for key, item in value.items()}
            return value

        try:
            content = {key: plain(item) for key, item in _fields(entry, OVERLAY_FIELDS)}
            image = entry.input or (entry.task.image if entry.task else None)
            content["input"] = plain(image)
        except OSError:
            return ""
        text = json.dumps([content, files], sort_keys=True, default=str)
        return hashlib.sha256(text.encode()).hexdigest()[:32]

    def _reference(self, text: str, files: list[str]) -> str:
        """Return what of a reference counts, and add the content of the files that it names."""
        package = _PACKAGE.match(text)
        if package is not None:
            with contextlib.suppress(importlib.metadata.PackageNotFoundError):
                files.append(importlib.metadata.version(package[1]))
            return text
        found = _FILE.fullmatch(text.partition("#sha256=")[0])
        if found is None:
            return text
        kind, place = found[1], Path(found[2])
        if found[2].startswith("file:"):
            place = Path(found[2].removeprefix("file:"))
        elif re.match(r"[a-z][a-z0-9]+:", found[2]):
            return text if self._reference(found[2], files) == found[2] else kind
        if kind == "transformers" and not place.exists():  # a name of the hub
            return text
        for path in _files_of(kind, place):
            files.append(self._digest(path))
        return kind

    def _digest(self, path: Path) -> str:
        signature, key = stat_signature(path), str(path.absolute())
        known = self._digests.get(key)
        if known is not None and known[0] == signature:
            return known[1]
        record = self._cache / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.json"
        digest = None
        with contextlib.suppress(OSError, ValueError, TypeError):
            kept_signature, kept = json.loads(record.read_bytes())
            digest = str(kept) if kept_signature == signature else None
        if digest is None:
            digest = sha256_of(path)
            if signature[1] >= _KEPT_FROM_BYTES:
                _write(record, lambda file: file.write_text(json.dumps([signature, digest])))
        self._digests[key] = signature, digest
        return digest


def _fields(value: Any, without: frozenset[str]) -> Iterator[tuple[str, Any]]:
    for field in dataclasses.fields(value):
        if field.name not in without:
            yield field.name, getattr(value, field.name)


def _files_of(kind: str, path: Path) -> list[Path]:
    """Return the files that a reference means, in an order that does not depend on the machine."""
    if path.is_dir():
        return sorted(each for each in path.rglob("*") if each.is_file() and not each.name.startswith("."))
    if kind == "onnx":
        return [path, *_external_data(path)]
    if kind == "openvino":
        weights = path.with_suffix(".bin")
        return [path, weights] if weights.is_file() else [path]
    return [path]


def _external_data(path: Path) -> list[Path]:
    """Return the files beside an ONNX graph that hold tensors of it."""
    names: dict[str, None] = {}
    with path.open("rb") as file:
        if not os.fstat(file.fileno()).st_size:
            return []
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as graph:
            for found in _EXTERNAL_DATA.finditer(graph):
                names[graph[found.end() : found.end() + found[1][0]].decode("utf-8", "replace")] = None
    folder = path.parent
    return [folder / name for name in names if "\0" not in name and (folder / name).is_file()]


def _write(path: Path, write: Callable[[Path], object]) -> None:
    """Write a file whose loss costs only time, at once or not at all."""
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
        try:
            write(temporary)
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
