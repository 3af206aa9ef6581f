"""The requests that every side gets: the same models at the same times."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from itertools import count
from typing import Literal

from serve_app.workload.trace import Trace

Kind = Literal["closed", "open"]


class Stream:
    """A request stream, cut into one piece for each repeat and kind of load.

    Args:
        trace: any; its models stand for ours in a random order, in turns if it has more.
        models: ours.
        repeats: how many there will be.
        seed: of that order.
    """

    def __init__(self, trace: Trace, models: Sequence[str], *, repeats: int, seed: int) -> None:
        order = random.Random(seed).sample(list(models), len(models))
        self._models = [order[index % len(order)] for index in trace.model]
        self._arrival_s = list(trace.arrival_s)
        self._piece = len(self._models) // (2 * repeats)
        if self._piece < 2 or self._arrival_s[-1] <= self._arrival_s[0]:
            raise ValueError(f"{trace.name} has {len(self._models)} requests, too few for {repeats} repeats")

    def models(self, repeat: int) -> Iterator[str]:
        """What the closed loop of a repeat asks for, without end."""
        first = self._first(repeat, "closed")
        return (self._models[(first + number) % len(self._models)] for number in count())

    def arrivals(self, repeat: int, *, rate_per_s: float, seconds: float) -> list[tuple[float, str]]:
        """What the open loop of a repeat asks for, and when: the trace's gaps, faster or slower to be of that rate."""
        first = self._first(repeat, "open")
        began_s, mean_s = self._arrival_s[first], self._arrival_s[-1] - self._arrival_s[0]
        scale = (len(self._arrival_s) - 1) / mean_s / rate_per_s
        due = [((self._arrival_s[place] - began_s) * scale, self._models[place]) for place in self._places(first)]
        return [arrival for arrival in due if arrival[0] < seconds]

    def _places(self, first: int) -> range:
        return range(first, min(first + self._piece, len(self._models)))

    def _first(self, repeat: int, kind: Kind) -> int:
        return (2 * repeat + (kind == "open")) * self._piece
