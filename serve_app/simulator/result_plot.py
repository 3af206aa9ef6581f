"""Plot load over execution time against memory, one line per policy."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter

from serve_app.simulator.result_row import ResultRow

_INCHES = (9.0, 5.0)
_DOTS_PER_INCH = 150
#: The ten of matplotlib and two more, as there are more than ten policies.
_COLORS = (*(f"C{number}" for number in range(10)), "black", "gold")
_LOG_TICKS = (1.0, 2.0, 5.0)
#: The line of loading everything once is drawn above this share of the least figure; lower, it compresses the others.
_MIN_COMPULSORY = 0.1


def plot(rows: Sequence[ResultRow], path: Path, *, oracles: Collection[str]) -> None:
    """Write a plot of rows of one workload; ``oracles`` are dashed.

    Raises:
        OSError: the file cannot be written.
    """
    figure = Figure(figsize=_INCHES, layout="constrained")
    # The object interface alone: pyplot would need a display.
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    known = [row for row in rows if row.load_over_exec is not None]
    if len({row.capacity_share for row in known}) > 1:
        _lines(axes, known, oracles)
    else:
        _bars(axes, known, oracles)
    row = rows[0]
    places = f", {row.locations} locations" if row.locations > 1 else ""
    counts = f"{row.requests:,} requests, {row.models:,} models{places}, time {row.time}"
    # Over the figure, which is wider than the axes beside a long legend.
    figure.suptitle(f"{_short(row.trace)}\n{counts}", fontsize="small")
    figure.savefig(path, dpi=_DOTS_PER_INCH)


def _lines(axes: Axes, rows: Sequence[ResultRow], oracles: Collection[str]) -> None:
    for number, policy in enumerate(dict.fromkeys(row.policy for row in rows)):
        mine = sorted((row for row in rows if row.policy == policy), key=lambda row: row.capacity_share)
        shares = [100 * row.capacity_share for row in mine]
        ratios = [100 * (row.load_over_exec or 0.0) for row in mine]
        color = _COLORS[number % len(_COLORS)]
        style = "--" if policy in oracles else "-"
        axes.plot(shares, ratios, style, color=color, marker="o", markersize=3, label=_label(policy, oracles))
    compulsory = rows[0].compulsory_load_over_exec or 0.0
    if compulsory > _MIN_COMPULSORY * min(row.load_over_exec or 0.0 for row in rows):
        axes.axhline(100 * compulsory, color="gray", linestyle=":", label="each model loaded once, on demand")
    if any((row.load_over_exec or 0.0) > 0 for row in rows):
        axes.set_yscale("log", subs=_LOG_TICKS)
        axes.yaxis.set_minor_formatter(NullFormatter())
    axes.yaxis.set_major_formatter(FuncFormatter(_plain_percent))
    axes.xaxis.set_major_formatter(FuncFormatter(_plain_percent))
    axes.set_xlabel("memory, share of all models")
    axes.set_ylabel("seconds waited for loads over seconds of execution")
    axes.grid(visible=True, which="both", alpha=0.3)
    axes.figure.legend(loc="outside right upper", fontsize="small")


def _bars(axes: Axes, rows: Sequence[ResultRow], oracles: Collection[str]) -> None:
    """Draw bars: one memory gives no lines."""
    ratios = [100 * (row.load_over_exec or 0.0) for row in rows]
    colors = ["lightgrey" if row.policy in oracles else "tab:blue" for row in rows]
    bars = axes.barh([_label(row.policy, oracles) for row in rows], ratios, color=colors)
    axes.bar_label(bars, [f"{ratio:.3g}%" for ratio in ratios], padding=3, fontsize="small")
    axes.margins(x=0.12)
    axes.invert_yaxis()
    axes.xaxis.set_major_formatter(FuncFormatter(_plain_percent))
    share = f" with memory for {rows[0].capacity_share:.0%} of all models" if rows else ""
    axes.set_xlabel(f"load over exec{share}")


def _label(policy: str, oracles: Collection[str]) -> str:
    return f"{policy} (knows the future)" if policy in oracles else policy


def _plain_percent(value: float, _position: int | None) -> str:
    return f"{value:,.10g}%"


def _short(trace: str) -> str:
    """Return the name of a trace without folders, and not too long."""
    kind, _, rest = trace.partition(":")
    text = f"{kind}:{rest.rpartition('/')[2]}"
    # Dollar signs would begin a formula.
    return (text if len(text) <= 70 else f"{text[:67]}...").replace("$", r"\$")
