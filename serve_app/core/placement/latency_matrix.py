"""The latencies between all locations, as a table that is updated rather than built again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from serve_app.core.links import Link


class LatencyMatrix:
    """Seconds from location to location for one payload size.

    Args:
        links: as known so far, in either direction; grows by ``update``.
        default_link: between locations without a known link.
        payload_bytes: of a typical request.
    """

    def __init__(self, links: Mapping[tuple[str, str], Link], default_link: Link, payload_bytes: int) -> None:
        self._links = dict(links)
        self._default_s = default_link.seconds(payload_bytes)
        self._payload_bytes = payload_bytes
        self._number: dict[str, int] = {}
        self._seconds = np.zeros((0, 0))

    def update(self, links: Mapping[tuple[str, str], Link]) -> None:
        """Take in measured links."""
        self._links.update(links)
        self._write(links)

    @property
    def longest_s(self) -> float:
        """The largest known latency, that of the default link included."""
        return max([self._default_s, *(link.seconds(self._payload_bytes) for link in self._links.values())])

    def table(self, locations: Sequence[str], columns: Sequence[str]) -> NDArray[np.float64]:
        """Seconds from every one of ``locations`` (rows) to every one of ``columns``; 0 within a location."""
        new = [location for location in dict.fromkeys((*locations, *columns)) if location not in self._number]
        if new:
            self._number |= {location: number for number, location in enumerate(new, len(self._number))}
            seconds = np.full((len(self._number), len(self._number)), self._default_s)
            known = len(self._seconds)
            seconds[:known, :known] = self._seconds
            np.fill_diagonal(seconds, 0.0)
            self._seconds = seconds
            self._write(self._links)
        rows = [self._number[location] for location in locations]
        return self._seconds[np.ix_(rows, [self._number[location] for location in columns])]

    def _write(self, links: Mapping[tuple[str, str], Link]) -> None:
        number, seconds = self._number, self._seconds
        for (here, there), link in links.items():
            row, column = number.get(here), number.get(there)
            if row is None or column is None or row == column:
                continue
            seconds[row, column] = link.seconds(self._payload_bytes)
            # Links hold in either direction, unless the other one has its own.
            if (there, here) not in self._links:
                seconds[column, row] = seconds[row, column]
