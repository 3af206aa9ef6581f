"""What is around a location: worked out four times a second, and looked up by every choice."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Sequence

from serve_app.core.links import Link
from serve_app.core.reports import WorkerReport
from serve_app.core.routing_rules import Ways

#: A worker, and the way to it.
Neighbour = tuple[WorkerReport, Link]


class Nearby:
    """The workers that a location may send to: its own, and those of other locations.

    Args:
        here: the location.
        ways: how far it is to the others.
        workers: all that may be sent to.
    """

    __slots__ = ("_nearest", "_place", "others", "own", "own_link", "ways")

    def __init__(self, here: str, ways: Ways, workers: Iterable[WorkerReport]) -> None:
        self.ways = ways
        self.own: list[WorkerReport] = []
        self.own_link = ways.link(here, here)
        #: In the order in which they were given; and in that of their round trips.
        self.others: list[Neighbour] = []
        for report in workers:
            if report.location == here:
                self.own.append(report)
            else:
                self.others.append((report, ways.link(here, report.location)))
        self._nearest = sorted(self.others, key=_rtt_s)
        self._place = {report.replica: place for place, (report, _) in enumerate(self._nearest)}

    def nearest(self, replicas: Collection[str], many: int, enough: int) -> Sequence[Neighbour]:
        """Those of ``replicas`` that are at other locations, the nearest first; if they are many, only enough."""
        place, nearest = self._place, self._nearest
        if len(replicas) <= many:
            places = [place[replica] for replica in replicas if replica in place]
            places.sort()
            return [nearest[number] for number in places]
        found: list[Neighbour] = []
        for neighbour in nearest:
            if neighbour[0].replica in replicas:
                found.append(neighbour)
                if len(found) == enough:
                    break
        return found

    def rtt_s(self, replicas: Iterable[str]) -> float:
        """Seconds to and from the nearest of ``replicas`` at other locations; without end where there is none."""
        place = self._place
        places = [place[replica] for replica in replicas if replica in place]
        return _rtt_s(self._nearest[min(places)]) if places else math.inf


def _rtt_s(neighbour: Neighbour) -> float:
    return neighbour[1].rtt_s
