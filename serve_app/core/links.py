"""Links between locations: as configured, and as measured by the requests that went over them."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median_low
from typing import Protocol


class Topology(Protocol):
    """All links between locations: as configured (``RoutingRules``), or as measured (``LinkTable``)."""

    def link(self, here: str, there: str) -> Link:
        """The link from one location to another, or within one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Link:
    """The path from one location to another: round trip in seconds, bandwidth in bytes per second."""

    rtt_s: float
    bytes_per_s: float

    def seconds(self, payload_bytes: int) -> float:
        """Extra time of a request with ``payload_bytes`` over this link."""
        return self.rtt_s + payload_bytes / self.bytes_per_s

    def differs_from(self, other: Link, payload_bytes: int, share: float) -> bool:
        """Whether this link takes more, or less, than ``share`` of the other's time for the same payload."""
        before_s = other.seconds(payload_bytes)
        return abs(self.seconds(payload_bytes) - before_s) > share * before_s


#: The link within a location before it is measured. Every call between processes takes a little, even on one machine.
HERE = Link(rtt_s=0.0, bytes_per_s=1e12)


class LinkEstimate:
    """Round trip and bandwidth of one link, learned from what small and large payloads took over it.

    Each is a median of the last few measurements: a process that was busy with something else for a moment makes a
    measurement far too long, which must not count, and a link that has changed is known after half of them.

    Args:
        configured: what counts before anything was measured.
    """

    #: Payloads up to this size show the round trip, larger ones the bandwidth.
    SMALL_BYTES = 16_384
    _WINDOW = 9

    __slots__ = ("_per_byte_s", "_rtts_s", "link")

    def __init__(self, configured: Link) -> None:
        #: The estimate.
        self.link = configured
        self._rtts_s = deque([configured.rtt_s], maxlen=self._WINDOW)
        self._per_byte_s = deque([1.0 / configured.bytes_per_s], maxlen=self._WINDOW)

    def add(self, payload_bytes: int, seconds: float) -> None:
        """A request with ``payload_bytes`` has spent ``seconds`` on the link there and back."""
        link = self.link
        if payload_bytes <= self.SMALL_BYTES:
            self._rtts_s.append(seconds)
            self.link = Link(rtt_s=median_low(self._rtts_s), bytes_per_s=link.bytes_per_s)
        else:
            # Faster than the round trip: as good as free.
            self._per_byte_s.append(max(seconds - link.rtt_s, 0.0) / payload_bytes)
            self.link = Link(rtt_s=link.rtt_s, bytes_per_s=1.0 / max(median_low(self._per_byte_s), 1e-12))


class LinkTable:
    """What one router has measured of the links to all locations, its own among them.

    Args:
        home: the router's location.
        configured: the link before anything was measured.
    """

    #: A link that takes this much more or less than when it was sent last is sent again.
    _CHANGED_SHARE = 0.1
    _CHANGED_BYTES = 100_000

    def __init__(self, home: str, configured: Callable[[str, str], Link]) -> None:
        self._home = home
        self._configured = configured
        self._estimates: dict[str, LinkEstimate] = {}
        self._sent: dict[tuple[str, str], Link] = {}

    def configure(self, configured: Callable[[str, str], Link]) -> None:
        """Take other links for what has not been measured."""
        self._configured = configured

    def add(self, there: str, payload_bytes: int, seconds: float) -> None:
        """A request with ``payload_bytes`` has spent ``seconds`` on the link from here to ``there`` and back."""
        estimate = self._estimates.get(there)
        if estimate is None:
            estimate = self._estimates[there] = LinkEstimate(self._configured(self._home, there))
        estimate.add(payload_bytes, seconds)

    def link(self, here: str, there: str) -> Link:
        """The link to ``there``: measured, else as configured from ``here``."""
        estimate = self._estimates.get(there)
        return self._configured(here, there) if estimate is None else estimate.link

    def changes(self) -> dict[tuple[str, str], Link]:
        """Links that have changed since they were sent last; from now on they count as sent."""
        changed: dict[tuple[str, str], Link] = {}
        for there, estimate in self._estimates.items():
            ends, link = (self._home, there), estimate.link
            sent = self._sent.get(ends)
            if sent is None or link.differs_from(sent, self._CHANGED_BYTES, self._CHANGED_SHARE):
                changed[ends] = link
        self._sent |= changed
        return changed

    def resend(self) -> None:
        """The reader of ``changes`` has lost them: send all links again."""
        self._sent.clear()
