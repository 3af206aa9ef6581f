"""The workers around a location: sorted four times a second, and looked up by every choice."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Sequence
from itertools import islice

from serve_app.core.cluster.reports import WorkerReport
from serve_app.core.links import Link, Topology

#: A worker, and the link to it.
Neighbor = tuple[WorkerReport, Link]


class NeighborIndex:
    """The workers that a location may send to: its own, and those of other locations.

    Args:
        here: the location.
        links: from the location to the others.
        workers: all that may be sent to.
    """

    #: Of more replicas than this, the nearest are found sooner by a pass over all neighbors.
    _FEW = 16

    __slots__ = ("_distance_rank", "_nearest", "_replicas", "links", "others", "own", "own_link")

    def __init__(self, here: str, links: Topology, workers: Iterable[WorkerReport]) -> None:
        self.links = links
        self.own: list[WorkerReport] = []
        self.own_link = links.link(here, here)
        #: Workers of other locations, in the order in which they were given.
        self.others: list[Neighbor] = []
        for report in workers:
            if report.location == here:
                self.own.append(report)
            else:
                self.others.append((report, links.link(here, report.location)))
        self._nearest = sorted(self.others, key=_rtt_s)
        self._replicas = [report.replica for report, _ in self._nearest]
        self._distance_rank = {replica: rank for rank, replica in enumerate(self._replicas)}

    def nearest(self, replicas: Collection[str], count: int) -> Sequence[Neighbor]:
        """The nearest ``count`` of those of ``replicas`` that are at other locations, the very nearest first."""
        if len(replicas) <= self._FEW:
            ranks = self._ranks(replicas)
            ranks.sort()
        else:
            found = (rank for rank, replica in enumerate(self._replicas) if replica in replicas)
            ranks = list(islice(found, count))
        return [self._nearest[rank] for rank in ranks[:count]]

    def rtt_s(self, replicas: Iterable[str]) -> float:
        """Seconds to and from the nearest of ``replicas`` at other locations; ``inf`` where there is none."""
        ranks = self._ranks(replicas)
        return _rtt_s(self._nearest[min(ranks)]) if ranks else math.inf

    def _ranks(self, replicas: Iterable[str]) -> list[int]:
        return [rank for rank in map(self._distance_rank.get, replicas) if rank is not None]


def _rtt_s(neighbor: Neighbor) -> float:
    return neighbor[1].rtt_s
