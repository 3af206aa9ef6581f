"""``edgeserve profile``: what loads and inferences of the published models take on this machine."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from statistics import geometric_mean
from typing import TYPE_CHECKING, Any

import click
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from serve_app.cli.console import check_writable, stderr, stdout, warn, writing
from serve_app.cli.publish import chosen_entries, edge_option, store_option
from serve_app.config.default_files import find_default
from serve_app.config.edge import EdgeSettings, load_edge
from serve_app.config.environment import ca_bundle, downloads_dir
from serve_app.core.catalog import ModelEntry
from serve_app.core.precision import parts_of_form
from serve_app.errors import ConfigError
from serve_app.store.forms import Refusal
from serve_app.store.manifest import Manifest, is_allowed
from serve_app.store.model_store import ModelStore

# torch takes seconds to import, and --help should not wait for it.
if TYPE_CHECKING:
    from serve_app.models.profiling.model_profile import Profile
    from serve_app.models.profiling.optimization_comparison import Comparison


@click.command()
@click.argument("names", metavar="[MODEL]...", nargs=-1)
@click.option("--cold", is_flag=True, help="Also with weights that must be read from the disk.")
@click.option("--variants", is_flag=True, help="Instead, compare variants of running a model: see below.")
@click.option(
    "--images",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    metavar="DIR",
    help="With --variants: photographs for the agreement of models with real weights.",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), metavar="FILE", help="Write JSON there.")
@edge_option
@store_option
def profile(
    names: tuple[str, ...],
    cold: bool,
    variants: bool,
    images: Path | None,
    as_json: bool,
    out: Path | None,
    edge: Path | None,
    store: Path | None,
) -> None:
    """Measure published models: size, load, first inference, hit and workspace. Without MODEL, the whole catalog.

    A miss is a load and the first inference; the weights are in the page cache. A model that was compiled for this
    machine has a row for each form, with what it computes in; below the table stands why it has no others. Each round
    takes a miss and a hit of every form. miss/hit is the median of the rounds, of a miss over a hit of the form as it
    was published, with quartiles behind it, and the same in processor time, which other processes disturb less. Size is
    weights and buffers; in memory a model counts with its workspace as well.

    With --cold the kernel is made to drop the weights before each load. A cold miss can take no less than a hit, and no
    less than reading the weights; cold/bound says how many times the longer of the two it took.

    With --variants each model runs as its builder makes it (eager), and as parts of that time: with its channels last
    in memory, with batch norms folded into convolutions, with both (how it is served), with both in bfloat16, with both
    on two threads. Agreement is the share of images of which bfloat16 finds the same best class: of photographs where
    the model has real weights, else of random images. The photographs are those of --images; without it,
    those that matplotlib, scikit-image and scikit-learn ship, as far as they are installed.
    """
    if cold and variants:
        raise click.UsageError("--cold and --variants are two measurements; choose one")
    if out is not None:
        check_writable("--out", out)
    settings = load_edge(edge or find_default("edge.yaml"))
    root = ModelStore(store or settings.store)
    entries = _published(root, chosen_entries(settings, names), settings, names)
    if variants:
        _variants(root, entries, images, as_json, out)
    else:
        _profiles(root, entries, settings, cold, as_json, out)


def _profiles(
    store: ModelStore,
    entries: Sequence[ModelEntry],
    settings: EdgeSettings,
    cold: bool,
    as_json: bool,
    out: Path | None,
) -> None:
    from serve_app.models.profiling import model_profile
    from serve_app.models.threads import use_threads

    use_threads(settings.worker.threads_per_inference, settings.worker.parallel_inferences)
    measured = list(
        _each(
            entries,
            "profiling",
            lambda entry: model_profile.profile(store, _forms(store, entry), cold=cold, lowered=entry.lowered),
        )
    )
    profiles = [each for forms in measured for each in forms]
    refused = {entry.model_id: _refused(store, entry) for entry in entries}
    _write(model_profile.as_json(profiles, refused), as_json, out)
    if not as_json:
        _show_profiles(profiles)
        _show_precisions(profiles, refused)


def _variants(
    store: ModelStore, entries: Sequence[ModelEntry], images: Path | None, as_json: bool, out: Path | None
) -> None:
    from serve_app.models.profiling.optimization_comparison import compare
    from serve_app.models.profiling.photographs import find_photographs
    from serve_app.models.sources.fetcher import Fetcher
    from serve_app.models.sources.pretrained import WeightSource

    photographs, source = find_photographs(images), WeightSource(Fetcher(downloads_dir(), ca_bundle=ca_bundle()))

    def compared(entry: ModelEntry) -> Comparison:
        return compare(entry, _manifest(store, entry).model, photographs, source)

    rows = list(_each(entries, "comparing", compared))
    _write([row.as_json() for row in rows], as_json, out)
    if not as_json:
        _show_variants(rows)


def _published(
    store: ModelStore, entries: Sequence[ModelEntry], settings: EdgeSettings, names: Sequence[str]
) -> Sequence[ModelEntry]:
    """The entries that can be measured.

    Raises:
        ConfigError: one of ``names``, or all, are not published as the catalog describes them.
    """
    missing = [entry.model_id for entry in entries if not _is_published(store, entry)]
    if missing and (names or len(missing) == len(entries)):
        which = ", ".join(missing) if names else f"the catalog {settings.catalog}"
        raise ConfigError(f"{which}: not in the store {store.root} as the catalog describes it; run: edgeserve publish")
    if missing:
        warn(f"not published, and left out: {', '.join(missing)}")
    return [entry for entry in entries if entry.model_id not in missing]


def _forms(store: ModelStore, entry: ModelEntry) -> list[Manifest]:
    """Return the manifests of all forms of a model that this machine can run, first the one as it was published."""
    from serve_app.models.runtimes.environment import environments

    key = store.find(entry)
    if key is None or entry.runtime != "auto":
        return [_manifest(store, entry)]
    forms = (store.read(each) for each in store.forms.usable(key, environments(), entry.precisions))
    return [store.read(key), *(form for form in forms if is_allowed(form, entry))]


def _refused(store: ModelStore, entry: ModelEntry) -> dict[str, Refusal]:
    from serve_app.models.publishing.publish_forms import refused_forms

    key = store.find(entry)
    return {} if key is None else refused_forms(store, entry, key)


def _manifest(store: ModelStore, entry: ModelEntry) -> Manifest:
    key = store.find(entry)
    return store.manifest(entry.model_id) if key is None else store.read(key)


def _is_published(store: ModelStore, entry: ModelEntry) -> bool:
    return store.find(entry) is not None


def _each(entries: Sequence[ModelEntry], doing: str, measure: Callable[[ModelEntry], Any]) -> Iterator[Any]:
    """Measure one model after the other, with a progress bar on stderr if that is a terminal."""
    console = stderr()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(doing, total=len(entries))
        for entry in entries:
            progress.update(task, description=f"{doing} {entry.model_id}")
            yield measure(entry)
            progress.advance(task)


def _show_profiles(profiles: Sequence[Profile]) -> None:
    from serve_app.models.profiling.model_profile import summarize

    summary, is_cold = summarize(profiles), profiles[0].cold is not None
    columns = [
        "model",
        "form",
        "precision",
        "size MB",
        "workspace MB",
        "load ms",
        "first ms",
        "miss ms",
        "hit ms",
        "miss/hit",
        "quartiles",
        "cpu",
    ]
    table = _table([*columns, *(("cold load ms", "cold miss ms", "cold/bound") if is_cold else ())])
    for each in profiles:
        spread = each.miss_over_hit
        cells = [
            each.model_id,
            f"{parts_of_form(each.form)[0]}{' *' if each.is_served else ''}{' +' if each.is_fastest else ''}",
            each.precision,
            *(f"{bytes_ / 1e6:.1f}" for bytes_ in (each.size_bytes, each.workspace_bytes)),
            f"{each.load_s * 1000:.2f}",
            *(f"{seconds * 1000:.1f}" for seconds in (each.first_s, each.miss_s, each.hit_s)),
            f"{spread.median:.3f}",
            f"{spread.low:.2f} .. {spread.high:.2f}",
            f"{each.cpu_miss_over_hit:.3f}",
        ]
        if each.cold is not None:
            cells += [f"{each.cold.load_s * 1000:.2f}", f"{each.cold.miss_s * 1000:.1f}"]
            cells.append(f"{summary.cold_over_bound[each.model_id]:.3f}" if each.is_served else "")
        table.add_row(*cells)
    out = stdout()
    out.print(table)
    rounds = [each.rounds for each in profiles]
    worst = next(each for each in profiles if each.is_served and each.model_id == summary.worst).miss_over_hit.median
    if len(profiles) > len({each.model_id for each in profiles}):
        out.print("* the form that is loaded first: its load and one inference take the least time")
        out.print("+ the fastest form that a model in memory goes over to, where the cache has room for it")
    out.print(
        f"miss over hit: geometric mean {summary.miss_over_hit:.3f}, worst {worst:.3f} ({summary.worst}); "
        f"in processor time {summary.cpu_miss_over_hit:.3f}; {min(rounds)} to {max(rounds)} rounds a model"
    )
    if summary.read_bytes_per_s is not None:
        over = summary.cold_over_bound
        worst_cold = max(over, key=lambda model_id: over[model_id])
        out.print(
            f"cold miss over the longer of hit and read at {summary.read_bytes_per_s / 1e9:.2f} GB/s: "
            f"geometric mean {geometric_mean(over.values()):.3f}, worst {over[worst_cold]:.3f} ({worst_cold})"
        )


def _show_precisions(profiles: Sequence[Profile], refused: Mapping[str, Mapping[str, Refusal]]) -> None:
    """Say what lets forms of lower precision in, and why there are no others."""
    out = stdout()
    for each in profiles:
        if each.agreement is not None:
            out.print(f"{each.model_id}: {each.form} has {each.agreement}", markup=False, highlight=False)
    for model_id, forms in refused.items():
        for form, refusal in forms.items():
            out.print(f"{model_id}: no form {form}: {refusal.reason}", markup=False, highlight=False)


def _show_variants(rows: Sequence[Comparison]) -> None:
    from serve_app.models.profiling.optimization_comparison import VARIANTS

    table = _table(["model", "eager ms", *VARIANTS, "agreement", "images"])
    for row in rows:
        ratios = (f"{row.ratios[name]:.2f}" for name in VARIANTS)
        table.add_row(row.model_id, f"{row.eager_s * 1000:.1f}", *ratios, f"{row.agreement:.1%}", row.images)
    means = (f"{geometric_mean(row.ratios[name] for row in rows):.2f}" for name in VARIANTS)
    table.add_row("geometric mean", "", *means, "", "")
    stdout().print(table)


def _table(columns: Iterable[str]) -> Table:
    table = Table(box=None, header_style="bold")
    for column in columns:
        table.add_column(column, justify="left" if column in ("model", "form", "precision") else "right", no_wrap=True)
    return table


def _write(rows: list[dict[str, Any]], as_json: bool, out: Path | None) -> None:
    if as_json:
        click.echo(json.dumps(rows))
    if out is not None:
        with writing(out):
            out.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
