"""Results as a table, as JSON and as CSV."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict, dataclass, fields
from itertools import groupby

from rich.table import Table
from rich.text import Text

from serve_app.simulator.result_row import ResultRow


def as_json(rows: Sequence[ResultRow]) -> str:
    """Convert to a list with one object per row; an unknown value is ``null``, never NaN."""
    return json.dumps([asdict(row) for row in rows], allow_nan=False, indent=2)


def as_csv(rows: Sequence[ResultRow]) -> str:
    """Convert to a header and one line per row; an unknown value is empty."""
    text = io.StringIO()
    writer = csv.DictWriter(text, [field.name for field in fields(ResultRow)], lineterminator="\n")
    writer.writeheader()
    writer.writerows(asdict(row) for row in rows)
    return text.getvalue()


@dataclass(frozen=True, slots=True)
class _Column:
    header: str
    cell: Callable[[ResultRow], str]
    #: Left out of the table when it is 0 in every row.
    optional: Callable[[ResultRow], float] = lambda _: 1


_MEAN = _Column("mean", lambda row: seconds(row.mean_latency_s))
_COLUMNS = (
    _Column("load/exec", lambda row: percent(row.load_over_exec)),
    _Column("hits", lambda row: percent(row.hits / row.requests)),
    _Column("misses", lambda row: f"{row.misses:,}"),
    _Column("rejected", lambda row: f"{row.rejected:,}", lambda row: row.rejected),
    _Column("joins", lambda row: f"{row.joins:,}", lambda row: row.joins),
    _Column("forwards", lambda row: f"{row.forwards:,}", lambda row: row.forwards),
    _Column("preloads", lambda row: f"{row.preloads:,}", lambda row: row.preloads),
    _Column("wasted", lambda row: f"{row.wasted_preloads:,}", lambda row: row.preloads),
    _Column("preload/exec", lambda row: percent(row.preload_over_exec), lambda row: row.preloads),
    _Column("evictions", lambda row: f"{row.evictions:,}"),
    _Column("form changes", lambda row: f"{row.form_changes:,}", lambda row: row.form_changes),
    _Column("background/exec", lambda row: percent(row.background_load_over_exec), lambda row: row.form_changes),
    _MEAN,
    _Column("p99", lambda row: seconds(row.p99_s)),
    _Column("requests/s", lambda row: f"{row.requests_per_s:,.0f}"),
)


def as_table(rows: Sequence[ResultRow], oracles: Collection[str]) -> Table:
    """Make a table of the rows, grouped by capacity.

    A star marks the least load over exec of the policies that are not in ``oracles``, unless all are the same. Where
    models have several forms, it is the least mean latency, as executions differ too.
    """
    columns = [column for column in _COLUMNS if any(column.optional(row) for row in rows)]
    if has_forms := any(row.forms for row in rows):
        columns.sort(key=lambda column: column is not _MEAN)
    table = Table(box=None, header_style="bold", pad_edge=False)
    for header in ("memory", "policy", "forms") if has_forms else ("memory", "policy"):
        table.add_column(header, no_wrap=True)
    for column in columns:
        table.add_column(column.header, justify="right", no_wrap=True)
    for capacity, group in groupby(rows, key=lambda row: row.capacity_bytes):
        shown = tuple(group)
        best = _best(shown, oracles)
        memory = f"{size(capacity)} ({percent(shown[0].capacity_share)})"
        for number, row in enumerate(shown):
            knows_future = row.policy in oracles
            policy = f"{row.policy} (oracle)" if knows_future else row.policy
            style = "dim" if knows_future else "bold green" if row is best else ""
            cells = [column.cell(row) for column in columns]
            # Two blanks in place of the star keep the figures aligned.
            cells[0] += " *" if row is best else "  "
            named = (policy, row.forms) if has_forms else (policy,)
            texts = [Text(cell, style=style) for cell in (*named, *cells)]
            table.add_row("" if number else memory, *texts, end_section=number == len(shown) - 1)
    return table


def summary(rows: Sequence[ResultRow]) -> str:
    """Describe what all rows have in common, in one line."""
    row = rows[0]
    time = f"time {row.time}"
    if row.locations > 1:
        time = f"{row.locations} locations, {time}, coordination {row.coordination}"
    return (
        f"{row.requests:,} requests for {row.models:,} models from {row.trace}; {time}, seed {row.seed}; "
        f"compulsory load/exec {percent(row.compulsory_load_over_exec)}"
    )


def figures_table(first_header: str, headers: Sequence[str]) -> Table:
    """Make an empty table with a column of names and right-aligned columns of figures."""
    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column(first_header, no_wrap=True)
    for header in headers:
        table.add_column(header, justify="right", no_wrap=True)
    return table


def percent(ratio: float | None) -> str:
    """Format a ratio with one decimal, or more where it is small."""
    if ratio is None:
        return "-"
    return f"{ratio:.1%}" if ratio >= 0.01 or ratio == 0 else f"{100 * ratio:.2g}%"


def seconds(value_s: float) -> str:
    """Format a time in the unit in which it reads best."""
    return f"{value_s:.2f} s" if value_s >= 1 else f"{value_s * 1e3:.1f} ms"


def size(value_bytes: int) -> str:
    """Format a size in the unit in which it reads best."""
    for unit, name in ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if value_bytes >= unit:
            return f"{value_bytes / unit:.2f} {name}"
    return f"{value_bytes} B"


def _best(rows: Sequence[ResultRow], oracles: Collection[str]) -> ResultRow | None:
    figures = [(_figure(row), row) for row in rows if row.policy not in oracles]
    attainable = [(figure, row) for figure, row in figures if figure is not None]
    # With nothing to compare there is nothing to mark.
    if len({figure for figure, _ in attainable}) < 2:
        return None
    return min(attainable, key=lambda pair: pair[0])[1]


def _figure(row: ResultRow) -> float | None:
    return row.mean_latency_s if row.forms else row.load_over_exec
