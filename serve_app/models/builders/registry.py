"""Turn a catalog entry into a module with or without weights, and its metadata."""

from __future__ import annotations

import logging
from pathlib import Path

import torch
from torch import nn

from serve_app.core.catalog import ModelEntry
from serve_app.models.builders.base import Builder, Metadata
from serve_app.models.builders.factory import FactoryBuilder
from serve_app.models.builders.timm import TimmBuilder
from serve_app.models.builders.torchvision import TorchvisionBuilder
from serve_app.models.weight_sources import PRETRAINED, Download, load_strictly, read_safetensors

logger = logging.getLogger(__name__)


def resolve(builder: str) -> Builder:
    """Find a builder by its name: ``torchvision:NAME[@WEIGHTS]``, ``timm:NAME`` or ``package.module:factory``.

    Raises:
        StoreError: there is none, or a library that it needs is not installed.
    """
    kind, _, name = builder.partition(":")
    if kind == "torchvision":
        return TorchvisionBuilder(name)
    if kind == "timm":
        return TimmBuilder(name)
    return FactoryBuilder(builder)


def build(entry: ModelEntry, weights: str) -> nn.Module:
    """Build a model with its weights, in eval mode.

    Args:
        entry: names the builder.
        weights: the weights to use, which may differ from those that the entry asks for. ``random:SEED`` is
            ``torch.manual_seed(SEED)`` followed by the builder's own initialization; the caller's random state is
            left alone.

    Raises:
        DownloadFailed: pretrained weights could not be fetched.
        StoreError: there is no such builder, or the weights do not fit.
    """
    builder = resolve(entry.builder)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(_seed(weights))
        module = builder.pretrained() if weights == PRETRAINED else builder.construct(weights)
    _drop_unused(module, builder)
    if weights.startswith("file:"):
        path = Path(weights.removeprefix("file:"))
        unused = tuple(f"{name}." for name in builder.unused)
        tensors = {key: value for key, value in read_safetensors(path).items() if not key.startswith(unused)}
        # Some modules refuse a state dict that lacks their version, and safetensors files cannot.
        state = module.state_dict()
        state.clear()
        state.update(tensors)
        load_strictly(module, state, str(path))
    return module.requires_grad_(False).eval()


def build_on_meta(builder_name: str, weights: str) -> nn.Module:
    """Build a model without storage: every parameter and buffer is on the meta device, in eval mode.

    Args:
        builder_name: as ``resolve`` takes it.
        weights: those of the stored model, which may decide the structure.

    Raises:
        StoreError: there is no such builder.
    """
    builder = resolve(builder_name)
    try:
        with torch.device("meta"):
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
    return resolve(entry.builder).metadata()


def download(entry: ModelEntry) -> Download | None:
    """Return where pretrained weights of the entry come from; None if it needs no download.

    Raises:
        StoreError: there is no such builder, or it has no pretrained weights.
    """
    return resolve(entry.builder).download() if entry.weights == PRETRAINED else None


def _seed(weights: str) -> int:
    return int(weights.removeprefix("random:")) if weights.startswith("random:") else 0


def _drop_unused(module: nn.Module, builder: Builder) -> None:
    """Drop what eval mode never runs, as torchvision does itself for ``aux_logits=False``."""
    for name in builder.unused:
        setattr(module, name, None)
    if builder.unused:
        setattr(module, "aux_logits", False)  # noqa: B010 (nn.Module types its attributes as tensors)
