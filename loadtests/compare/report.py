"""The comparison as tables and as JSON."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Console
from rich.table import Table

from loadtests.compare.figures import Aim, Figures, Spread, Verdict, how_many_times, spread
from loadtests.compare.run import KINDS, Load, Measured, Outcome
from loadtests.compare.sides import DEFAULT_PROXY, HAPROXY, MAPPED, OURS
from loadtests.compare.stream import Kind
from loadtests.compare.zoo import Zoo

AIMS = (
    Aim(side=MAPPED, figure="throughput_per_s", kind="closed", least=2),
    Aim(side=DEFAULT_PROXY, figure="load_delay_s", kind="open", least=20),
    Aim(side=HAPROXY, figure="load_delay_s", kind="open", least=20),
    Aim(side=DEFAULT_PROXY, figure="p99_s", kind="open", least=5),
    Aim(side=HAPROXY, figure="p99_s", kind="open", least=5),
    Aim(side=DEFAULT_PROXY, figure="throughput_per_s", kind="closed", least=10),
    Aim(side=HAPROXY, figure="throughput_per_s", kind="closed", least=5),
)
#: How figures are called; ratios are of these.
NAMES = {
    "throughput_per_s": "throughput",
    "p50_s": "p50",
    "p99_s": "p99",
    "p999_s": "p99.9",
    "load_delay_s": "load delay",
}
_MORE_IS_BETTER = {"throughput_per_s"}
_MIB = 2**20


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """One setting."""

    zoo: Zoo
    load: Load
    outcome: Outcome


def ratio(result: Result, side: str, kind: str, figure: str) -> Spread | None:
    """How many times better we are than a side, over the repeats; None where it cannot be said."""
    ours, theirs = (_by_repeat(result.outcome.sides.get(name), kind) for name in (OURS, side))
    return spread(
        how_many_times(getattr(mine, figure), getattr(other, figure), more_is_better=figure in _MORE_IS_BETTER)
        for mine, other in zip(ours, theirs, strict=False)
    )


def verdicts(result: Result) -> list[Verdict]:
    """Every aim, and what came out."""
    return [Verdict(aim=aim, came_out=ratio(result, aim.side, aim.kind, aim.figure)) for aim in AIMS]


def show(result: Result, out: Console) -> None:
    """Print one setting."""
    zoo, load, outcome = result.zoo, result.load, result.outcome
    out.print(
        f"\n[bold]{zoo.setting.name}[/]: {len(zoo.sizes)} models, {zoo.setting.about}; memory "
        f"{zoo.memory_bytes / _MIB:.0f} of {sum(zoo.sizes.values()) / _MIB:.0f} MiB, or {zoo.slots} models; "
        f"closed loop {load.connections} connections, open loop {outcome.rate_per_s:.1f} requests/s; "
        f"{load.repeats} repeats of {load.closed_s:g} and {load.open_s:g} s"
    )
    names = [*outcome.sides, *outcome.gaps]
    for kind in KINDS:
        out.print(_absolute(outcome, names, kind))
        out.print(_ratios(result, names, kind))
    out.print(_memory(outcome, names))
    out.print(_aims(result))
    for side, problem in outcome.gaps.items():
        out.print(f"{side} is missing: {problem}", style="yellow")
    for side, problem in outcome.differ.items():
        out.print(f"{side} does not answer like {OURS}: {problem}", style="yellow")
    if not outcome.differ:
        out.print(f"all sides gave the same probabilities for all {len(zoo.sizes)} models")
    for side, measured in outcome.sides.items():
        for problem in measured.problems[:3]:
            out.print(f"{side} failed: {problem}", style="red")


def as_json(result: Result) -> dict[str, Any]:
    """Everything about one setting, as plain values; of latencies all that were measured."""
    zoo, outcome = result.zoo, result.outcome
    return {
        "setting": zoo.setting.name,
        "models": dict(zoo.sizes),
        "memory_bytes": zoo.memory_bytes,
        "slots": zoo.slots,
        "load": {**asdict(result.load), "rate_per_s": outcome.rate_per_s},
        "sides": {name: asdict(measured) for name, measured in outcome.sides.items()},
        "missing": outcome.gaps,
        "differ": outcome.differ,
        "times_better": {
            name: {kind: {figure: _plain(ratio(result, name, kind, figure)) for figure in NAMES} for kind in KINDS}
            for name in outcome.sides
            if name != OURS
        },
        "aims": [
            {**asdict(verdict.aim), "came_out": _plain(verdict.came_out), "verdict": str(verdict)}
            for verdict in verdicts(result)
        ],
    }


def _absolute(outcome: Outcome, names: Sequence[str], kind: Kind) -> Table:
    columns = ("requests", "failed", "per s", "p50", "p99", "p99.9", "misses", "load delay", "reported", "exec", "CPU")
    title = f"{kind} loop: medians of repeats; latencies, delays and processor time of a request in ms"
    table = Table(f"{kind} loop", *columns, title=title, title_justify="left")
    for name in names:
        measured = outcome.sides.get(name)
        rows = _by_repeat(measured, kind)
        if measured is None:
            table.add_row(name, *("-" for _ in columns))
            continue
        failed_s = spread(row.failed_latency_s for row in rows)
        failures = sum(row.failures for row in rows)
        table.add_row(
            name,
            str(sum(row.requests for row in rows)),
            f"{failures}" + (f" ({failed_s.median * 1000:.0f} ms)" if failed_s else ""),
            _median([row.throughput_per_s for row in rows], "{:.1f}"),
            *(_ms([getattr(row, figure) for row in rows]) for figure in ("p50_s", "p99_s", "p999_s")),
            _median([row.miss_ratio for row in rows], "{:.0%}"),
            *(_ms([getattr(row, figure) for row in rows]) for figure in ("load_delay_s", "reported_wait_s", "exec_s")),
            _ms(measured.cpu_s[kind]),
        )
    return table


def _ratios(result: Result, names: Sequence[str], kind: Kind) -> Table:
    title = f"{kind} loop: how many times better {OURS} is, least - median - most of repeats"
    table = Table("than", *NAMES.values(), title=title, title_justify="left")
    for name in names:
        if name != OURS:
            table.add_row(name, *(_spread(ratio(result, name, kind, figure)) for figure in NAMES))
    return table


def _memory(outcome: Outcome, names: Sequence[str]) -> Table:
    columns = ("weights held", "RSS peak, serving", "over ours", "RSS, serving", "RSS, all", "processes", "idle cores")
    table = Table("memory, MiB", *columns)
    ours = outcome.sides[OURS].memory.serving_peak_bytes
    for name in names:
        measured = outcome.sides.get(name)
        if measured is None:
            table.add_row(name, *("-" for _ in columns))
            continue
        memory = measured.memory
        held, peak, now, everything = (
            f"{size / _MIB:.0f}"
            for size in (measured.held_bytes, memory.serving_peak_bytes, memory.serving_bytes, memory.all_bytes)
        )
        over_ours = f"{memory.serving_peak_bytes / ours:.2f}"
        idle = f"{measured.idle_cpu:.2f}"
        table.add_row(name, held, peak, over_ours, now, everything, str(memory.processes), idle)
    return table


def _aims(result: Result) -> Table:
    table = Table("aim", "against", "at least", "came out", "", title="aims", title_justify="left")
    for verdict in verdicts(result):
        aim = verdict.aim
        what = f"{NAMES[aim.figure]}, {aim.kind} loop"
        table.add_row(what, aim.side, f"{aim.least:g} times", _spread(verdict.came_out), str(verdict))
    return table


def _by_repeat(measured: Measured | None, kind: str) -> Sequence[Figures]:
    return () if measured is None else next(rows for name, rows in measured.figures.items() if name == kind)


def _median(values: Sequence[float | None], shape: str) -> str:
    found = spread(values)
    return "-" if found is None else shape.format(found.median)


def _ms(values: Sequence[float | None]) -> str:
    return _median([None if value is None else value * 1000 for value in values], "{:.1f}")


def _spread(found: Spread | None) -> str:
    return "-" if found is None else f"{found.least:.2g} - {found.median:.2g} - {found.most:.2g}"


def _plain(found: Spread | None) -> dict[str, float] | None:
    return None if found is None else asdict(found)
