"""``catalog.yaml``: the models."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from serve_app.config.default_files import find
from serve_app.config.yaml_files import Settings, beside, read_settings
from serve_app.core.catalog import Dtype, ImageInput, ModelEntry
from serve_app.errors import ConfigError


class _ImageSettings(Settings):
    resize_px: int = Field(gt=0)
    crop_px: int = Field(gt=0)
    interpolation: Literal["bilinear", "bicubic"] = "bilinear"
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)


class _ModelSettings(Settings):
    builder: str
    weights: str = "pretrained"
    family: str | None = None
    dtype: Dtype = "float32"
    accuracy: float | None = Field(default=None, ge=0, le=1)
    input: _ImageSettings | None = None
    pinned: bool = False
    min_copies: int = Field(default=0, ge=0)


class _CatalogSettings(Settings):
    models: dict[str, _ModelSettings] = Field(min_length=1)

    @model_validator(mode="after")
    def _models_and_families_have_different_names(self) -> _CatalogSettings:
        for model_id, model in self.models.items():
            if model.family in self.models:
                raise ValueError(
                    f"models.{model_id}: family {model.family!r} is the name of a model; rename one of them"
                )
        return self


def load_catalog(path: Path) -> tuple[ModelEntry, ...]:
    """Read ``catalog.yaml``; paths of weights in it are relative to its folder.

    Raises:
        ConfigError: the file is missing, not YAML, or has a wrong key or value.
    """
    path = find(path)
    models = read_settings(path, _CatalogSettings).models
    return tuple(_entry(path, model_id, model) for model_id, model in models.items())


def _entry(path: Path, model_id: str, model: _ModelSettings) -> ModelEntry:
    weights = model.weights
    if weights.startswith("file:"):
        weights = f"file:{beside(path, Path(weights.removeprefix('file:')))}"
    try:
        return ModelEntry(
            model_id=model_id,
            builder=model.builder,
            weights=weights,
            family=model.family,
            accuracy=model.accuracy,
            input=ImageInput(**model.input.model_dump()) if model.input else None,
            dtype=model.dtype,
            pinned=model.pinned,
            min_copies=model.min_copies,
        )
    except ValueError as error:
        raise ConfigError(f"{path}: models.{model_id}: {error}") from None
