"""``catalog.yaml``: the models."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from serve_app.config.default_files import find
from serve_app.config.yaml_files import Settings, beside, read_settings
from serve_app.core.catalog import ModelEntry
from serve_app.core.contract import Axis, ValueRange
from serve_app.core.contract_declaration import TensorDeclaration
from serve_app.core.precision import AGREEMENT
from serve_app.core.reference import is_reference
from serve_app.core.task import Activation, Fit, ImageInput, Interpolation, Pooling, TaskKind, TaskSpec
from serve_app.errors import ConfigError


class _ImageSettings(Settings):
    resize_px: int = Field(default=256, gt=0)
    crop_px: int = Field(gt=0)
    interpolation: Interpolation = "bilinear"
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    fit: Fit = "crop"


class _TaskSettings(Settings):
    kind: TaskKind
    image: _ImageSettings | None = None
    tokenizer: str | None = None
    labels: tuple[str, ...] | str = ()
    activation: Activation | None = None
    pooling: Pooling = "mean"
    normalize: bool = True
    min_score: float = Field(default=0.25, ge=0, le=1)
    max_overlap: float = Field(default=0.45, ge=0, le=1)
    sample_rate: int = Field(default=16000, gt=0)
    context: int = Field(default=64, ge=0)


def _size(value: object) -> object:
    """Check an axis of a shape: a number, -1, or the name of a free axis."""
    if (isinstance(value, str) and value) or type(value) is int:
        return value
    raise ValueError(f"an axis must be a whole number, -1 or a name, not {value!r}")


def _values_alone(value: object) -> object:
    """``0..255`` is short for ``{least: 0, most: 255}``; fractions are numbers too."""
    if isinstance(value, str):
        least, _, most = value.partition("..")
        try:
            return {"least": float(least), "most": float(most)}
        except ValueError:
            raise ValueError(f"must be a range, such as 0..255, not {value!r}") from None
    return value


class _ValueSettings(Settings):
    least: float
    most: float


class _TensorSettings(Settings):
    name: str = Field(min_length=1)
    datatype: str | None = None
    shape: tuple[Annotated[Any, BeforeValidator(_size)], ...] | None = None
    default: float | None = None
    returned_by: str | None = None
    values: Annotated[_ValueSettings | None, BeforeValidator(_values_alone)] = None

    def declaration(self) -> TensorDeclaration:
        """Return what it declares; raises ``ValueError`` where that cannot be."""
        fields = self.model_dump()
        return TensorDeclaration(**fields | {"values": ValueRange(**fields["values"]) if self.values else None})


class _AxisSettings(Settings):
    least: int = Field(default=1, ge=1)
    most: int = Field(ge=1)
    multiple: int = Field(default=1, ge=1)


def _kind_alone(value: object) -> object:
    """``task: KIND`` is short for ``task: {kind: KIND}``."""
    return {"kind": value} if isinstance(value, str) else value


def _limit_alone(value: object) -> object:
    """``8`` is short for ``{most: 8}``, and ``32..512`` for ``{least: 32, most: 512}``."""
    if type(value) is int:
        return {"most": value}
    if isinstance(value, str):
        least, dots, most = value.partition("..")
        if not (dots and least.isdecimal() and most.isdecimal()):
            raise ValueError(f"must be a number, such as 8, or a range, such as 32..512, not {value!r}")
        return {"least": int(least), "most": int(most)}
    return value


#: ``auto``: float32, and what agrees with it.
_PrecisionChoice = Literal["float32", "bfloat16", "int8", "auto"]


class _ModelSettings(Settings):
    builder: str
    weights: str = "pretrained"
    family: str | None = None
    precision: _PrecisionChoice | None = None
    #: Its former name.
    dtype: _PrecisionChoice | None = None
    agreement: float | None = Field(default=None, ge=0, le=1)
    accuracy: float | None = Field(default=None, ge=0, le=1)
    input: _ImageSettings | None = None
    task: Annotated[_TaskSettings | None, BeforeValidator(_kind_alone)] = None
    inputs: tuple[_TensorSettings, ...] = ()
    outputs: tuple[_TensorSettings, ...] = ()
    example: str | None = None
    limits: dict[str, Annotated[_AxisSettings, BeforeValidator(_limit_alone)]] = Field(default_factory=dict)
    runtime: Literal["auto", "torch", "onnxruntime", "openvino"] = "auto"
    pinned: bool = False
    min_copies: int = Field(default=0, ge=0)

    @model_validator(mode="after")
    def _precision_is_said_once(self) -> _ModelSettings:
        if self.precision and self.dtype and self.precision != self.dtype:
            raise ValueError(
                f"precision is {self.precision}, and dtype, its former name, is {self.dtype}; leave dtype out"
            )
        if self.agreement is not None and (self.precision or self.dtype) not in ("auto", "int8"):
            raise ValueError("agreement is of forms with lower precision; write precision: auto, or leave it out")
        return self


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
    """Read ``catalog.yaml``; paths in it are relative to its folder.

    Raises:
        ConfigError: the file is missing, not YAML, or has a wrong key or value.
    """
    path = find(path)
    models = read_settings(path, _CatalogSettings).models
    return tuple(_entry(path, model_id, model) for model_id, model in models.items())


def _entry(path: Path, model_id: str, model: _ModelSettings) -> ModelEntry:
    try:
        return ModelEntry(
            model_id=model_id,
            builder=_builder(path, model.builder),
            weights=_beside(path, model.weights, ("file",)),
            family=model.family,
            accuracy=model.accuracy,
            input=ImageInput(**model.input.model_dump()) if model.input else None,
            task=_task(path, model.task),
            inputs=tuple(tensor.declaration() for tensor in model.inputs),
            outputs=tuple(tensor.declaration() for tensor in model.outputs),
            example=model.example,
            limits=tuple(Axis(name=name, **limit.model_dump()) for name, limit in model.limits.items()),
            runtime=model.runtime,
            **_precisions(model.precision or model.dtype or "float32"),
            agreement=AGREEMENT if model.agreement is None else model.agreement,
            pinned=model.pinned,
            min_copies=model.min_copies,
        )
    except ValueError as error:
        raise ConfigError(f"{path}: models.{model_id}: {error}") from None


def _precisions(choice: _PrecisionChoice) -> dict[str, Any]:
    """Return what ``ModelEntry`` says of the precision."""
    return {"lowered": choice} if choice in ("auto", "int8") else {"dtype": choice}


def _task(path: Path, task: _TaskSettings | None) -> TaskSpec | None:
    if task is None:
        return None
    fields = task.model_dump()
    fields["image"] = ImageInput(**fields["image"]) if task.image else None
    fields["tokenizer"] = _beside(path, task.tokenizer, ("file",)) if task.tokenizer else None
    if isinstance(task.labels, str):
        is_elsewhere = is_reference(task.labels) and not task.labels.startswith("file:")
        fields["labels"] = () if is_elsewhere else _read_labels(path, task.labels)
        fields["labels_from"] = task.labels if is_elsewhere else None
    return TaskSpec(**fields)


def _read_labels(path: Path, reference: str) -> tuple[str, ...]:
    """Read one label a line."""
    file = beside(path, Path(reference.removeprefix("file:")))
    try:
        return tuple(file.read_text(encoding="utf-8").splitlines())
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"labels {reference} cannot be read ({error}); name a file with one label a line") from None


def _builder(path: Path, builder: str) -> str:
    """Make the path of a file relative to the folder of the catalog; of transformers a name that is a folder there."""
    kind, _, place = builder.partition(":")
    is_folder = kind == "transformers" and beside(path, Path(place)).is_dir()
    return _beside(path, builder, ("onnx", "export", *(("transformers",) if is_folder else ())))


def _beside(path: Path, reference: str, kinds: tuple[str, ...]) -> str:
    """Make the path of ``KIND:PATH`` relative to the folder of the catalog; other references stay."""
    kind, _, place = reference.partition(":")
    if kind not in kinds or (is_reference(place) and not place.startswith("file:")):
        return reference
    return f"{kind}:{beside(path, Path(place.removeprefix('file:')))}"
