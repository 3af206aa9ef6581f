"""What ``python -m loadtests.memory`` prints of what it has found."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from serve_app.models.profiling.measure_published import FREE_BYTES, FREE_SHARE

_MB = 1e6


def print_evictions(console: Console, found: dict[str, Any]) -> None:
    """How memory falls with evictions, by runtime."""
    rows = found["rows"]
    console.print(f"evictions of {len(rows)} models")
    by_runtime = []
    for runtime in sorted({row["runtime"] for row in rows}):
        # What is smaller than what a heap may keep has no share of itself.
        those = [row for row in rows if row["runtime"] == runtime and row["bytes"] > FREE_BYTES]
        for later, when in ((0, "at once"), (1, "with heap given back")):
            falls = [(row["fall"] + later * row["later"]) / row["taken"] for row in those]
            beyond = _beyond(those, [fall - 1 for fall in falls], "taken")
            by_runtime += [
                (f"{runtime}: fall of memory {when}, over what the load had taken", "0.95 to 1.05", _range(falls)),
                ("models beyond that, and 2 MiB", "none", beyond),
            ]
        # Models of several sizes, and with tables, count what they take once all of it was used.
        shares = [row["taken"] / row["bytes"] for row in those]
        by_runtime += [
            (f"{runtime}: taken, over what the model counts", "at most 1.05", _range(shares)),
            ("models beyond that, and 2 MiB", "none", _beyond(those, [max(0.0, each - 1) for each in shares], "bytes")),
        ]
    _aims(
        console,
        *by_runtime,
        (
            "free heap given back later, MB",
            "",
            _range([row["later"] / _MB for row in rows]),
        ),
        (
            "of its file left in the page cache, share",
            "0",
            _range([row["cached"] / row["bytes"] for row in rows]),
        ),
    )


def print_leak(console: Console, found: dict[str, Any], what: str) -> None:
    """How memory grows over so many of what is named."""
    # What libraries set up once comes in the first tenth.
    samples = found["samples"][max(1, len(found["samples"]) // 10) :]
    cycles, sizes = np.array(samples, float).T
    per_cycle, _ = np.polyfit(cycles, sizes, 1)
    console.print(f"{found['samples'][-1][0]} {what} of {found['models']} models")
    _aims(
        console,
        ("slope of resident memory, bytes each", "about 0", f"{per_cycle:+.0f}"),
        (
            "resident memory, MB: after a tenth / at the end / range",
            "",
            f"{sizes[0] / _MB:.1f} / {sizes[-1] / _MB:.1f} / {(sizes.max() - sizes.min()) / _MB:.1f}",
        ),
    )


def print_churn(console: Console, found: dict[str, Any], rate: float) -> None:
    """Whether a worker lived through churn, and what it took at most."""
    if "seconds" not in found:
        console.print(f"churn: the worker ended with {found['exit']} under a limit of {found.get('limit')} bytes")
        return
    console.print(
        f"churn for {found['seconds']:.0f} s under a limit of {found['limit'] / _MB:.0f} MB "
        f"(capacity {found['capacity'] / _MB:.0f}, base {found['base'] / _MB:.0f})"
    )
    _aims(
        console,
        ("the worker lives", "yes", "yes" if found["exit"] == 0 else f"no, {found['exit']}"),
        ("models, runtimes", "", f"{found['models']}, {' '.join(found['runtimes'])}"),
        ("loads a second", f"{rate:g}", f"{found['loads_per_s']:.1f}"),
        ("evictions", "", f"{found['evictions']}"),
        ("background loads a second beside them", "", f"{found['preloads_per_s']:.1f}"),
        ("inferences a second, failed", "as many as run, 0", f"{found['runs_per_s']:.1f}, {found['failed']}"),
        ("models ever beyond what they may take", "no", "yes" if found["over_counted"] else "no"),
        ("most resident memory beyond the base, over capacity", "1", f"{found['peak'] / found['capacity']:.2f}"),
        ("share of the time above capacity", "0", f"{found['over_share']:.3f}"),
        ("most that was held back, over capacity", "", f"{found['unaccounted'] / found['capacity']:.2f}"),
        ("peak of the cgroup, page cache included, over its limit", "1", f"{found['group_peak'] / found['limit']:.2f}"),
    )


def _beyond(rows: Sequence[dict[str, Any]], shares: Sequence[float], of: str) -> str:
    """Name the rows that miss an aim by more than what every model may."""
    missed = [
        f"{row['model']} ({row[of] / _MB:.1f} MB: {share:+.3f})"
        for row, share in zip(rows, shares, strict=True)
        if abs(share) * row[of] > max(FREE_SHARE * row[of], FREE_BYTES)
    ]
    return ", ".join(missed) or "none"


def _range(values: Sequence[float]) -> str:
    return f"{min(values):.3f} to {max(values):.3f}, median {statistics.median(values):.3f}"


def _aims(console: Console, *rows: tuple[str, str, str]) -> None:
    table = Table(box=None, header_style="bold")
    for column in ("", "aim", "found"):
        table.add_column(column)
    for row in rows:
        table.add_row(*row)
    console.print(table)
