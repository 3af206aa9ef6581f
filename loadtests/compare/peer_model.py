"""Loading and running a torchvision model as documentations show it, for the servers that EdgeServe is compared with.

Images are decoded and prepared by EdgeServe's own code, so that this costs every side the same.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from serve_app.core.task import ImageInput
from serve_app.models.torchvision_compat import import_torchvision
from serve_app.tasks.classes import top_k
from serve_app.tasks.images import decode_image, preprocess

_MAX_PIXELS = 50_000_000
#: Their constructors draw initial weights slowly, and build what only training uses, unless told not to.
_ARGUMENTS = {name: {"init_weights": False, "aux_logits": False} for name in ("googlenet", "inception_v3")}


@dataclass(frozen=True, slots=True, kw_only=True)
class Classified:
    """Probabilities by class, and the seconds of the execution."""

    predictions: dict[int, float]
    exec_s: float


class PeerModels:
    """The models of a comparison.

    Args:
        spec: the file that says where they are, see ``zoo.py``.
    """

    def __init__(self, spec: Path) -> None:
        self._models: dict[str, Any] = json.loads(spec.read_text())
        self._images = {model_id: ImageInput(**model["image"]) for model_id, model in self._models.items()}
        self._torchvision = import_torchvision().models
        torch.set_num_threads(1)

    def load(self, model_id: str) -> nn.Module:
        """Construct it, and load its state dict: what PyTorch recommends, and ``torch.load`` allows by default."""
        model = self._models[model_id]
        name = model["builder"].partition(":")[2]
        module: nn.Module = self._torchvision.get_model(name, weights=None, **_ARGUMENTS.get(name, {}))
        module.load_state_dict(torch.load(model["file"]))
        return module.eval()

    def load_whole(self, model_id: str) -> nn.Module:
        """Unpickle a whole module, which is faster, and must be allowed by name because it may run any code."""
        module: nn.Module = torch.load(self._models[model_id]["whole"], weights_only=False)
        return module

    def size_bytes(self, model_id: str) -> int:
        """Bytes of its weights."""
        size: int = self._models[model_id]["bytes"]
        return size

    def classify(self, module: nn.Module, model_id: str, image: bytes, count: int) -> Classified:
        """The ``count`` best classes of a JPEG."""
        batch = torch.from_numpy(preprocess(decode_image(image, _MAX_PIXELS), self._images[model_id])[None])
        began_s = time.perf_counter()
        with torch.inference_mode():
            logits = module(batch)[0].numpy()
        exec_s = time.perf_counter() - began_s
        best = top_k(logits, (), count)
        return Classified(predictions={one.index: one.probability for one in best}, exec_s=exec_s)
