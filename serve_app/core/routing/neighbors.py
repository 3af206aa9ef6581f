"""What is around a location: worked out four times a second, and looked up by every choice."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Sequence
from itertools import islice

from serve_app.core.cluster.reports import WorkerReport
from serve_app.core.links import Link, Topology

#: A worker, and the way to it.
Neighbor = tuple[WorkerReport, Link]


class NeighborIndex:
    """The workers that a location may send to: its own, and those of other locations.

    Args:
        here: the location.
        ways: how far it is to the others.
        workers: all that may be sent to.
    """

    #: Of more than so many replicas, the nearest are found sooner by going through all neighbours.
    _FEW = 16

    __slots__ = ("_names", "_nearest", "_place", "others", "own", "own_link", "ways")

    def __init__(self, here: str, ways: Topology, workers: Iterable[WorkerReport]) -> None:
        self.ways = ways
        self.own: list[WorkerReport] = []
        self.own_link = ways.link(here, here)
        #: In the order in which they were given; and in that of their round trips.
        self.others: list[Neighbor] = []
        for report in workers:
            if report.location == here:
                self.own.append(report)
            else:
                self.others.append((report, ways.link(here, report.location)))
        self._nearest = sorted(self.others, key=_rtt_s)
        self._names = [report.replica for report, _ in self._nearest]
        self._place = {replica: place for place, replica in enumerate(self._names)}

    def nearest(self, replicas: Collection[str], count: int) -> Sequence[Neighbor]:
        """The nearest ``count`` of those of ``replicas`` that are at other locations, the very nearest first."""
        if len(replicas) <= self._FEW:
            places = [place for place in map(self._place.get, replicas) if place is not None]
            places.sort()
        else:
            found = (number for number, replica in enumerate(self._names) if replica in replicas)
            places = list(islice(found, count))
        return [self._nearest[number] for number in places[:count]]

    def rtt_s(self, replicas: Iterable[str]) -> float:
        """Seconds to and from the nearest of ``replicas`` at other locations; without end where there is none."""
        places = [place for place in map(self._place.get, replicas) if place is not None]
        return _rtt_s(self._nearest[min(places)]) if places else math.inf


def _rtt_s(neighbour: Neighbor) -> float:
    return neighbour[1].rtt_s
