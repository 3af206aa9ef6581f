"""Strict YAML: how a file becomes settings, and errors that name file and key."""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from serve_app.errors import ConfigError

_Model = TypeVar("_Model", bound=BaseModel)


class Settings(BaseModel):
    """Frozen, and strict about keys."""

    model_config = ConfigDict(extra="forbid", frozen=True)


def load_yaml(path: Path) -> Any:
    """The content of any YAML file.

    Raises:
        ConfigError: the file is missing or not YAML.
    """
    try:
        return yaml.load(read_text(path), Loader=_UniqueKeyLoader)
    except (yaml.YAMLError, ValueError) as error:
        problem = " ".join(str(error).split())
        raise ConfigError(f"{path}: not valid YAML: {problem}") from None


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


def beside(path: Path, other: Path) -> Path:
    """``other``, which is relative to the folder of the file ``path``."""
    return (path.parent / other.expanduser()).absolute()


def read_text(path: Path) -> str:
    """A text file, whole.

    Raises:
        ConfigError: it cannot be read, or is not UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror or error})") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path}: is not a text file in UTF-8") from None
