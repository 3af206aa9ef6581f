"""Models of transformers, an extra: ``transformers:NAME``, a folder in Hugging Face layout or a name of the hub.

The class is the one that the configuration names. A worker builds the module from the configuration alone, which is
stored beside the weights; it needs neither the folder nor the hub.
"""

from __future__ import annotations

import importlib
import inspect
import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from serve_app.core.contract import BATCH, FREE, TensorSpec
from serve_app.core.task import TaskSpec
from serve_app.errors import DownloadFailed, StoreError
from serve_app.models.builders.base import Metadata
from serve_app.models.builders.described_module import DescribedModule
from serve_app.models.torchvision_compat import declare_missing_operators, let_operators_be_called

_SEQUENCE = "sequence"

#: Outputs that a model has beside its answer, and that are left out.
_SIDE_OUTPUTS = ("loss", "past_key_values", "hidden_states", "attentions", "cross_attentions", "encoder_attentions",
                 "encoder_hidden_states", "decoder_hidden_states", "decoder_attentions")  # fmt: skip


class TransformersBuilder:
    """``transformers:NAME``.

    Raises:
        StoreError: transformers is not installed.
    """

    unused: tuple[str, ...] = ()

    def __init__(self, name: str) -> None:
        self._name = name
        self._library = _library(name)

    def pretrained_source(self) -> None:
        """Return None: transformers fetches files itself, into the cache of the hub."""
        return

    def construct(self, weights: str) -> nn.Module:
        """Build the class that the configuration names, with initial values."""
        config = self._config()
        kind = self._class(config)
        return _Transformer(kind(config), _structure(kind, config))

    def pretrained(self, file: Path | None) -> nn.Module:
        """Read the weights from the folder, or from the hub."""
        config = self._config()
        kind = self._class(config)
        try:
            model = kind.from_pretrained(self._name, config=config, dtype=torch.float32)
        except OSError as error:
            raise self._unreachable(error) from error
        let_operators_be_called()
        return _Transformer(model, _structure(kind, config))

    def metadata(self) -> Metadata:
        """Return what holds for every such model; the module itself knows more, see ``DescribedModule``."""
        return Metadata(task=TaskSpec())

    def _config(self) -> Any:
        try:
            config = self._library.AutoConfig.from_pretrained(self._name, trust_remote_code=False)
        except OSError as error:
            raise self._unreachable(error) from error
        except ValueError as error:
            reason = " ".join(str(error).split())[:300]
            raise StoreError(
                f"transformers:{self._name} is no model that the installed transformers knows ({reason}); models that "
                "bring code of their own need a factory: package.module:factory"
            ) from error
        if hasattr(config, "use_cache"):
            config.use_cache = False
        return config

    def _class(self, config: Any) -> Any:
        named = (getattr(config, "architectures", None) or [None])[0]
        kind = getattr(self._library, named, None) if named else None
        if kind is None:
            kind = self._library.AutoModel._model_mapping.get(type(config))
        if kind is None or isinstance(kind, tuple):
            raise StoreError(f"transformers has no model class {named!r}; name one in architectures of config.json")
        return kind

    def _unreachable(self, error: Exception) -> StoreError:
        reason = " ".join(str(error).split())[:200]
        if Path(self._name).is_dir():
            return StoreError(
                f"transformers:{self._name} cannot be read ({reason}); the folder needs config.json and "
                "model.safetensors"
            )
        return DownloadFailed(f"transformers:{self._name} is no folder, and cannot be fetched from the hub ({reason})")


def rebuild_transformer(structure: bytes) -> nn.Module:
    """Make the module of a model from its structure; its weights take no memory."""
    said = json.loads(structure)
    library = _library(said["class"])
    kind = getattr(library, said["class"])
    with torch.device("meta"):
        return _Transformer(kind(kind.config_class.from_dict(said["config"])), structure)


class _Transformer(DescribedModule):
    """Calls a model with named tensors and without a cache of earlier tokens; returns the tensors of its answer."""

    def __init__(self, model: nn.Module, structure: bytes) -> None:
        super().__init__()
        self.model = model.eval()
        self.structure = structure
        self.metadata = Metadata(task=TaskSpec(), inputs=_inputs(model))

    def forward(self, **tensors: torch.Tensor) -> dict[str, torch.Tensor]:
        """Call the model."""
        answers = self.model(**tensors, return_dict=True)
        return {
            name: value
            for name, value in answers.items()
            if isinstance(value, torch.Tensor) and name not in _SIDE_OUTPUTS
        }


def _library(name: str) -> Any:
    # transformers imports torchvision where it is installed.
    declare_missing_operators()
    try:
        library = importlib.import_module("transformers")
    except ImportError as error:
        raise StoreError(
            f"builder transformers:{name} needs transformers; run: pip install 'edgeserve[transformers]'"
        ) from error
    library.utils.logging.set_verbosity_error()
    library.utils.logging.disable_progress_bar()
    return library


def _structure(kind: Any, config: Any) -> bytes:
    return json.dumps({"class": kind.__name__, "config": config.to_dict()}).encode()


def _inputs(model: Any) -> tuple[TensorSpec, ...]:
    """Return the inputs of a model, by its main input and by what its ``forward`` takes."""
    parameters, config = inspect.signature(model.forward).parameters, model.config
    main = model.main_input_name
    if main == "pixel_values":
        side = config.image_size
        height, width = side if isinstance(side, list | tuple) else (side, side)
        shape = (FREE, config.num_channels, height, width)
        return (TensorSpec(name=main, datatype="FP32", shape=shape),)
    axes = (BATCH, _SEQUENCE)
    if main == "input_values":
        return (TensorSpec(name=main, datatype="FP32", shape=(FREE, FREE), axes=axes),)
    if main != "input_ids":
        raise StoreError(
            f"models of transformers that take {main!r} need a factory that returns one for fixed inputs; name it "
            "package.module:factory, with inputs or an example"
        )
    defaults = {"input_ids": None, "attention_mask": 1.0}
    if getattr(config, "type_vocab_size", 0):
        defaults["token_type_ids"] = 0.0
    inputs = [
        TensorSpec(name=name, datatype="INT64", shape=(FREE, FREE), axes=axes, default=default)
        for name, default in defaults.items()
        if name in parameters
    ]
    if getattr(config, "is_encoder_decoder", False):
        inputs.append(
            TensorSpec(name="decoder_input_ids", datatype="INT64", shape=(FREE, FREE), axes=(BATCH, "decoder_sequence"))
        )
    return tuple(inputs)
