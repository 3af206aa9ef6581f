"""Serve configuration files such as ``deploy/local.yaml``, as far as ``edgeserve up`` reads them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from serve_app import config
from serve_app.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class Application:
    """One entry of a Serve configuration file."""

    name: str
    route_prefix: str
    args: dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeFile:
    """What ``edgeserve up`` needs of a Serve configuration file such as ``deploy/local.yaml``."""

    path: Path
    applications: tuple[Application, ...]
    host: str
    port: int
    proxy_location: str
    access_log: bool

    @property
    def url(self) -> str:
        """Where the gateway answers."""
        host = "127.0.0.1" if self.host in ("0.0.0.0", "") else self.host
        return f"http://{host}:{self.port}"

    @property
    def names(self) -> tuple[str, ...]:
        """The names of all applications."""
        return tuple(app.name for app in self.applications)

    @property
    def locations(self) -> dict[str, str]:
        """URL of every location."""
        return {app.name: self.url + app.route_prefix for app in self.applications if app.args.get("location")}

    def edge_path(self) -> Path:
        """The ``edge.yaml`` that the applications share.

        Raises:
            ConfigError: they do not share one.
        """
        paths = {str(app.args.get("edge", "deploy/edge.yaml")) for app in self.applications}
        if len(paths) != 1:
            raise ConfigError(f"{self.path}: all applications must name the same edge file, not {sorted(paths)}")
        return Path(paths.pop())


def read_serve_file(path: Path) -> ServeFile:
    """Read a Serve configuration file.

    Raises:
        ConfigError: it is missing, malformed, or deploys something else.
    """
    path = config.find(path)
    content = config.load_yaml(path)
    try:
        http = content.get("http_options") or {}
        return ServeFile(
            path=path,
            applications=tuple(
                Application(name=app["name"], route_prefix=app["route_prefix"], args=dict(app.get("args") or {}))
                for app in content["applications"]
            ),
            host=str(http.get("host", "127.0.0.1")),
            port=int(http.get("port", 8000)),
            proxy_location=str(content.get("proxy_location", "EveryNode")),
            access_log=bool((content.get("logging_config") or {}).get("enable_access_log", True)),
        )
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ConfigError(
            f"{path}: not a Serve configuration file ({type(error).__name__}: {error}); deploy/local.yaml is an example"
        ) from None
