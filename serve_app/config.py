"""Configuration: strict YAML in, frozen settings out. Read once, whole, here and nowhere else."""

from __future__ import annotations

import hashlib
import os
import random
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PlainSerializer, ValidationError, model_validator

from serve_app.core.catalog import MODEL_ID_PATTERN, Dtype, ImageInput, ModelEntry
from serve_app.core.links import Link
from serve_app.core.policies import make_policy, policy_parameters
from serve_app.errors import ConfigError

DEFAULT_EDGE = "deploy/edge.yaml"

_SIZE_UNITS = {
    "": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12,
    "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40,
}  # fmt: skip
_DURATION_UNITS = {"us": 1e-6, "ms": 1e-3, "s": 1.0, "min": 60.0, "h": 3600.0, "d": 86400.0}
_Model = TypeVar("_Model", bound=BaseModel)
_QUANTITY = re.compile(r"\s*(\d{1,15}(?:\.\d{1,15})?)\s*([A-Za-z]*)\s*", re.ASCII)

_NUMBER = re.compile(r"-?\d{1,15}(?:\.\d{1,15})?", re.ASCII)

#: First parts of paths that the gateway answers itself, so no location can have them as its prefix.
_RESERVED_NAMES = ("v1", "v2", "metrics", "console", "docs", "openapi.json")

#: Overrides the store directory of every configuration.
STORE_VARIABLE = "EDGESERVE_STORE"


def parse_size(value: object) -> int:
    """``512MiB`` in bytes.

    Raises:
        ValueError: not a size.
    """
    match = _QUANTITY.fullmatch(str(value)) if not isinstance(value, bool) else None
    if match is None or match[2].upper() not in _SIZE_UNITS:
        raise ValueError(f"{value!r} is not a size; write it like 512MiB")
    return int(float(match[1]) * _SIZE_UNITS[match[2].upper()])


def parse_duration(value: object) -> float:
    """``250ms`` in seconds.

    Raises:
        ValueError: not a duration.
    """
    match = _QUANTITY.fullmatch(str(value)) if not isinstance(value, bool) else None
    if match is None or match[2] not in _DURATION_UNITS:
        raise ValueError(f"{value!r} is not a duration; write it like 250ms")
    return float(match[1]) * _DURATION_UNITS[match[2]]


def parse_period(value: object) -> float | None:
    """``1s`` in seconds; None for ``off``, which YAML takes for a truth value.

    Raises:
        ValueError: neither.
    """
    if value is None or value is False or value == "off":
        return None
    period_s = parse_duration(value)
    if period_s <= 0:
        raise ValueError(f"{value!r} must be longer than nothing; off turns it off")
    return period_s


def parse_parameters(policy: str, written: Mapping[str, object]) -> dict[str, float]:
    """Parameters of a policy as ``make_policy`` wants them.

    What ends in ``_s`` there is a duration: ``short: 100s`` here, or ``short_s: 100`` as in code. All else is a number.

    Raises:
        ValueError: no such policy or parameter, or a bad value.
    """
    taken = {parameter.removesuffix("_s"): parameter for parameter in policy_parameters(policy)}
    parameters: dict[str, float] = {}
    for key, value in written.items():
        in_code = key if key in taken.values() else taken.get(key)
        if in_code is None:
            raise ValueError(f"unknown key {key}; policy {policy} takes {', '.join(taken) or 'no parameters'}")
        if in_code in parameters:
            raise ValueError(f"{key} stands twice")
        try:
            parameters[in_code] = parse_duration(value) if in_code != key else _parse_number(value)
        except ValueError as error:
            raise ValueError(f"{key}: {error}") from None
    return parameters


def _parse_number(value: object) -> float:
    if isinstance(value, bool) or not _NUMBER.fullmatch(str(value)):
        raise ValueError(f"{value!r} is not a number")
    return float(str(value))


#: Written in JSON as they are in YAML, so that what one process has read another can read again.
Size = Annotated[int, BeforeValidator(parse_size), PlainSerializer(str, when_used="json"), Field(gt=0)]
_AS_WRITTEN = PlainSerializer(lambda value: "off" if value is None else f"{value:.9f}s", when_used="json")
Duration = Annotated[float, BeforeValidator(parse_duration), _AS_WRITTEN, Field(gt=0)]
Period = Annotated[Annotated[float, Field(gt=0)] | None, BeforeValidator(parse_period), _AS_WRITTEN]


class Settings(BaseModel):
    """Frozen, and strict about keys."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class LocationSettings(Settings):
    """One edge location. ``memory`` is the cache of each of its workers, in bytes."""

    memory: Size
    workers: int = Field(default=1, ge=1, le=64)
    #: Run on the nodes that carry the label ``location=<name>``; on one machine there are none.
    pin_to_nodes: bool = False
    #: Models that each of its workers loads in the background as it starts; they are evicted like others.
    preload: tuple[str, ...] = ()


class LinkSettings(Settings):
    """The network between two locations; ``bandwidth`` in bytes per second."""

    between: tuple[str, str]
    rtt: Duration
    bandwidth: Size = 125_000_000


class DefaultLinkSettings(Settings):
    """The network between two locations that no entry of ``links`` describes."""

    rtt: Duration = 0.002
    bandwidth: Size = 1_250_000_000


class PolicySettings(Settings):
    """Which models to keep; the rest of the keys are the policy's own parameters."""

    model_config = ConfigDict(extra="allow", frozen=True)
    name: str = "edgeserve"

    @model_validator(mode="after")
    def _makeable(self) -> PolicySettings:
        make_policy(self.name, random.Random(0), **self.parameters)
        return self

    @property
    def parameters(self) -> dict[str, float]:
        """Parameters for ``make_policy``."""
        return parse_parameters(self.name, self.model_extra or {})


class WorkerSettings(Settings):
    """How a worker runs models."""

    threads_per_inference: int = Field(default=1, ge=1)
    parallel_inferences: int = Field(default=2, ge=1)
    parallel_loads: int = Field(default=2, ge=1)
    #: Loads in the background of what will probably be asked for, beside the others; 0: none.
    parallel_preloads: int = Field(default=2, ge=0)
    #: How long a failed load is remembered before it is tried again.
    failure_memory: Duration = 5.0
    #: A model that nobody has asked for in so long is unloaded, though nothing needs its place; off: never.
    idle_unload: Period = None
    #: Give the pages of a model's weights back to the machine when it is unloaded. Otherwise the kernel keeps them as
    #: long as nobody else needs the memory, and the next load is free.
    release_page_cache: bool = False
    #: How long a worker that is shut down waits for others to load what it is popular for.
    hand_over: Duration = 5.0


class CoordinatorSettings(Settings):
    """How workers, coordinator and routers keep each other informed."""

    report_every: Duration = 0.25
    stale_after: Duration = 2.0
    popularity_half_life: Duration = 60.0
    #: How far ahead popularity is trusted when a load is weighed against forwarding.
    horizon: Duration = 10.0
    #: Period of the rounds in which the coordinator tells workers what to load and to unload; off: none.
    placement_every: Period = 1.0
    #: After a crowd, a copy that others have too and that is not worth its load goes when it was not used for so long.
    withdraw_after: Duration = 60.0

    @model_validator(mode="after")
    def _heard_in_time(self) -> CoordinatorSettings:
        if self.stale_after <= self.report_every:
            raise ValueError("stale_after must be longer than report_every, or every worker is taken for dead")
        return self


class LimitSettings(Settings):
    """What one request, and all of them together, may ask for."""

    body: Size = 32 * 2**20
    image_pixels: int = Field(default=50_000_000, gt=0)
    batch: int = Field(default=32, ge=1)
    #: Requests that one router has under way; more are answered 503.
    inflight: int = Field(default=1024, ge=1)
    #: Requests that one worker lets wait for memory.
    waiting: int = Field(default=256, ge=1)
    #: Without a deadline of its own a request is answered within this time, if only with a 504.
    request_time: Duration = 60.0


class EdgeSettings(Settings):
    """``edge.yaml``: everything but the models."""

    catalog: Path = Path("catalog.yaml")
    store: Path = Path("~/.cache/edgeserve/store")
    locations: dict[str, LocationSettings] = Field(min_length=1)
    default_location: str | None = None
    links: tuple[LinkSettings, ...] = ()
    default_link: DefaultLinkSettings = DefaultLinkSettings()
    policy: PolicySettings = PolicySettings()
    worker: WorkerSettings = WorkerSettings()
    coordinator: CoordinatorSettings = CoordinatorSettings()
    limits: LimitSettings = LimitSettings()
    #: File with the token that requests must carry; without it nobody is asked.
    token_file: Path | None = None

    @model_validator(mode="after")
    def _consistent(self) -> EdgeSettings:
        for name in self.locations:
            if not MODEL_ID_PATTERN.fullmatch(name) or name in _RESERVED_NAMES:
                taken = ", ".join(_RESERVED_NAMES)
                raise ValueError(f"location {name!r} must be letters, digits, '.', '_' or '-', and none of {taken}")
        named = [self.default_location, *(end for link in self.links for end in link.between)]
        for unknown in [name for name in named if name is not None and name not in self.locations]:
            raise ValueError(f"unknown location {unknown!r}; there are {', '.join(self.locations)}")
        described: set[frozenset[str]] = set()
        for link in self.links:
            ends = frozenset(link.between)
            if len(ends) < 2 or ends in described:
                raise ValueError(f"links: {' and '.join(link.between)} must be two locations, and stand there once")
            described.add(ends)
        return self

    def restart_digest(self) -> str:
        """Changes when replicas cannot take these settings in place of those that they have, and must be replaced."""
        changeable = {"worker": {"idle_unload", "hand_over"}}
        fixed = self.model_dump_json(include={"store", "worker", "limits", "token_file"}, exclude=changeable)
        return hashlib.sha256(f"{fixed} {self.coordinator.report_every}".encode()).hexdigest()

    @property
    def gateway_location(self) -> str:
        """Where requests run that name no location."""
        return self.default_location or next(iter(self.locations))

    def core_links(self) -> dict[tuple[str, str], Link]:
        """``links`` as the routing rules want them."""
        return {link.between: Link(rtt_s=link.rtt, bytes_per_s=link.bandwidth) for link in self.links}

    def core_default_link(self) -> Link:
        """``default_link`` as the routing rules want it."""
        return Link(rtt_s=self.default_link.rtt, bytes_per_s=self.default_link.bandwidth)


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
    def _names_mean_one_thing(self) -> _CatalogSettings:
        for model_id, model in self.models.items():
            if model.family in self.models:
                raise ValueError(
                    f"models.{model_id}: family {model.family!r} is the name of a model; rename one of them"
                )
        return self


def load_edge(path: Path) -> EdgeSettings:
    """Read ``edge.yaml``; relative paths in it are relative to its folder.

    Raises:
        ConfigError: the file is missing, not YAML, or has a wrong key or value.
    """
    path = find(path)
    settings = read_settings(path, EdgeSettings)
    store = os.environ.get(STORE_VARIABLE)
    return settings.model_copy(
        update={
            "catalog": _beside(path, settings.catalog),
            "store": Path(store).expanduser().absolute() if store else _beside(path, settings.store),
            "token_file": _beside(path, settings.token_file) if settings.token_file else None,
        }
    )


def load_catalog(path: Path) -> tuple[ModelEntry, ...]:
    """Read ``catalog.yaml``; paths of weights in it are relative to its folder.

    Raises:
        ConfigError: the file is missing, not YAML, or has a wrong key or value.
    """
    path = find(path)
    models = read_settings(path, _CatalogSettings).models
    return tuple(_entry(path, model_id, model) for model_id, model in models.items())


def load_token(settings: EdgeSettings) -> str | None:
    """The token that requests must carry, if any.

    Raises:
        ConfigError: the file cannot be read or is empty.
    """
    if settings.token_file is None:
        return None
    token = _read(settings.token_file).strip()
    if not token:
        raise ConfigError(f"{settings.token_file}: the token file is empty; write a token into it or drop token_file")
    return token


def load_yaml(path: Path) -> Any:
    """The content of any YAML file.

    Raises:
        ConfigError: the file is missing or not YAML.
    """
    try:
        return yaml.load(_read(path), Loader=_UniqueKeyLoader)
    except (yaml.YAMLError, ValueError) as error:
        problem = " ".join(str(error).split())
        raise ConfigError(f"{path}: not valid YAML: {problem}") from None


def find(path: Path) -> Path:
    """A configuration file by its path, from the working directory or from the project's folder.

    Raises:
        ConfigError: it is in neither.
    """
    path = path.expanduser()
    candidates = [path] if path.is_absolute() else [Path.cwd() / path, Path(__file__).parents[1] / path]
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    raise ConfigError(f"{path}: no such file; looked for {' and '.join(map(str, candidates))}")


def preset(variables: Mapping[str, str]) -> None:
    """Set environment variables for this process and its children, but none that the user has set."""
    for name, value in variables.items():
        os.environ.setdefault(name, value)


def environment(extra: Mapping[str, str]) -> dict[str, str]:
    """The environment for a process that we start: ours, and ``extra`` where ours says nothing."""
    return {**extra, **os.environ}


def ray_address() -> str | None:
    """The Ray cluster that the user wants to join, if any."""
    return os.environ.get("RAY_ADDRESS") or None


def has_ray_token() -> bool:
    """Whether Ray finds an authentication token for this user."""
    named = os.environ.get("RAY_AUTH_TOKEN_PATH")
    path = Path(named) if named else Path.home() / ".ray" / "auth_token"
    return bool(os.environ.get("RAY_AUTH_TOKEN")) or path.is_file()


def traces_dir() -> Path | None:
    """The folder of recorded traces that the user has named, if any."""
    named = os.environ.get("EDGESERVE_TRACES")
    return Path(named).expanduser() if named else None


def ray_temp_dir() -> Path:
    """Where Ray keeps its files on this machine."""
    return Path(os.environ.get("RAY_TMPDIR") or tempfile.gettempdir())


def lines_dir() -> Path:
    """Where this user's workers on this machine listen for routers; socket paths must be short."""
    return ray_temp_dir() / f"edgeserve-{os.getuid()}"


def state_dir() -> Path:
    """Where this user's EdgeServe remembers what it has started."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache").expanduser() / "edgeserve"


class _UniqueKeyLoader(yaml.SafeLoader):
    """Refuses a key that stands twice in one mapping; YAML would silently keep the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key_node, _ in node.value:
            key = str(key_node.value)
            if key in seen and key != "<<":
                raise yaml.constructor.ConstructorError(None, None, f"key {key!r} stands twice", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


def read_settings(path: Path, kind: type[_Model]) -> _Model:
    """Read any YAML file as the settings ``kind``.

    Raises:
        ConfigError: the file is missing, not YAML, or has a wrong key or value.
    """
    content = load_yaml(path)
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: must be a mapping with the keys {', '.join(kind.model_fields)}")
    try:
        return kind.model_validate(content)
    except ValidationError as error:
        first = min(error.errors(), key=lambda problem: problem["type"] != "extra_forbidden")
        keys = [str(part) for part in first["loc"]]
        raise ConfigError(f"{path}: {_sentence(kind, keys, first['type'], first['msg'])}") from None


def _sentence(kind: type[BaseModel], keys: list[str], problem: str, message: str) -> str:
    where = ".".join(keys)
    if problem == "extra_forbidden":
        return f"unknown key {where}; there are {', '.join(_keys_beside(kind, keys))}"
    if problem == "missing":
        return f"key {where} is missing"
    message = message.removeprefix("Value error, ")
    return f"{where}: {message}" if where else message


def _keys_beside(kind: type[BaseModel], keys: list[str]) -> list[str]:
    """The keys that exist where an unknown one was found."""
    fields = kind.model_fields
    for key in keys[:-1]:
        if key in fields:
            nested = [arg for arg in _type_tree(fields[key].annotation) if issubclass(arg, BaseModel)]
            fields = nested[0].model_fields if nested else fields
    return list(fields)


def _type_tree(annotation: Any) -> list[type]:
    inner = [found for arg in get_args(annotation) for found in _type_tree(arg)]
    return [annotation, *inner] if isinstance(annotation, type) and not get_args(annotation) else inner


def _entry(path: Path, model_id: str, model: _ModelSettings) -> ModelEntry:
    weights = model.weights
    if weights.startswith("file:"):
        weights = f"file:{_beside(path, Path(weights.removeprefix('file:')))}"
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


def _beside(path: Path, other: Path) -> Path:
    return (path.parent / other.expanduser()).absolute()


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror or error})") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path}: is not a text file in UTF-8") from None
