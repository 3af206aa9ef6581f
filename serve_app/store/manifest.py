"""The manifest of one published model: facts about the model, and the place of every tensor.

A manifest says for each tensor in which file and at which byte it starts. Models may therefore share blobs, or
single tensors, without a change of format. This module does not import torch: routers read manifests too.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import re
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

from serve_app.core.catalog import ModelEntry, ModelProfile, PublishedModel, RuntimeName
from serve_app.core.task import TaskSpec
from serve_app.errors import StoreError

FORMAT = 5

BLOB_NAME = re.compile(r"[0-9a-f]{64}\.[a-z]{1,16}")

#: Bytes of one element, by the names that safetensors gives to types.
ITEM_BYTES = {
    "BOOL": 1,
    "U8": 1,
    "I8": 1,
    "I16": 2,
    "U16": 2,
    "F16": 2,
    "BF16": 2,
    "I32": 4,
    "U32": 4,
    "F32": 4,
    "I64": 8,
    "U64": 8,
    "F64": 8,
}


#: What came to be written after the format was made: manifests without it are read as well.
_ADDED: Mapping[type, frozenset[str]] = {
    PublishedModel: frozenset({"private_bytes", "joined_elements"}),
    ModelProfile: frozenset({"tier"}),
}

Layout = Literal["row_major", "channels_last"]

Role = Literal["weights", "graph", "tokenizer"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ManifestKey:
    """The place of one manifest.

    Attributes:
        name: of its model.
        stem: the name of its file without ``.json``.
        form: the name of the file of a compiled form, without ``.json``; empty: the model as it was published.
    """

    name: str
    stem: str
    form: str = ""

    @property
    def fingerprint(self) -> str:
        """Of the entry that it was published from."""
        return self.stem.partition("-")[0]


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorPlace:
    """The place of one parameter or buffer: ``nbytes`` from byte ``offset`` of the blob ``file``.

    A ``channels_last`` tensor of shape (N, C, H, W) is stored as (N, H, W, C). Tied tensors are two names with the same
    place.
    """

    name: str
    kind: Literal["parameter", "buffer"]
    file: str
    offset: int
    nbytes: int
    dtype: str
    shape: tuple[int, ...]
    layout: Layout

    def __post_init__(self) -> None:
        if self.layout == "channels_last" and len(self.shape) != 4:
            raise ValueError(f"tensor {self.name!r} cannot be channels_last with the shape {self.shape}")
        if self.dtype not in ITEM_BYTES:
            raise ValueError(f"tensor {self.name!r} has the unknown dtype {self.dtype!r}")
        if self.offset < 0 or any(size < 0 for size in self.shape):
            raise ValueError(f"tensor {self.name!r} has a negative offset or shape")
        if self.offset % ITEM_BYTES[self.dtype]:
            raise ValueError(f"tensor {self.name!r} starts at {self.offset}, within an element of its dtype")
        if self.nbytes != math.prod(self.shape) * ITEM_BYTES[self.dtype]:
            raise ValueError(f"tensor {self.name!r} has {self.nbytes} bytes, which does not match its shape and dtype")

    @property
    def strides(self) -> tuple[int, ...]:
        """Return the elements from one index to the next, per dimension."""
        order = (0, 2, 3, 1) if self.layout == "channels_last" else range(len(self.shape))
        strides, step = [0] * len(self.shape), 1
        for dimension in reversed(order):
            strides[dimension] = step
            step *= self.shape[dimension]
        return tuple(strides)


@dataclass(frozen=True, slots=True, kw_only=True)
class BlobFile:
    """One immutable file; ``name`` is ``<sha256>.<ending>``.

    ``role`` says what of a model it is: weights are mapped, a graph is what a runtime parses, and a tokenizer
    belongs to the task.
    """

    name: str
    role: Role = "weights"
    size_bytes: int
    sha256: str

    def __post_init__(self) -> None:
        if BLOB_NAME.fullmatch(self.name) is None or self.name.partition(".")[0] != self.sha256:
            raise ValueError(f"blob {self.name!r} is not named after its sha256 {self.sha256!r}")


@dataclass(frozen=True, slots=True, kw_only=True)
class FoldedNorm:
    """A batch norm whose scale and shift are in the weights of the convolution before it; both by module name."""

    conv: str
    norm: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ExecutionFormat:
    """How the files of a model are run.

    Attributes:
        runtime: the library that runs it.
        made_for: the version of the library and the processor that the files were optimized for; empty: for any.
        channels_last: of torch: images have their channels last in memory.
        folded: of torch: how the module of the builder is changed to run the stored tensors.
        by_keyword: of torch: the module takes its inputs by their names rather than by their order.
    """

    runtime: RuntimeName = "torch"
    made_for: str = ""
    channels_last: bool = False
    folded: tuple[FoldedNorm, ...] = ()
    by_keyword: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Agreement:
    """How far a form of lower precision answers as the model was published.

    Attributes:
        share: of the probes, or of what their answers consist of, that agree; in 0..1.
        probes: how many inputs were compared.
        inputs: what they were, such as ``crops of 9 photographs``.
        criterion: what agrees, such as ``the same best class``.
    """

    share: float
    probes: int
    inputs: str
    criterion: str

    def __str__(self) -> str:
        return f"{self.criterion} on {self.share:.2%} of {self.probes} {self.inputs}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """One published model.

    ``model`` has what comes with the weights. ``ModelStore.catalog`` overlays it with family, pinning, accuracy and
    task of the catalog. ``default_task`` is that of the weights, which applies where the catalog names none.
    ``agreement`` is of forms with lower precision.
    """

    model: PublishedModel
    default_task: TaskSpec
    execution: ExecutionFormat
    tensors: tuple[TensorPlace, ...]
    files: tuple[BlobFile, ...]
    format: int = FORMAT
    agreement: Agreement | None = None

    def __post_init__(self) -> None:
        if self.format != FORMAT:
            raise ValueError(f"format {self.format} is not the format {FORMAT} that this version reads")
        sizes = {file.name: file.size_bytes for file in self.files}
        names: set[str] = set()
        for place in self.tensors:
            if place.name in names:
                raise ValueError(f"tensor {place.name!r} is listed twice")
            names.add(place.name)
            if place.file not in sizes:
                raise ValueError(f"tensor {place.name!r} lies in {place.file!r}, which is not among the files")
            if place.offset + place.nbytes > sizes[place.file]:
                raise ValueError(f"tensor {place.name!r} ends after the end of its file")

    @property
    def content_id(self) -> str:
        """Return 16 hexadecimal digits that are equal for manifests which answer alike, whenever they were measured."""
        content = dataclasses.asdict(self)
        del content["agreement"]
        model = content.pop("model")
        content["model"] = [model[key] for key in ("contract", "runtime", "dtype", "weights_actual", "row_by_row")]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]

    def to_json(self) -> bytes:
        """Convert to UTF-8 JSON that ``from_json`` converts back unchanged."""
        return json.dumps(dataclasses.asdict(self), ensure_ascii=False, separators=(",", ":")).encode()

    @classmethod
    def from_json(cls, text: bytes, source: str) -> Manifest:
        """Read a manifest strictly.

        Args:
            text: UTF-8 JSON.
            source: the file's name, for messages.

        Raises:
            StoreError: something is missing, unknown, of the wrong type or contradictory.
        """
        try:
            raw = json.loads(text)
            if isinstance(raw, dict) and raw.get("format") != FORMAT:
                raise ValueError(f"format {raw.get('format')!r} is not the format {FORMAT} that this version reads")
            # Earlier versions have not written it.
            manifest = _decode(cls, {"agreement": None} | raw if isinstance(raw, dict) else raw, "")
        except (ValueError, RecursionError) as error:
            raise StoreError(f"manifest {source} is malformed ({error}); publish the model again") from error
        assert isinstance(manifest, Manifest)
        return manifest


def is_allowed(form: Manifest, entry: ModelEntry) -> bool:
    """Return whether a compiled form may serve an entry: in the precision that it asks for, and agreeing enough."""
    share = None if form.agreement is None else form.agreement.share
    return entry.allows(form.model.dtype, share)


def _decode(kind: Any, value: Any, where: str) -> Any:
    """Build a value of type ``kind`` from JSON; ``where`` is the path of keys, for messages."""
    if type(value) is kind:
        return value
    if dataclasses.is_dataclass(kind):
        return _decode_dataclass(kind, value, where)
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is tuple:
        return _decode_tuple(arguments, value, where)
    if origin in (types.UnionType, typing.Union):
        options = [option for option in arguments if option is not type(None)]
        return None if value is None else _decode(options[0], value, where)
    if origin is Literal:
        if value not in arguments:
            raise ValueError(f"{where}: {value!r} is not one of {arguments}")
        return value
    if kind is float and type(value) is int:
        return float(value)
    raise ValueError(f"{where}: expected {kind.__name__}, found {type(value).__name__}")


def _decode_dataclass(kind: Any, value: Any, where: str) -> Any:
    if not isinstance(value, dict):
        raise ValueError(f"{where or 'the file'}: expected an object, found {type(value).__name__}")
    hints = _hints(kind)
    required = hints.keys() - _ADDED.get(kind, frozenset())
    if not required <= value.keys() <= hints.keys():
        missing, unknown = sorted(required - value.keys()), sorted(value.keys() - hints.keys())
        raise ValueError(f"{where or 'the file'}: missing keys {missing}, unknown keys {unknown}")
    prefix = f"{where}." if where else ""
    return kind(**{name: _decode(hint, value[name], prefix + name) for name, hint in hints.items() if name in value})


def _decode_tuple(arguments: tuple[Any, ...], value: Any, where: str) -> tuple[Any, ...]:
    if not isinstance(value, list):
        raise ValueError(f"{where}: expected a list, found {type(value).__name__}")
    if arguments[-1] is Ellipsis:
        if all(type(item) is arguments[0] for item in value):  # plain values, such as labels: nothing to convert
            return tuple(value)
        arguments = (arguments[0],) * len(value)
    if len(arguments) != len(value):
        raise ValueError(f"{where}: expected {len(arguments)} values, found {len(value)}")
    pairs = enumerate(zip(arguments, value, strict=True))
    return tuple(_decode(kind, item, f"{where}[{index}]") for index, (kind, item) in pairs)


@cache
def _hints(kind: Any) -> dict[str, Any]:
    return typing.get_type_hints(kind)
