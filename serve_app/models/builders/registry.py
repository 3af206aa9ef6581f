"""Turn a catalog entry into a module with or without weights, and its metadata."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from serve_app.core.catalog import ModelEntry
from serve_app.core.reference import is_reference
from serve_app.core.task import TaskSpec
from serve_app.errors import EdgeServeError, StoreError
from serve_app.models.builders.base import Builder, Metadata
from serve_app.models.builders.efficientnet_lite import EfficientNetLiteBuilder
from serve_app.models.builders.exported import ExportBuilder, rebuild_program
from serve_app.models.builders.factory import FactoryBuilder
from serve_app.models.builders.refusals import foreign_reason, require_servable
from serve_app.models.builders.timm import TimmBuilder
from serve_app.models.builders.torchvision import TorchvisionBuilder
from serve_app.models.builders.transformers import TransformersBuilder, rebuild_transformer
from serve_app.models.builders.unread_weights import without_reading_weights
from serve_app.models.sources.download_cache import OnBytes, ignore_bytes
from serve_app.models.sources.pretrained import PRETRAINED, Pretrained, WeightSource
from serve_app.models.sources.state_dicts import load_strictly, read_state

logger = logging.getLogger(__name__)

#: Builders of libraries and files, by the first part of their names.
_BUILDERS: dict[str, Callable[[str], Builder]] = {
    "torchvision": TorchvisionBuilder,
    "timm": TimmBuilder,
    "efficientnet-lite": EfficientNetLiteBuilder,
    "export": ExportBuilder,
    "transformers": TransformersBuilder,
}

#: Builders whose structure is stored: kind -> builds the module from it.
_FROM_STRUCTURE: dict[str, Callable[[bytes], nn.Module]] = {
    "export": rebuild_program,
    "transformers": rebuild_transformer,
}

#: What people may look for, and what to do instead.
_REFUSED = {
    "torchscript": "TorchScript copies its weights and is deprecated; export the module (torch.export.save) and use "
    "export:FILE.pt2, or as ONNX and use onnx:FILE",
    "aoti": "packages of AOTInductor can never be unloaded; save the exported program and use export:FILE.pt2",
    "sklearn": "convert the model to ONNX (skl2onnx, options={'zipmap': False}) and use onnx:FILE",
    "pickle": "a pickle runs any code; convert the model to ONNX and use onnx:FILE, or name package.module:factory",
}


def resolve(builder: str) -> Builder:
    """Find a builder by its name: ``torchvision:NAME[@WEIGHTS]``, ``timm:NAME``, ``efficientnet-lite:N``,
    ``export:FILE``, ``transformers:NAME`` or ``package.module:factory``.

    Raises:
        StoreError: there is none, or a library that it needs is not installed.
    """
    kind, _, name = builder.partition(":")
    if kind in _REFUSED:
        raise StoreError(f"builder {builder!r}: {_REFUSED[kind]}")
    return FactoryBuilder(builder) if is_factory(builder) else _BUILDERS[kind](name)


def is_factory(builder: str) -> bool:
    """Return whether a builder is a function of the user, which may do anything."""
    kind = builder.partition(":")[0]
    return kind not in _BUILDERS and kind not in _REFUSED


def build(
    entry: ModelEntry, weights: str, source: WeightSource | None = None, on_bytes: OnBytes = ignore_bytes
) -> nn.Module:
    """Build a model with its weights, in eval mode.

    Args:
        entry: names the builder.
        weights: the weights to use, which may differ from those that the entry asks for. ``random:SEED`` is
            ``torch.manual_seed(SEED)`` followed by the builder's own initialization; the caller's random state is
            left alone.
        source: fetches files of weights.
        on_bytes: called as they come.

    Raises:
        DownloadFailed: the weights could not be fetched.
        StoreError: there is no such builder, or the weights do not fit.
    """
    return build_with(entry, weights, fetch(entry, weights, source or WeightSource(), on_bytes))


def fetch(entry: ModelEntry, weights: str, source: WeightSource, on_bytes: OnBytes = ignore_bytes) -> Path | None:
    """Return the file that a model is built from, fetched if need be; None if the builder brings its weights.

    Raises:
        DownloadFailed: the weights could not be fetched.
        StoreError: there is no such builder.
    """
    if is_reference(weights):
        return source.fetcher.fetch(weights, on_bytes)
    origin = resolve(entry.builder).pretrained_source() if weights == PRETRAINED else None
    return None if origin is None else source.file(origin, on_bytes)


def build_with(entry: ModelEntry, weights: str, file: Path | None) -> nn.Module:
    """Build a model with its weights from the file that ``fetch`` has returned, see ``build``."""
    builder = resolve(entry.builder)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(_seed(weights))
        try:
            module = builder.pretrained(file) if weights == PRETRAINED else builder.construct(weights)
        except EdgeServeError:
            raise
        except (Exception, SystemExit) as error:
            # Foreign code raises what it likes.
            raise StoreError(
                f"builder {entry.builder!r} raises {foreign_reason(error)}; call it by hand, and correct it"
            ) from error
    require_servable(module, entry.builder)
    _drop_unused(module, builder)
    if is_reference(weights):
        assert file is not None
        _fill(module, builder, read_state(file), weights)
    return module.requires_grad_(False).eval()


def build_on_meta(builder_name: str, weights: str, structure: bytes | None = None) -> nn.Module:
    """Build a model without storage: every parameter and buffer is on the meta device, in eval mode.

    Args:
        builder_name: as ``resolve`` takes it.
        weights: those of the stored model, which may decide the structure.
        structure: what was stored of it; None if the builder makes it anew.

    Raises:
        StoreError: there is no such builder.
    """
    if structure is not None:
        rebuild = _FROM_STRUCTURE[builder_name.partition(":")[0]]
        return rebuild(structure).to("meta").requires_grad_(False).eval()
    builder = resolve(builder_name)
    try:
        with warnings.catch_warnings(), torch.device("meta"), without_reading_weights():
            # Of a factory that reads weights: once for each tensor.
            warnings.filterwarnings("ignore", message=".*copying from a non-meta parameter")
            module = builder.construct(weights)
    except (RuntimeError, NotImplementedError) as error:
        # A constructor that reads the values of tensors cannot run without them.
        logger.info("%s is built on the CPU, slowly: %s", builder_name, error)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(_seed(weights))
            module = builder.construct(weights)
    _drop_unused(module, builder)
    return module.to("meta").requires_grad_(False).eval()


def metadata(entry: ModelEntry) -> Metadata:
    """Return accuracy, labels and input preset of the pretrained weights, without fetching them.

    Raises:
        StoreError: there is no such builder.
    """
    builder = resolve(entry.builder)
    if is_factory(entry.builder) and (entry.inputs or entry.example):
        # What declares its tensors is no classifier of images unless its entry says so.
        return Metadata(task=TaskSpec())
    return builder.metadata()


def pretrained_source(entry: ModelEntry) -> Pretrained | None:
    """Return where the pretrained weights that the entry asks for come from; None if it needs no file of them.

    Raises:
        StoreError: there is no such builder, or it has no pretrained weights.
    """
    return resolve(entry.builder).pretrained_source() if entry.weights == PRETRAINED else None


def _fill(module: nn.Module, builder: Builder, state: dict[str, torch.Tensor], source: str) -> None:
    """Copy tensors into a module, but for those of its unused children."""
    unused = tuple(f"{name}." for name in builder.unused)
    for name in [name for name in state if name.startswith(unused)]:
        del state[name]
    if not hasattr(state, "_metadata"):
        # Some modules refuse a state dict that lacks their version, and safetensors files cannot have it.
        versioned = module.state_dict()
        versioned.clear()
        versioned.update(state)
        state = versioned
    load_strictly(module, state, source)


def _seed(weights: str) -> int:
    return int(weights.removeprefix("random:")) if weights.startswith("random:") else 0


def _drop_unused(module: nn.Module, builder: Builder) -> None:
    """Drop what eval mode never runs, as torchvision does itself for ``aux_logits=False``."""
    for name in builder.unused:
        setattr(module, name, None)
    if builder.unused:
        setattr(module, "aux_logits", False)  # noqa: B010 (nn.Module types its attributes as tensors)
