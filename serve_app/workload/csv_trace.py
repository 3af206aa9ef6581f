"""Read request streams in CSV files, plain or gzipped, with the columns ``arrival_s,model[,location][,user]``.

Columns may be in any order; other columns are ignored, so that logs can be read as they are. Rows may be in any order:
they are sorted by arrival, and rows of one instant keep their order.
"""

from __future__ import annotations

from array import array
from pathlib import Path

import numpy as np

from serve_app.workload.tables import Table
from serve_app.workload.trace import Trace, column, make_trace

_ARRIVAL, _MODEL, _LOCATION, _USER = "arrival_s", "model", "location", "user"


def read_csv(path: Path, *, name: str | None = None) -> Trace:
    """Read the rows of a file as a trace. The source of a request is its user, else its location, else itself.

    Args:
        path: of the file; ``arrival_s`` is in seconds since any moment; the trace begins with its first request.
        name: of the trace; None for the path.

    Raises:
        TraceError: the file cannot be read, is malformed, or has no requests.
    """
    table = Table(path)
    arrival_at = table.column(_ARRIVAL)
    names = {_MODEL: _Names(table, table.column(_MODEL))}
    for optional in (_LOCATION, _USER):
        if optional in table.columns:
            names[optional] = _Names(table, table.column(optional))
    arrival_s = array("d")
    for line, cells in table.rows():
        arrival_s.append(table.number(line, cells, arrival_at))
        for column_names in names.values():
            column_names.add(line, cells)
    if not arrival_s:
        table.fail("has no requests")
    location = names.get(_LOCATION)
    source = names.get(_USER, location)
    return make_trace(
        name=name or str(path),
        models=names[_MODEL].names,
        locations=location.names if location else ("local",),
        arrival_s=column(arrival_s) - min(arrival_s),
        model=column(names[_MODEL].numbers),
        source=column(source.numbers) if source else np.arange(len(arrival_s)),
        location=column(location.numbers) if location else None,
    )


class _Names:
    """A column of names as numbers, in the order of first appearance."""

    def __init__(self, table: Table, place: int) -> None:
        self.numbers: array[int] = array("I")
        self._table, self._place = table, place
        self._number_of: dict[str, int] = {}

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._number_of)

    def add(self, line: int, cells: list[str]) -> None:
        name = self._table.text(line, cells, self._place)
        self.numbers.append(self._number_of.setdefault(name, len(self._number_of)))
