"""The kinds of builders: torchvision's classifiers, timm's models, and any factory function.

Each kind answers the same five questions, see ``Builder``. To add a kind, write such a class and name it in
``serve_app.models.builders.resolve``.
"""

from __future__ import annotations

import difflib
import importlib
import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import nn

from serve_app.core.catalog import ImageInput, Interpolation
from serve_app.errors import StoreError
from serve_app.models.torchvision_compat import import_torchvision
from serve_app.models.weights import (
    PRETRAINED,
    Download,
    DownloadFailed,
    download_torchvision,
    hub_file,
    load_strictly,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Metadata:
    """What weights say about themselves: top-1 accuracy (0..1), one label per class, and the input preset."""

    accuracy: float | None = None
    labels: tuple[str, ...] = ()
    image: ImageInput = field(default_factory=ImageInput)


class Builder(Protocol):
    """One architecture, by whatever library."""

    #: Children that only training uses; they are dropped after construction, and their weights are not stored.
    unused: tuple[str, ...]

    def download(self) -> Download | None:
        """Where pretrained weights come from; None if they need no download."""

    def construct(self, weights: str) -> nn.Module:
        """A module of the structure that these weights expect, with initial values from the current seed."""

    def pretrained(self) -> nn.Module:
        """A module with its pretrained weights."""

    def metadata(self) -> Metadata:
        """What is known about the pretrained weights without fetching them."""


class TorchvisionBuilder:
    """``torchvision:NAME`` or ``torchvision:NAME@WEIGHTS``; without WEIGHTS the enum's DEFAULT.

    Raises:
        StoreError: torchvision has no such classifier or no such weights.
    """

    def __init__(self, name: str) -> None:
        models = import_torchvision().models
        self._name, _, member = name.partition("@")
        known = models.list_models(module=models)
        if self._name not in known:
            raise StoreError(f"torchvision has no classifier {self._name!r}{_suggest(self._name, known)}")
        self._builder = models.get_model_builder(self._name)
        self._explicit = bool(member)
        enum = models.get_model_weights(self._name)
        if member and member not in enum.__members__:
            raise StoreError(
                f"torchvision:{self._name} has no weights {member!r}; it has {[weights.name for weights in enum]}"
            )
        self._weights = enum[member] if member else enum.DEFAULT
        self.unused = {"googlenet": ("aux1", "aux2"), "inception_v3": ("AuxLogits",)}.get(self._name, ())

    def download(self) -> Download:
        """The checkpoint of the weights enum; torch hub keeps it in its cache."""
        url = self._weights.url
        return Download(url=url, cached=hub_file(url).is_file())

    def construct(self, weights: str) -> nn.Module:
        """Like ``torchvision.models.NAME(weights=None)``, plus what torchvision changes itself for given weights.

        That is the input transformation of the Inception family and the image size of some vision transformers.
        Weights of a file count as given weights only if the builder names them (``@WEIGHTS``).
        """
        given = weights == PRETRAINED or (weights.startswith("file:") and self._explicit)
        arguments: dict[str, Any] = {}
        if self.unused:
            # Said explicitly, because the default of None means True and warns about it.
            arguments = {"init_weights": True, "transform_input": given}
        if given and self._name.startswith("vit_"):
            arguments["image_size"] = self._weights.meta["min_size"][0]
        module: nn.Module = self._builder(weights=None, **arguments)
        return module

    def pretrained(self) -> nn.Module:
        """The module with the weights of the enum, from torch hub's cache or downloaded."""
        module = self.construct(PRETRAINED)
        state = download_torchvision(self._weights)
        _rename_old_keys(state)
        load_strictly(module, state, f"torchvision:{self._name}@{self._weights.name}")
        return module

    def metadata(self) -> Metadata:
        """Accuracy on ImageNet-1K, categories and preset of the weights enum."""
        meta, preset = self._weights.meta, self._weights.transforms()
        return Metadata(
            accuracy=round(meta["_metrics"]["ImageNet-1K"]["acc@1"] / 100, 5),
            labels=tuple(meta["categories"]),
            image=ImageInput(
                resize_px=preset.resize_size[0],
                crop_px=preset.crop_size[0],
                interpolation=_interpolation(preset.interpolation.value),
                mean=_rgb(preset.mean),
                std=_rgb(preset.std),
            ),
        )


class TimmBuilder:
    """``timm:NAME``, where NAME may carry a tag such as ``resnet50.a1_in1k``.

    Raises:
        StoreError: timm is not installed or has no such model.
    """

    unused: tuple[str, ...] = ()

    def __init__(self, name: str) -> None:
        import_torchvision()  # timm imports torchvision
        try:
            self._timm: Any = importlib.import_module("timm")
        except ImportError as error:
            raise StoreError(f"builder timm:{name} needs timm; run: pip install 'edgeserve[timm]'") from error
        self._name = name
        self._config: Any = None
        if self._timm.is_model(name):
            self._config = self._timm.get_pretrained_cfg(name)
        if self._config is None:
            raise StoreError(f"timm has no model {name!r}{_suggest(name, self._timm.list_models())}")

    def download(self) -> Download:
        """The model hub's file, or the plain URL of older models."""
        repository, url = self._config.hf_hub_id, self._config.url
        if repository:
            hub = importlib.import_module("huggingface_hub")
            cached = hub.try_to_load_from_cache(repository, "model.safetensors")
            return Download(url=f"{hub.constants.ENDPOINT}/{repository}", cached=isinstance(cached, str))
        if url:
            return Download(url=url, cached=hub_file(url).is_file())
        raise StoreError(f"timm:{self._name} has no pretrained weights; ask for random:SEED or file:PATH")

    def construct(self, weights: str) -> nn.Module:
        """``timm.create_model(NAME)``."""
        module: nn.Module = self._timm.create_model(self._name)
        return module

    def pretrained(self) -> nn.Module:
        """``timm.create_model(NAME, pretrained=True)``."""
        try:
            module: nn.Module = self._timm.create_model(self._name, pretrained=True)
        except Exception as error:
            raise DownloadFailed(f"cannot fetch the weights of timm:{self._name}: {error}") from error
        return module

    def metadata(self) -> Metadata:
        """The preset of the model's configuration; timm carries neither accuracy nor labels."""
        config = self._config
        crop_px = int(config.input_size[-1])
        return Metadata(
            image=ImageInput(
                resize_px=math.floor(crop_px / config.crop_pct),
                crop_px=crop_px,
                interpolation=_interpolation(config.interpolation),
                mean=_rgb(config.mean),
                std=_rgb(config.std),
            )
        )


class FactoryBuilder:
    """``package.module:factory``: a callable without arguments that returns an ``nn.Module``.

    Its ``pretrained`` weights are whatever the factory puts into the module.

    Raises:
        StoreError: there is no such module or attribute.
    """

    unused: tuple[str, ...] = ()

    def __init__(self, builder: str) -> None:
        self._builder = builder
        module, _, attribute = builder.partition(":")
        try:
            self._factory: Callable[[], object] = getattr(importlib.import_module(module), attribute)
        except (ImportError, AttributeError, ValueError) as error:
            raise StoreError(
                f"builder {builder!r} cannot be imported ({error}); name it package.module:factory"
            ) from error

    def download(self) -> None:
        """A factory fetches its weights itself."""
        return

    def construct(self, weights: str) -> nn.Module:
        """The module that the factory returns."""
        module = self._factory()
        if not isinstance(module, nn.Module):
            raise StoreError(f"builder {self._builder!r} returned a {type(module).__name__}, not a torch.nn.Module")
        return module

    def pretrained(self) -> nn.Module:
        """The module that the factory returns."""
        return self.construct(PRETRAINED)

    def metadata(self) -> Metadata:
        """Nothing is known."""
        return Metadata()


def _rename_old_keys(state: dict[str, torch.Tensor]) -> None:
    """Renames the keys of torchvision's old DenseNet checkpoints ('norm.1' is now 'norm1'), as torchvision does.

    In place, because the dictionary carries the versions of its modules as an attribute.
    """
    old = re.compile(r"^(.*denselayer\d+\.(?:norm|relu|conv))\.((?:[12])\.(?:weight|bias|running_mean|running_var))$")
    for key in list(state):
        if old.match(key):
            state[old.sub(r"\1\2", key)] = state.pop(key)


def _interpolation(name: str) -> Interpolation:
    if name not in ("bilinear", "bicubic"):
        raise StoreError(f"the weights ask for interpolation {name!r}; name an 'input' with bilinear or bicubic")
    return "bicubic" if name == "bicubic" else "bilinear"


def _rgb(values: Any) -> tuple[float, float, float]:
    red, green, blue = (float(value) for value in values)
    return red, green, blue


def _suggest(name: str, known: list[str]) -> str:
    close = difflib.get_close_matches(name, known, n=3)
    return f"; did you mean {' or '.join(close)}?" if close else ""
