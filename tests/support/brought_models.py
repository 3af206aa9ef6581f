"""Factories of modules as other libraries leave them: adapted, quantized and compiled ones."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path
from typing import Any

import torch
from torch import nn

from serve_app.models.torchvision_compat import declare_missing_operators, import_torchvision

#: Where a test has put the package of AOTInductor that the factories below open.
AOTI_PACKAGE = "EDGESERVE_TEST_AOTI_PACKAGE"


class Layers(nn.Module):
    """20 numbers in, 3 out; 9 MB of weights."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(20, 1500), nn.ReLU(), nn.Linear(1500, 1500), nn.ReLU(), nn.Linear(1500, 3)
        )

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return self.layers(features)


def lora_on_vit() -> nn.Module:
    """A small vision transformer with adapters of peft, which do something."""
    # peft imports transformers, and that torchvision.
    import_torchvision()
    import peft
    import transformers

    config = transformers.ViTConfig(
        image_size=64, hidden_size=96, num_hidden_layers=2, num_attention_heads=4, intermediate_size=192, num_labels=10
    )
    adapters = peft.LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    return peft.get_peft_model(transformers.ViTForImageClassification(config), adapters)


def merged_lora_on_vit() -> nn.Module:
    return lora_on_vit().merge_and_unload()  # type: ignore[operator]


def weights_of_torchao() -> nn.Module:
    declare_missing_operators()
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    module = Layers()
    quantize_(module, Int8WeightOnlyConfig())
    return module


def backbone() -> nn.Module:
    """MobileNetV3 with a head for three classes, as fine-tunes have it."""
    return import_torchvision().models.mobilenet_v3_small(weights=None, num_classes=3)


def opened_package() -> Any:
    return torch._inductor.aoti_load_package(str(Path(os.environ[AOTI_PACKAGE])))


class AroundPackage(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.package = opened_package()

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return self.package(features)


class AroundLoader(nn.Module):
    """Holds what is inside of such a package: the loader in C++."""

    def __init__(self) -> None:
        super().__init__()
        self.loader = opened_package().loader

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return self.loader.run([features])[0]


class HidesPackage(nn.Module):
    """Keeps the package where no attribute shows it."""

    def __init__(self) -> None:
        super().__init__()
        package = opened_package()
        self.call = lambda features: package(features)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return self.call(features)


def module_of_an_exported_program() -> nn.Module:
    return torch.export.export(Layers(), (torch.zeros(1, 20),)).module()


def crashes() -> nn.Module:
    ctypes.string_at(0)
    return Layers()


class CrashesWhenCalled(Layers):
    def forward(self, features: torch.Tensor) -> torch.Tensor:
        ctypes.string_at(0)
        return super().forward(features)


def ends_its_process() -> nn.Module:
    raise SystemExit("no license")
