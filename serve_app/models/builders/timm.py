"""Models of timm, an extra: ``timm:NAME``."""

from __future__ import annotations

import importlib
import math
from pathlib import Path
from typing import Any

from torch import nn

from serve_app.core.task import ImageInput, TaskSpec
from serve_app.errors import StoreError
from serve_app.models.builders.base import Metadata, interpolation_named, rgb, suggest
from serve_app.models.sources.pretrained import Pretrained, torch_hub_file
from serve_app.models.torchvision_compat import import_torchvision


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
            raise StoreError(f"timm has no model {name!r}{suggest(name, self._timm.list_models())}")

    def pretrained_source(self) -> Pretrained:
        """Return the model hub's file, or the plain URL of older models."""
        repository, url = self._config.hf_hub_id, self._config.url
        if repository:
            return Pretrained(references=(f"hf://{repository}/model.safetensors",))
        if url:
            return Pretrained(references=(url,), file=torch_hub_file(url))
        raise StoreError(f"timm:{self._name} has no pretrained weights; ask for random:SEED or file:PATH")

    def construct(self, weights: str) -> nn.Module:
        """Call ``timm.create_model(NAME)``."""
        module: nn.Module = self._timm.create_model(self._name)
        return module

    def pretrained(self, file: Path | None) -> nn.Module:
        """Call ``timm.create_model(NAME, pretrained=True)`` with the file."""
        overlay = {"file": str(file)} if file is not None else None
        try:
            module: nn.Module = self._timm.create_model(self._name, pretrained=True, pretrained_cfg_overlay=overlay)
        except RuntimeError as error:
            reason = " ".join(str(error).split())[:300]
            raise StoreError(f"the weights {file} do not fit timm:{self._name}: {reason}") from error
        return module

    def metadata(self) -> Metadata:
        """Return the preset of the model's configuration; timm carries neither accuracy nor labels."""
        config = self._config
        crop_px = int(config.input_size[-1])
        return Metadata(
            task=TaskSpec(
                # Models whose weights have no classes, such as DINO's, give features.
                kind="image-classification" if config.num_classes else "embedding",
                image=ImageInput(
                    resize_px=math.floor(crop_px / config.crop_pct),
                    crop_px=crop_px,
                    interpolation=interpolation_named(config.interpolation),
                    mean=rgb(config.mean),
                    std=rgb(config.std),
                ),
            )
        )
