"""Read the Azure Functions trace of 2019: the calls of every function in every minute.

A CSV file, plain or gzipped, with the columns ``HashOwner,HashApp,HashFunction,Trigger`` and one column per minute
whose name is a number, one more than the one before (Shahrad et al., "Serverless in the Wild", USENIX ATC 2020).
"""

from __future__ import annotations

from array import array
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from serve_app.workload.popularity_filter import worth_keeping
from serve_app.workload.seeded_random import SeededRandom
from serve_app.workload.tables import Table, fail, shown
from serve_app.workload.trace import MAX_REQUESTS, Trace, make_trace

_FUNCTION_COLUMNS = ("HashOwner", "HashApp", "HashFunction", "Trigger")
_MINUTE_S = 60.0
#: A count of more digits does not fit the type of the counts.
_MOST_DIGITS = 9
#: Every function, whatever calls it.
ALL_TRIGGERS = "all"


def read_azure(
    path: Path,
    *,
    seed: int,
    minutes: int | tuple[int, int] | None = None,
    max_quantile: float = 0.95,
    drop_one_hit: bool = True,
    trigger: str = ALL_TRIGGERS,
    name: str | None = None,
) -> Trace:
    """Read the calls of a file as a trace: every function is a model, its owner the source.

    Minutes and trigger are chosen first; then the most popular functions are dropped, then those called once. The file
    has calls by the minute: within a minute the calls of all functions are shuffled and spaced evenly. A model has the
    name of its ``HashFunction``, with owner and app in front where several functions have the same.

    Args:
        path: of the file.
        seed: of the shuffling.
        minutes: a number N for the first N minute columns, or (A, B) for those named A to B, both included; the first
            of them begins at second 0. None takes all.
        max_quantile: functions with more calls than this quantile of the counts are dropped, see ``worth_keeping``.
        drop_one_hit: functions that are called once are dropped.
        trigger: only functions with this ``Trigger``, or ``all``.
        name: of the trace; None for the path.

    Raises:
        TraceError: the file cannot be read or is malformed, or nothing is left of it.
        ValueError: ``max_quantile`` is out of its range.
    """
    if not 0 < max_quantile <= 1:
        raise ValueError(f"max_quantile must be above 0 and at most 1, not {max_quantile}")
    calls = _read(path, minutes)
    chosen = np.array([trigger in (ALL_TRIGGERS, kind) for kind in calls.triggers])
    if not chosen.any():
        there = ", ".join(sorted({ALL_TRIGGERS, *calls.triggers}))
        fail(path, f"no function has the trigger {shown(trigger)}; there are {there}")
    totals = np.where(chosen, calls.counts.sum(axis=1, dtype=np.int64), 0)
    kept = np.flatnonzero(worth_keeping(totals, max_quantile=max_quantile, drop_one_hit=drop_one_hit))
    total = int(totals[kept].sum())
    if not total:
        fail(path, "no function is left; choose more minutes or another trigger, or drop fewer")
    if total > MAX_REQUESTS:
        fail(path, f"{total} calls are more than {MAX_REQUESTS}; choose fewer minutes or drop more")
    arrival_s, function = _spread(calls.counts, kept, SeededRandom(seed, "calls within a minute"))
    return make_trace(
        name=name or str(path),
        models=calls.models,
        arrival_s=arrival_s,
        model=function,
        source=calls.owners[function],
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Calls:
    """The content of the file, with one entry per function."""

    models: tuple[str, ...]
    owners: NDArray[np.intp]
    triggers: tuple[str, ...]
    #: Functions x minutes.
    counts: NDArray[np.int32]


def _read(path: Path, minutes: int | tuple[int, int] | None) -> _Calls:
    table = Table(path)
    owner_at, app_at, function_at, trigger_at = (table.column(name) for name in _FUNCTION_COLUMNS)
    first, last = _minute_columns(table, minutes)
    line_of: dict[tuple[str, str, str], int] = {}
    triggers: list[str] = []
    counts: list[array[int]] = []
    for line, cells in table.rows():
        key = (
            table.text(line, cells, owner_at),
            table.text(line, cells, app_at),
            table.text(line, cells, function_at),
        )
        if key in line_of:
            table.fail(f"the same function as in line {line_of[key]}", line=line, column=function_at)
        line_of[key] = line
        triggers.append(table.text(line, cells, trigger_at))
        counts.append(_counts(table, line, cells, first, last))
    if not counts:
        table.fail("has no functions")
    number_of = {owner: number for number, owner in enumerate(dict.fromkeys(owner for owner, _, _ in line_of))}
    times = Counter(function for _, _, function in line_of)
    return _Calls(
        models=tuple(key[2] if times[key[2]] == 1 else "/".join(key) for key in line_of),
        owners=np.array([number_of[owner] for owner, _, _ in line_of]),
        triggers=tuple(triggers),
        counts=np.array(counts, dtype=np.int32),
    )


def _minute_columns(table: Table, minutes: int | tuple[int, int] | None) -> tuple[int, int]:
    """Return the columns of the chosen minutes: the first, and the one after the last."""
    begin = len(_FUNCTION_COLUMNS)
    if set(table.columns[:begin]) != set(_FUNCTION_COLUMNS) or len(table.columns) == begin:
        table.fail(f"the columns must be {', '.join(_FUNCTION_COLUMNS)} and then the minutes", line=table.header_line)
    names = [_minute(table, place) for place in range(begin, len(table.columns))]
    for place, name in enumerate(names):
        if name != names[0] + place:
            table.fail(f"minute {names[0] + place} should stand here", line=table.header_line, column=begin + place)
    first, last = names[0], names[-1]
    match minutes:
        case None:
            wanted = (first, last)
        case int():
            wanted = (first, first + minutes - 1)
        case _:
            wanted = minutes
    if not first <= wanted[0] <= wanted[1] <= last:
        asked = f"{wanted[0]}-{wanted[1]}"
        table.fail(f"the minutes {asked} are not there; the file has {first}-{last}", line=table.header_line)
    return begin + wanted[0] - first, begin + wanted[1] - first + 1


def _minute(table: Table, place: int) -> int:
    name = table.columns[place]
    if not (name.isascii() and name.isdigit() and len(name) <= _MOST_DIGITS):
        table.fail("a minute's name must be a number", line=table.header_line, column=place)
    return int(name)


def _counts(table: Table, line: int, cells: list[str], first: int, last: int) -> array[int]:
    minutes = cells[first:last]
    joined = "".join(minutes)
    # One check of all cells; a wrong cell is searched for only if there is one.
    if joined.isascii() and joined.isdigit() and max(map(len, minutes)) <= _MOST_DIGITS and "" not in minutes:
        return array("i", map(int, minutes))
    for place, cell in enumerate(minutes, start=first):
        text = cell.strip()
        if not (text.isascii() and text.isdigit() and len(text) <= _MOST_DIGITS):
            table.fail(f"{shown(cell)} is not a count", line=line, column=place)
    return array("i", map(int, minutes))


def _spread(
    counts: NDArray[np.int32], kept: NDArray[np.intp], rng: SeededRandom
) -> tuple[NDArray[np.float64], NDArray[np.intp]]:
    """Return arrival in seconds and function of every call."""
    arrivals, functions = [], []
    for minute in range(counts.shape[1]):
        called = np.repeat(kept, counts[kept, minute])
        arrivals.append(_MINUTE_S * (minute + np.arange(len(called)) / max(1, len(called))))
        functions.append(called[rng.order(len(called))])
    return np.concatenate(arrivals), np.concatenate(functions)
