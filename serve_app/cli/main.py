"""The ``edgeserve`` command."""

from __future__ import annotations

import json as json_module
import logging
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import quote

import click
import httpx
from rich.console import Console
from rich.table import Table

from serve_app import __version__
from serve_app.cli.profile import profile
from serve_app.cli.publish import chosen_entries, publish_with_progress
from serve_app.cli.simulate import simulate
from serve_app.config.edge import DEFAULT_EDGE, load_edge
from serve_app.errors import ConfigError, EdgeServeError, StoreError, TraceError

DEFAULT_URL = "http://127.0.0.1:8000"
DEFAULT_CONFIG = "deploy/local.yaml"

_EXIT_FAILED = 1
_EXIT_USAGE = 2
_REQUEST_TIMEOUT_S = 90.0

_Command = TypeVar("_Command", bound=Callable[..., Any])

_out = Console(highlight=False, soft_wrap=True)
_err = Console(stderr=True, highlight=False, soft_wrap=True)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; every error is one line on stderr, exit code 1, or 2 for bad usage."""
    # What matters of the log is printed by the commands themselves.
    logging.getLogger("serve_app").setLevel(logging.ERROR)
    try:
        result = cli.main(arguments, prog_name="edgeserve", standalone_mode=False)
        sys.exit(result if isinstance(result, int) else 0)
    except click.ClickException as error:
        context = getattr(error, "ctx", None)
        command = context.command_path if context else "edgeserve"
        _fail(f"{error.format_message()} ({command} --help says more)", _EXIT_USAGE)
    except (ConfigError, TraceError) as error:
        _fail(error.message, _EXIT_USAGE)
    except EdgeServeError as error:
        _fail(error.message, _EXIT_FAILED)
    except (click.Abort, KeyboardInterrupt):
        _fail("interrupted", _EXIT_FAILED)
    except BrokenPipeError:
        # Whoever read our output has seen enough.
        sys.stderr.close()
        sys.exit(_EXIT_FAILED)
    except Exception as error:
        _fail(f"{type(error).__name__}: {error}", _EXIT_FAILED)


def _fail(message: str, code: int) -> None:
    click.echo(f"edgeserve: {' '.join(message.split())}", err=True)
    sys.exit(code)


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__)
def cli() -> None:
    """Serve many deep-learning models from edge locations with little memory.

    \b
    edgeserve up                          start three locations on this machine
    edgeserve infer resnet50 cat.jpg      classify an image
    edgeserve status                      see what is in memory where
    edgeserve profile                     measure what loads and inferences take here
    edgeserve simulate                    compare eviction policies on a request stream
    """


cli.add_command(profile)
cli.add_command(simulate)


def _talks_to_server(command: _Command) -> _Command:
    url = click.option(
        "--url",
        default=DEFAULT_URL,
        show_default=True,
        callback=lambda _context, _option, value: value.rstrip("/"),
        help="Where EdgeServe answers.",
    )
    token = click.option("--token", envvar="EDGESERVE_TOKEN", help="Token, if the service asks for one.")
    return url(token(command))


@cli.command()
@click.argument("config", default=DEFAULT_CONFIG, type=click.Path(path_type=Path))
@click.option("--detach", is_flag=True, help="Return once everything is ready; edgeserve down stops it.")
def up(config: Path, detach: bool) -> None:
    """Publish missing models, start the locations of CONFIG, and wait until they are ready.

    CONFIG is a Serve configuration file (default: deploy/local.yaml). Starts Ray if none runs, or joins the cluster
    at RAY_ADDRESS. Ctrl-C stops what it has started.

    While EdgeServe is up already, brings it in line with what has changed in the configuration files, without losing a
    request: memory, policy, links, models and locations that come or go.
    """
    # Ray and torch take seconds to import; the other commands need neither.
    from serve_app.serving.launch import deployment
    from serve_app.serving.launch.serve_config import read_serve_file

    began_s = time.monotonic()

    def say(message: str) -> None:
        _out.print(f"[dim]{time.monotonic() - began_s:5.1f} s[/]  {message}")

    # SIGINT as well: whoever starts us in the background of a script has it ignored for us.
    signal.signal(signal.SIGINT, _interrupt)
    signal.signal(signal.SIGTERM, _interrupt)
    serve_file = read_serve_file(config)
    deployment.require_writable()
    try:
        _publish(serve_file.edge_path(), (), force=False, store=None)
    except StoreError as error:
        # What is published can be served all the same.
        _err.print(f"warning: {error.message}", style="yellow")
    earlier = deployment.recall()
    if earlier is not None:
        deployment.change(earlier, serve_file, say)
        say("everything is as configured; edgeserve down stops it")
        return
    running = deployment.bring_up(serve_file, say)
    _welcome(serve_file.url, serve_file.locations)
    if detach:
        _out.print("running in the background; stop it with: edgeserve down")
        return
    _out.print("Ctrl-C stops it")
    try:
        while (latest := deployment.recall()) is not None and latest.address == running.address:
            # Another `up` may have changed what is up.
            running = latest
            time.sleep(1.0)
    except KeyboardInterrupt:
        say("stopping")
        deployment.bring_down(running)
        return
    if deployment.forget(running):
        raise EdgeServeError("Ray has stopped by itself; its logs are in /tmp/ray/session_latest/logs")
    say("stopped by edgeserve down")


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def _welcome(url: str, locations: dict[str, str]) -> None:
    _out.print()
    for name, location_url in locations.items():
        _out.print(f"  {name:<12} {location_url}")
    _out.print(f"  {'any location':<12} {url}  (header X-Edge-Location)")
    _out.print("\ntry it:")
    first = next(iter(locations.values()), url)
    _out.print(
        f"  curl -H 'Content-Type: image/jpeg' --data-binary @photo.jpg '{first}/v1/classify?model=resnet50'\n",
        markup=False,
    )


@cli.command()
def down() -> None:
    """Stop what `edgeserve up --detach` has started."""
    from serve_app.serving.launch import deployment

    running = deployment.recall()
    if running is None:
        raise EdgeServeError("nothing is up; edgeserve up starts it")
    deployment.bring_down(running)
    _out.print("stopped")


@cli.command()
@_talks_to_server
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def status(url: str, token: str | None, as_json: bool) -> None:
    """Show memory, resident models, rates and hit ratio of every location."""
    content = _call("GET", f"{url}/v1/locations", token)
    if as_json:
        click.echo(json_module.dumps(content))
        return
    table = Table(box=None, header_style="bold")
    for column in ("location", "workers", "memory MiB", "requests", "hit ratio", "loads", "forwards", "evictions"):
        table.add_column(column, justify="left" if column == "location" else "right", no_wrap=True)
    for row in content["locations"]:
        table.add_row(
            row["name"],
            str(row["replicas"]),
            f"{row['used_bytes'] / 2**20:.0f} of {row['capacity_bytes'] / 2**20:.0f}",
            str(row["requests"]),
            f"{(row['hits'] + row['joins']) / row['requests']:.0%}" if row["requests"] else "-",
            str(row["model_loads"]),
            str(row["forwards"]),
            str(row["evictions"]),
        )
    _out.print(table)
    for row in content["locations"]:
        resident = sorted(row["resident"], key=lambda model: -model["rate_per_s"])
        listed = ", ".join(f"{model['model']} {model['rate_per_s']:.2g}/s" for model in resident) or "nothing"
        _out.print(f"{row['name']} holds {listed}")
    coordinator = content["coordinator"]
    age = coordinator["view_age_s"]
    state = "up" if coordinator["up"] else "not reachable: locations go on with what they know"
    _out.print(f"coordinator {state}, last heard {age:.1f} s ago" if age is not None else f"coordinator {state}")


@cli.command()
@click.argument("model")
@click.argument("image", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@_talks_to_server
@click.option("--location", help="Ask this location.")
@click.option("--top-k", default=5, show_default=True, type=click.IntRange(1, 1000), help="How many labels.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def infer(
    model: str, image: Path, url: str, token: str | None, location: str | None, top_k: int, as_json: bool
) -> None:
    """Classify IMAGE (JPEG, PNG or WebP) with MODEL, a model or a family."""
    headers = {"Content-Type": "application/octet-stream"}
    if location is not None:
        headers["X-Edge-Location"] = location
    params = {"model": model, "top_k": str(top_k)}
    body = image.read_bytes()
    answer = _call("POST", f"{url}/v1/classify", token, params=params, content=body, headers=headers)
    if as_json:
        click.echo(json_module.dumps(answer))
        return
    for best in answer["predictions"]:
        _out.print(f"{best['probability']:7.2%}  {best['label']}")
    timing = ", ".join(f"{name} {ms:.1f} ms" for name, ms in answer["timing_ms"].items() if ms)
    _out.print(f"[dim]{answer['model']} at {answer['location']}: {answer['outcome']} ({timing})[/]")
    if "warning" in answer:
        _err.print(f"warning: {answer['warning']}", style="yellow")


@cli.command()
@_talks_to_server
def models(url: str, token: str | None) -> None:
    """List the catalogue, with the state of every model at every location."""
    index = _call("POST", f"{url}/v2/repository/index", token)
    locations = _call("GET", f"{url}/v1/locations", token)["locations"]
    states = {(row["name"], resident["model"]): resident["state"] for row in locations for resident in row["resident"]}
    table = Table(box=None, header_style="bold")
    table.add_column("model")
    for row in locations:
        table.add_column(row["name"])
    for model in index:
        table.add_row(model["name"], *(states.get((row["name"], model["name"]), "-") for row in locations))
    _out.print(table)


@cli.command()
@click.argument("model")
@click.option("--location", required=True, help="Where to load it.")
@_talks_to_server
def load(model: str, location: str, url: str, token: str | None) -> None:
    """Load MODEL into the memory of a location."""
    _by_hand("load", model, location, url, token)
    _out.print(f"{model} is loaded at {location}")


@cli.command()
@click.argument("model")
@click.option("--location", required=True, help="Where to unload it.")
@_talks_to_server
def unload(model: str, location: str, url: str, token: str | None) -> None:
    """Take MODEL out of the memory of a location."""
    _by_hand("unload", model, location, url, token)
    _out.print(f"{model} is unloaded at {location}")


def _by_hand(action: str, model: str, location: str, url: str, token: str | None) -> None:
    headers = {"X-Edge-Location": location}
    _call("POST", f"{url}/v2/repository/models/{quote(model, safe='')}/{action}", token, headers=headers)


@cli.command()
@click.argument("names", metavar="[MODEL]...", nargs=-1)
@click.option("--edge", default=DEFAULT_EDGE, show_default=True, type=click.Path(path_type=Path), help="Settings.")
@click.option("--store", type=click.Path(path_type=Path), help="Directory of the model store, if not the settings'.")
@click.option("--force", is_flag=True, help="Publish again what is in the store, too.")
def publish(names: tuple[str, ...], edge: Path, store: Path | None, force: bool) -> None:
    """Put models into the store: download or build them, convert, verify and measure.

    Without MODEL, the whole catalogue. What is there already is left alone; a run that was killed goes on.
    """
    _publish(edge, names, force=force, store=store)


def _publish(edge: Path, names: tuple[str, ...], *, force: bool, store: Path | None) -> None:
    settings = load_edge(edge)
    entries = chosen_entries(settings, names)
    publish_with_progress(store or settings.store, entries, force=force, out=_out, err=_err)


def _call(method: str, url: str, token: str | None, **request: Any) -> Any:
    """The JSON that the service answers with."""
    headers = {**request.pop("headers", {}), **({"Authorization": f"Bearer {token}"} if token else {})}
    encoded = {name: value.encode() for name, value in headers.items()}
    try:
        # A proxy of the user's is not for servers on this machine.
        is_here = httpx.URL(url).host in ("127.0.0.1", "localhost", "::1")
        with httpx.Client(timeout=_REQUEST_TIMEOUT_S, trust_env=not is_here) as client:
            response = client.request(method, url, headers=encoded, **request)
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
