"""Progress of ``edgeserve publish`` on a terminal."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import median

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from serve_app.config.catalog import load_catalog
from serve_app.config.edge import EdgeSettings
from serve_app.core.catalog import ModelEntry
from serve_app.errors import ConfigError, StoreError
from serve_app.store.model_store import ModelStore


def chosen_entries(settings: EdgeSettings, names: Sequence[str]) -> tuple[ModelEntry, ...]:
    """The entries of the catalogue with these names, in its order; all of them if no name is given.

    Raises:
        ConfigError: there is no such model.
    """
    entries = load_catalog(settings.catalog)
    unknown = sorted(set(names) - {entry.model_id for entry in entries})
    if unknown:
        raise ConfigError(f"no model {', '.join(unknown)} in {settings.catalog}; see what there is in that file")
    return tuple(entry for entry in entries if not names or entry.model_id in names)


def publish_with_progress(
    root: Path, entries: Sequence[ModelEntry], *, force: bool, out: Console, err: Console
) -> None:
    """Publish ``entries`` into the store at ``root`` and say what happens.

    Raises:
        StoreError: at least one model could not be published.
    """
    # torch takes seconds to import, and not even --help should wait for it.
    from serve_app.models.publishing.publish_catalog import PublishEvent, publish

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=out, transient=True) as progress:
        task = progress.add_task(f"publishing to {root}", total=len(entries))

        def show(event: PublishEvent) -> None:
            if event.stage == "published" and not out.is_terminal:
                out.print(f"published {event.model_id} ({event.index + 1}/{event.total})")
            done = event.index + (event.stage in ("published", "skipped", "failed"))
            progress.update(task, description=f"{event.stage} {event.model_id}", completed=done, total=event.total)

        report = publish(ModelStore(root), entries, on_progress=show, force=force)
    out.print(f"{len(report.published)} models published, {len(report.skipped)} were in the store at {root}")
    if report.published:
        out.print(_measured(ModelStore(root), [entry for entry in entries if entry.model_id in report.published]))
    if report.warning:
        err.print(f"warning: {report.warning}", style="yellow")
    for failure in report.failures:
        err.print(f"failed: {failure.model_id}: {failure.message}", style="red")
    if report.failures:
        raise StoreError(f"{len(report.failures)} of {len(entries)} models could not be published; see above")


def _measured(store: ModelStore, entries: Sequence[ModelEntry]) -> str:
    """What publishing has found out about its models."""
    profiles = [model.profile for model in store.catalog(entries).models]
    loads, runs = (sorted(getattr(profile, name) * 1000 for profile in profiles) for name in ("load_s", "exec_s"))
    return (
        f"a load takes {loads[0]:.1f} to {loads[-1]:.1f} ms (median {median(loads):.1f}), "
        f"an inference {runs[0]:.0f} to {runs[-1]:.0f} ms (median {median(runs):.0f})"
    )
