"""Which requests that wait for an execution slot are executed together."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from serve_app.core.catalog import PublishedModel
from serve_app.core.contract import BATCH


@dataclass(frozen=True, slots=True, kw_only=True)
class Joinable:
    """What of a request decides whether it is executed together with others.

    Attributes:
        model: in the form in which it is in memory.
        sizes: of the free axes of its inputs, in the order of ``Contract.axes``.
        least_s: seconds that an execution of the least sizes probably takes.
        until_s: when its answer must be there, by the clock of ``now``.
    """

    model: PublishedModel
    sizes: tuple[int, ...]
    least_s: float
    until_s: float

    @property
    def rows(self) -> int:
        """Its size along the axis ``batch``."""
        return self.sizes[_at(self.model)]

    @property
    def kind(self) -> tuple[int, ...]:
        """What requests of one model must have in common: the sizes of all axes but ``batch``."""
        at = _at(self.model)
        return (*self.sizes[:at], *self.sizes[at + 1 :])

    @property
    def most_rows(self) -> int:
        """Return how many rows of these sizes are executed together at most; less than two: none are."""
        batch = self.model.contract.batch
        if not self.model.joined_elements or batch is None:
            return 1
        row = self.model.contract.elements(self.of_rows(1))
        return min(batch.largest, self.model.joined_elements // max(1, row))

    def of_rows(self, rows: int) -> tuple[int, ...]:
        """Return the sizes of an execution of so many rows."""
        at = _at(self.model)
        return (*self.sizes[:at], rows, *self.sizes[at + 1 :])

    def seconds(self, rows: int) -> float:
        """Return how long an execution of so many rows probably takes."""
        return self.least_s * self.model.times_longer(self.of_rows(rows))


def count_joined(candidates: Sequence[Joinable], now: float, workspace_bytes: int) -> int:
    """Return how many of the first candidates are executed together, at least one.

    So many that each is answered in time, that there is workspace for all of them, and that their rows are no more
    than what measurements say is worth it. They are not waited for: these are requests that wait already.

    Args:
        candidates: of one model and kind, the longest waiting one first.
        now: seconds.
        workspace_bytes: for executions.
    """
    first = candidates[0]
    count, rows, most = 0, 0, first.most_rows
    for each in candidates:
        if count and rows + each.rows > most:
            break
        count, rows = count + 1, rows + each.rows
    while count > 1 and not _fits(candidates[:count], now, workspace_bytes):
        count //= 2
    return count


def added_s(joinable: Joinable, rows_waiting: int) -> float:
    """Return by how much a request lengthens what is to be executed, where so many rows of its kind wait already."""
    most = joinable.most_rows
    before = rows_waiting % most if most > 1 else 0
    if not before or before + joinable.rows > most:
        return joinable.seconds(joinable.rows)
    return max(0.0, joinable.seconds(before + joinable.rows) - joinable.seconds(before))


def _fits(members: Sequence[Joinable], now: float, workspace_bytes: int) -> bool:
    first, rows = members[0], sum(each.rows for each in members)
    until_s = min((each.until_s for each in members), default=math.inf)
    needed_bytes = first.model.cost(first.of_rows(rows)).workspace_bytes
    return needed_bytes <= workspace_bytes and now + first.seconds(rows) <= until_s


def _at(model: PublishedModel) -> int:
    return next(at for at, axis in enumerate(model.contract.axes) if axis.name == BATCH)
