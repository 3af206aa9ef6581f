"""Commands that send requests to a running EdgeServe: ``models``, ``load``, ``unload``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar
from urllib.parse import quote

import click
import httpx
from rich.markup import escape
from rich.table import Table

from serve_app.cli.console import stdout
from serve_app.core.versions import FIRST_VERSION, version_key
from serve_app.errors import ConfigError, EdgeServeError

DEFAULT_URL = "http://127.0.0.1:8000"

_REQUEST_TIMEOUT_S = 90.0

_Command = TypeVar("_Command", bound=Callable[..., Any])


def server_options(command: _Command) -> _Command:
    """Add ``--url`` and ``--token`` to a command."""
    url = click.option(
        "--url",
        default=DEFAULT_URL,
        show_default=True,
        callback=lambda _context, _option, value: value.rstrip("/"),
        help="Where EdgeServe answers.",
    )
    token = click.option("--token", envvar="EDGESERVE_TOKEN", help="Token, if the service asks for one.")
    return url(token(command))


@click.command()
@server_options
def models(url: str, token: str | None) -> None:
    """List the catalog, with the state of every model at every location, or why it cannot be served."""
    index = request("POST", f"{url}/v2/repository/index", token)
    locations = request("GET", f"{url}/v1/locations", token)["locations"]
    states = {(row["name"], resident["model"]): resident["state"] for row in locations for resident in row["resident"]}
    table = Table(box=None, header_style="bold")
    table.add_column("model")
    for row in locations:
        table.add_column(row["name"])
    table.add_column("")
    for model in index:
        key = version_key(model["name"], int(model["version"] or FIRST_VERSION))
        table.add_row(key, *(states.get((row["name"], key), "-") for row in locations), escape(model.get("reason", "")))
    stdout().print(table)


@click.command()
@click.argument("model")
@click.option("--location", required=True, help="Where to load it.")
@server_options
def load(model: str, location: str, url: str, token: str | None) -> None:
    """Load MODEL into the memory of a location."""
    _order("load", model, location, url, token)
    stdout().print(f"{model} is loaded at {location}")


@click.command()
@click.argument("model")
@click.option("--location", required=True, help="Where to unload it.")
@server_options
def unload(model: str, location: str, url: str, token: str | None) -> None:
    """Take MODEL out of the memory of a location."""
    _order("unload", model, location, url, token)
    stdout().print(f"{model} is unloaded at {location}")


def _order(action: str, model: str, location: str, url: str, token: str | None) -> None:
    headers = {"X-Edge-Location": location}
    request("POST", f"{url}/v2/repository/models/{quote(model, safe='')}/{action}", token, headers=headers)


def request(method: str, url: str, token: str | None, **options: Any) -> Any:
    """Send a request to EdgeServe and return the JSON of the answer.

    Raises:
        ConfigError: ``url`` is not a URL.
        EdgeServeError: nothing answers there, or the answer is an error, or not EdgeServe's.
    """
    headers = {**options.pop("headers", {}), **({"Authorization": f"Bearer {token}"} if token else {})}
    encoded = {name: value.encode() for name, value in headers.items()}
    try:
        # The user's proxy is not for servers on this machine.
        is_local = httpx.URL(url).host in ("127.0.0.1", "localhost", "::1")
        with httpx.Client(timeout=_REQUEST_TIMEOUT_S, trust_env=not is_local) as client:
            response = client.request(method, url, headers=encoded, **options)
    except (httpx.InvalidURL, httpx.UnsupportedProtocol, UnicodeError) as error:
        raise ConfigError(f"{url}: not a URL ({error}); write it like {DEFAULT_URL}") from None
    except httpx.HTTPError as error:
        raise EdgeServeError(f"nothing answers at {url} ({error}); start it with: edgeserve up") from None
    try:
        content = response.json()
    except ValueError:
        content = None
    if response.is_success and content is not None:
        return content
    message = content.get("error") if isinstance(content, dict) else None
    raise EdgeServeError(message or f"{url} is not EdgeServe: it answered {response.status_code} and no JSON of ours")
