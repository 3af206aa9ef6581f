"""Serve configuration files such as ``deploy/local.yaml``: the keys that ``edgeserve up`` reads."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from serve_app.config.default_files import find
from serve_app.config.yaml_files import Settings, read_settings
from serve_app.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class Application:
    """One entry of a Serve configuration file."""

    name: str
    route_prefix: str
    edge: str
    location: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeFile:
    """The content of a Serve configuration file such as ``deploy/local.yaml``."""

    path: Path
    applications: tuple[Application, ...]
    host: str
    port: int
    proxy_location: str
    access_log: bool

    @property
    def url(self) -> str:
        """URL of the gateway."""
        host = "127.0.0.1" if self.host in ("0.0.0.0", "") else self.host
        return f"http://{host}:{self.port}"

    @property
    def names(self) -> tuple[str, ...]:
        """The names of all applications."""
        return tuple(app.name for app in self.applications)

    @property
    def locations(self) -> dict[str, str]:
        """URL of every location."""
        return {app.name: self.url + app.route_prefix for app in self.applications if app.location}

    def edge_path(self) -> Path:
        """The ``edge.yaml`` that the applications share.

        Raises:
            ConfigError: the applications name different files, or the file does not exist.
        """
        paths = {app.edge for app in self.applications}
        if len(paths) != 1:
            raise ConfigError(f"{self.path}: all applications must name the same edge file, not {sorted(paths)}")
        return find(Path(paths.pop()), named_by=self.path)


def read_serve_file(path: Path) -> ServeFile:
    """Read a Serve configuration file strictly: keys that ``edgeserve up`` does not honor are errors.

    Raises:
        ConfigError: the file is missing, malformed, or deploys other applications than EdgeServe's.
    """
    path = find(path)
    content = read_settings(path, _ServeSettings)
    return ServeFile(
        path=path,
        applications=tuple(
            Application(name=app.name, route_prefix=app.route_prefix, edge=app.args.edge, location=app.args.location)
            for app in content.applications
        ),
        host=content.http_options.host,
        port=content.http_options.port,
        proxy_location=content.proxy_location,
        access_log=content.logging_config.enable_access_log,
    )


class _Args(Settings):
    edge: str = "deploy/edge.yaml"
    location: str | None = None


class _Application(Settings):
    name: str = Field(min_length=1)
    route_prefix: str = Field(pattern="^/")
    import_path: Literal["serve_app.serving.app:build"]
    args: _Args = _Args()

    @model_validator(mode="after")
    def _named_after_its_location(self) -> _Application:
        if self.args.location not in (None, self.name):
            raise ValueError(
                f"the application of location {self.args.location!r} must have its name, not {self.name!r}"
            )
        return self


class _HttpOptions(Settings):
    host: str = "127.0.0.1"
    port: int = Field(default=8000, ge=1, le=65535)


class _LoggingConfig(Settings):
    enable_access_log: bool = True


class _ServeSettings(Settings):
    proxy_location: Literal["EveryNode", "HeadOnly"] = "EveryNode"
    http_options: _HttpOptions = _HttpOptions()
    logging_config: _LoggingConfig = _LoggingConfig()
    applications: tuple[_Application, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _names_and_prefixes_are_unique(self) -> _ServeSettings:
        for field in ("name", "route_prefix"):
            values = [getattr(app, field) for app in self.applications]
            twice = sorted({value for value in values if values.count(value) > 1})
            if twice:
                raise ValueError(f"{field} {twice[0]!r} stands twice")
        return self
