"""The comparison as a picture: latencies of the open loop, and how many times better EdgeServe is."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from loadtests.compare.report import AIMS, NAMES, Result, ratio
from loadtests.compare.sides import OURS, SIDES
from loadtests.compare.stream import Kind

_WIDTH, _HEIGHT = 12.0, 4.5
_DOTS_PER_INCH = 150
_SHOWN: tuple[tuple[str, Kind], ...] = (("throughput_per_s", "closed"), ("p99_s", "open"), ("load_delay_s", "open"))
_COLOURS = {name: f"C{number}" for number, name in enumerate(SIDES)}


def plot(results: Sequence[Result], path: Path) -> None:
    """Write a picture with one row for each setting.

    Raises:
        OSError: the file cannot be written.
    """
    figure = Figure(figsize=(_WIDTH, _HEIGHT * len(results)), layout="constrained")
    # The object interface alone: pyplot would look for a screen.
    FigureCanvasAgg(figure)
    for row, axes in zip(results, figure.subplots(len(results), 2, squeeze=False), strict=True):
        _latencies(axes[0], row)
        _ratios(axes[1], row)
    figure.savefig(path, dpi=_DOTS_PER_INCH)


def _latencies(axes: Axes, result: Result) -> None:
    for name, measured in result.outcome.sides.items():
        latencies_ms = np.sort(np.asarray(measured.latencies_s["open"])) * 1000
        if len(latencies_ms):
            share = np.arange(1, len(latencies_ms) + 1) / len(latencies_ms)
            axes.step(latencies_ms, share, where="post", color=_COLOURS[name], label=name)
    axes.set_xscale("log")
    axes.set_xlabel("latency, ms")
    axes.set_ylabel("share of requests")
    axes.set_title(
        f"{result.zoo.setting.name}: open loop, {result.outcome.rate_per_s:.1f} requests/s", fontsize="small"
    )
    axes.grid(visible=True, which="both", alpha=0.3)
    axes.legend(fontsize="x-small")


def _ratios(axes: Axes, result: Result) -> None:
    names = [name for name in result.outcome.sides if name != OURS]
    for group, (figure, kind) in enumerate(_SHOWN):
        for number, name in enumerate(names):
            found = ratio(result, name, kind, figure)
            if found is None:
                continue
            place = group + 0.8 * (number + 0.5) / len(names) - 0.4
            error = [[found.median - found.least], [found.most - found.median]]
            label = name if group == 0 else None
            height = 0.7 / len(names)
            axes.barh(place, found.median, height, xerr=error, color=_COLOURS[name], label=label, capsize=2)
            for aim in AIMS:
                if (aim.side, aim.figure, aim.kind) == (name, figure, kind):
                    axes.plot([aim.least] * 2, [place - height / 2, place + height / 2], color="black", linewidth=2)
    axes.set_xscale("log")
    axes.set_yticks(range(len(_SHOWN)), [f"{NAMES[figure]},\n{kind} loop" for figure, kind in _SHOWN])
    axes.axvline(1.0, color="gray", linewidth=1)
    axes.invert_yaxis()
    axes.set_xlabel(f"how many times better {OURS} is; black: the aim")
    axes.grid(visible=True, which="both", axis="x", alpha=0.3)
    axes.legend(fontsize="x-small")
