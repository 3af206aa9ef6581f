"""Commands that start, stop and show a deployment: ``up``, ``down``, ``status``."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.console import Console
from rich.table import Table

from serve_app.cli.client import request, server_options
from serve_app.cli.console import stdout, warn
from serve_app.cli.publish import publish_catalog, require_weights_option
from serve_app.config.catalog import load_catalog
from serve_app.config.default_files import find_default
from serve_app.config.edge import load_edge, load_token
from serve_app.config.environment import ray_temp_dir
from serve_app.errors import EdgeServeError, StoreError, WeightsUnavailable
from serve_app.store.model_store import ModelStore

#: Within this time every worker has reported what it took over from a changed configuration.
_REPORTS_S = 1.5

# Ray and torch take seconds to import; --help and status need neither.
if TYPE_CHECKING:
    from serve_app.serving.launch.local_ray import RunningDeployment
    from serve_app.serving.launch.serve_config import ServeFile


@click.command()
@click.argument("config", required=False, type=click.Path(path_type=Path))
@click.option("--detach", is_flag=True, help="Return once everything is ready; edgeserve down stops it.")
@click.option(
    "--compile/--no-compile", "compiled", default=True, help="Compile models in the background (the default)."
)
@require_weights_option
def up(config: Path | None, detach: bool, compiled: bool, require_weights: bool) -> None:
    """Publish missing models, start the locations of CONFIG, and wait until they are ready.

    CONFIG is a Serve configuration file. Without it, local.yaml of the working directory if edgeserve init has written
    one there, else deploy/local.yaml. Starts Ray if none runs, or joins the cluster at RAY_ADDRESS. Ctrl-C stops what
    it has started.

    Models are compiled for this machine in the background, which takes minutes the first time, and locations take over
    what is ready. Until then they run as they were published.

    While EdgeServe is up already, brings it in line with what has changed in the configuration files, without losing a
    request: memory, policy, links, models and locations that come or go.
    """
    from serve_app.serving.launch import deployment
    from serve_app.serving.launch.serve_config import read_serve_file

    began_s, out = time.monotonic(), stdout()

    def show(message: str) -> None:
        out.print(f"[dim]{time.monotonic() - began_s:5.1f} s[/]  {message}")

    # SIGINT as well: a shell script sets it to be ignored in a process that it starts in the background.
    signal.signal(signal.SIGINT, _interrupt)
    signal.signal(signal.SIGTERM, _interrupt)
    serve_file = read_serve_file(config or find_default("local.yaml"))
    edge = serve_file.edge_path()
    show(f"configuration {serve_file.path}")
    deployment.require_writable_state()
    try:
        publish_catalog(edge, require_weights=require_weights, compiled=False)
    except WeightsUnavailable:
        raise
    except StoreError as error:
        # The models that are published can be served all the same.
        warn(error.message)
    earlier = deployment.read_state()
    if earlier is not None:
        deployment.update(earlier, serve_file, show)
        show("everything is as configured; edgeserve down stops it")
        if compiled:
            deployment.compile_in_background(earlier, edge)
        time.sleep(_REPORTS_S)
        warn_of_unusable_models(serve_file, edge)
        return
    running = deployment.start(serve_file, show)
    if compiled:
        deployment.compile_in_background(running, edge)
    warn_of_unusable_models(serve_file, edge)
    _show_addresses(out, serve_file.url, serve_file.locations, _classifier(edge))
    if detach:
        out.print("running in the background; stop it with: edgeserve down")
        return
    out.print("Ctrl-C stops it")
    _wait_for_the_end(running, show)


def warn_of_unusable_models(serve_file: ServeFile, edge: Path) -> None:
    """Say which models of the catalog workers cannot load, and why, before a request finds out."""
    reasons: dict[tuple[str, str], list[str]] = {}
    # Every location knows of all; a deployment need not have a gateway.
    url = next(iter(serve_file.locations.values()), serve_file.url).rstrip("/")
    for row in request("GET", f"{url}/v1/locations", load_token(load_edge(edge)))["locations"]:
        for model, reason in row["unusable"].items():
            reasons.setdefault((model, reason), []).append(row["name"])
    for (model, reason), locations in reasons.items():
        warn(f"model {model} cannot be served at {', '.join(locations)}: {reason}")


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def _wait_for_the_end(running: RunningDeployment, show: Callable[[str], None]) -> None:
    """Wait until Ctrl-C, and stop the deployment then, or until it has ended otherwise.

    Raises:
        EdgeServeError: Ray has stopped by itself.
    """
    from serve_app.serving.launch import deployment

    try:
        while (latest := deployment.read_state()) is not None and latest.address == running.address:
            # Another `up` may have changed the deployment.
            running = latest
            time.sleep(1.0)
    except KeyboardInterrupt:
        show("stopping")
        deployment.stop(running)
        return
    if deployment.clean_up(running):
        raise EdgeServeError(f"Ray has stopped by itself; its logs are in {ray_temp_dir() / 'ray/session_latest/logs'}")
    show("stopped by edgeserve down")


def _classifier(edge: Path) -> str | None:
    """The first image classifier of the catalog, of those with real weights if there are any."""
    settings = load_edge(edge)
    models = ModelStore(settings.store).catalog(load_catalog(settings.catalog)).models
    classifiers = [model for model in models if model.task.kind == "image-classification"]
    return min(classifiers, key=lambda model: model.has_random_weights).name if classifiers else None


def _show_addresses(out: Console, url: str, locations: dict[str, str], classifier: str | None) -> None:
    out.print()
    for name, location_url in locations.items():
        out.print(f"  {name:<12} {location_url}")
    out.print(f"  {'any location':<12} {url}  (header X-Edge-Location)")
    out.print()
    if classifier is not None:
        first = next(iter(locations.values()), url)
        address = f"{first}/v1/classify?model={classifier}"
        out.print("try it:")
        out.print(f"  curl -H 'Content-Type: image/jpeg' --data-binary @photo.jpg '{address}'\n", markup=False)


@click.command()
def down() -> None:
    """Stop what `edgeserve up --detach` has started."""
    from serve_app.serving.launch import deployment

    running = deployment.read_state()
    if running is None:
        raise EdgeServeError("nothing is up; edgeserve up starts it")
    deployment.stop(running)
    stdout().print("stopped")


@click.command()
@server_options
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def status(url: str, token: str | None, as_json: bool) -> None:
    """Show memory, resident models, rates and hit ratio of every location."""
    content = request("GET", f"{url}/v1/locations", token)
    if as_json:
        click.echo(json.dumps(content))
        return
    out = stdout()
    out.print(_locations_table(content["locations"]))
    for row in content["locations"]:
        resident = sorted(row["resident"], key=lambda model: -model["rate_per_s"])
        listed = ", ".join(f"{model['model']} {model['rate_per_s']:.2g}/s" for model in resident) or "nothing"
        out.print(f"{row['name']} holds {listed}")
    coordinator = content["coordinator"]
    age_s = coordinator["view_age_s"]
    state = "up" if coordinator["up"] else "not reachable: locations go on with their last view"
    out.print(f"coordinator {state}" + (f", last update {age_s:.1f} s ago" if age_s is not None else ""))


def _locations_table(rows: list[dict[str, Any]]) -> Table:
    table = Table(box=None, header_style="bold")
    for column in ("location", "workers", "memory MiB", "requests", "hit ratio", "loads", "forwards", "evictions"):
        table.add_column(column, justify="left" if column == "location" else "right", no_wrap=True)
    for row in rows:
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
    return table
