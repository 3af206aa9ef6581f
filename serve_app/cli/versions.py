"""Commands about what is published: ``versions``, ``rollback``, ``canary``, ``remove``, ``store gc``."""

from __future__ import annotations

import datetime
import json
from collections.abc import Callable
from pathlib import Path

import click
from rich.table import Table

from serve_app.cli.console import stderr, stdout
from serve_app.cli.publish import SHARE, edge_option, store_option
from serve_app.config.catalog import load_catalog
from serve_app.config.default_files import find, find_default
from serve_app.config.edge import EdgeSettings, load_edge
from serve_app.errors import EdgeServeError, StoreError
from serve_app.store.garbage import collect
from serve_app.store.manifest import ManifestKey
from serve_app.store.model_store import ModelStore
from serve_app.store.projects import ModelVersions, Project, ProjectState, Version

_SOON = "running deployments follow within about a second"


@click.command()
@click.argument("model", required=False)
@edge_option
@store_option
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def versions(model: str | None, edge: Path | None, store: Path | None, as_json: bool) -> None:
    """List published versions, and which of them answer.

    Versions are those of the catalog that the settings name; other catalogs in the same store have their own.
    """
    root, project, _ = _opened(edge, store)
    state = root.projects.read(project.key) or ProjectState(catalog=project.catalog, host=project.host)
    models = {model: state.versions(model)} if model is not None else state.models
    rows = [
        {
            "model": name,
            "version": version.number,
            "state": _state_of(each, version),
            "published": datetime.datetime.fromtimestamp(version.published_s, datetime.UTC).isoformat(
                timespec="seconds"
            ),
            **_described(root, name, version),
        }
        for name, each in models.items()
        for version in each.versions
    ]
    if as_json:
        click.echo(json.dumps(rows))
        return
    if not rows:
        raise EdgeServeError(f"{project.catalog} has published nothing to {root.root}; run: edgeserve publish")
    table = Table(box=None, header_style="bold")
    for column in ("model", "version", "state", "published", "MB", "weights"):
        table.add_column(column, justify="right" if column == "MB" else "left", no_wrap=True)
    for row in rows:
        table.add_row(*(str(row[key]) for key in ("model", "version", "state", "published", "megabytes", "weights")))
    stdout().print(table)


@click.command()
@click.argument("model")
@click.option("--to", type=click.IntRange(min=1), metavar="N", help="The version to go to, if not the one before.")
@edge_option
@store_option
def rollback(model: str, to: int | None, edge: Path | None, store: Path | None) -> None:
    """Let an earlier version of MODEL answer, at once; a canary ends.

    It stays so until the catalog entry changes, or --to N goes to a later version again. edgeserve versions lists them.
    """
    _change(model, edge, store, lambda before: before.rolled_back(to))


@click.command()
@click.argument("model")
@click.argument("share", type=SHARE)
@click.option("--version", "number", type=click.IntRange(min=1), metavar="N", help="If not the newest version.")
@edge_option
@store_option
def canary(model: str, share: float, number: int | None, edge: Path | None, store: Path | None) -> None:
    """Let the newest version of MODEL answer SHARE of the requests, such as 10%.

    0% ends the canary, and 100% makes that version the current one. edgeserve publish --canary publishes one.
    """
    _change(model, edge, store, lambda before: before.with_canary(number or before.numbers[-1], share))


@click.command()
@click.argument("model")
@click.option("--version", "number", type=click.IntRange(min=1), metavar="N", help="Only this version.")
@edge_option
@store_option
def remove(model: str, number: int | None, edge: Path | None, store: Path | None) -> None:
    """Take MODEL, or one version of it, out of service.

    edgeserve store gc then frees the space. A model that is still in the catalog is published again by the next
    edgeserve up.
    """
    if number is not None:
        _change(model, edge, store, lambda before: before.without(number))
        return
    root, project, _ = _opened(edge, store)
    _published(root, project, model)
    root.projects.update(project, lambda state: state.with_versions(model, None))
    stdout().print(f"{model} is removed; {_SOON}; edgeserve store gc frees the space")


@click.group(no_args_is_help=False)
def store() -> None:
    """Look after the model store."""


@store.command()
@click.option("--keep", type=click.IntRange(min=1), metavar="N", help="Forget all but the N newest versions, too.")
@click.option("--dry-run", is_flag=True, help="Only say what would be removed.")
@edge_option
@store_option
def gc(keep: int | None, dry_run: bool, edge: Path | None, store: Path | None) -> None:
    """Free the space of what nobody refers to any more, and print how much.

    Versions that answer, and all versions of other catalogs, stay in any case; so do models that left the catalog while
    a running deployment still serves them. Catalogs that are gone, and that no deployment uses, are forgotten.
    """
    root, project, settings = _opened(edge, store)
    if not root.root.is_dir():
        raise StoreError(f"there is no store {root.root}; edgeserve publish makes it")
    out = stdout()
    garbage = collect(
        root,
        project,
        load_catalog(settings.catalog),
        keep=keep,
        dry_run=dry_run,
        on_wait=lambda: stderr().print("waiting for another publisher"),
    )
    for name, number in garbage.versions:
        out.print(f"{name} version {number} is no longer needed")
    for catalog in garbage.projects:
        out.print(f"{catalog} is gone, with its versions")
    done = "would be freed" if dry_run else "freed"
    out.print(
        f"{garbage.freed_bytes} bytes ({garbage.freed_bytes / 1e6:.1f} MB) {done} in {root.root}; "
        f"{garbage.kept_bytes / 1e6:.1f} MB stay"
    )


def _opened(edge: Path | None, store: Path | None) -> tuple[ModelStore, Project, EdgeSettings]:
    settings = load_edge(edge or find_default("edge.yaml"))
    return ModelStore(store or settings.store), Project.of(find(settings.catalog)), settings


def _published(root: ModelStore, project: Project, model: str) -> ModelVersions:
    """The versions of a model; raises ``NotFound`` if the project has none."""
    state = root.projects.read(project.key) or ProjectState(catalog=project.catalog, host=project.host)
    return state.versions(model)


def _change(
    model: str, edge: Path | None, store: Path | None, change: Callable[[ModelVersions], ModelVersions]
) -> None:
    """Change which versions of a model there are, or answer, and say what answers then."""
    root, project, _ = _opened(edge, store)
    before = _published(root, project, model)
    state = root.projects.update(project, lambda state: state.with_versions(model, change(state.versions(model))))
    after = state.versions(model)
    if after == before:
        stdout().print(f"nothing changes: version {after.current} of {model} answers")
        return
    parts = [f"version {after.current} of {model} answers"]
    if after.canary is not None:
        parts.append(f"and version {after.canary} answers {after.canary_share:.0%} of the requests")
    gone = sorted(set(before.numbers) - set(after.numbers))
    if gone:
        parts.append(f"without version {gone[0]}; edgeserve store gc frees its space")
    stdout().print(f"{', '.join(parts)}; {_SOON}")


def _state_of(versions: ModelVersions, version: Version) -> str:
    if version.number == versions.current:
        return "current"
    return f"canary {versions.canary_share:.0%}" if version.number == versions.canary else "-"


def _described(root: ModelStore, name: str, version: Version) -> dict[str, str]:
    """Size and weights of a version, as far as its manifest can be read."""
    try:
        manifest = root.read(ManifestKey(name=name, stem=version.manifest))
    except StoreError:
        return {"megabytes": "-", "weights": "missing: publish it again"}
    size_bytes = sum(file.size_bytes for file in manifest.files)
    return {"megabytes": f"{size_bytes / 1e6:.1f}", "weights": manifest.model.weights_actual}
