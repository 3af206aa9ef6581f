"""The part of a large cluster that matters to the readers of one location."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Collection, Iterable, Mapping
from operator import itemgetter

from serve_app.core.cluster.directory import Directory, DirectoryEntry
from serve_app.core.cluster.reports import WorkerChange, WorkerReport
from serve_app.core.coordination.change_log import ChangeLog
from serve_app.core.coordination.rules import DeltaLimits


class _PeerEntries:
    """The directory's entries of the peers, as long as no worker comes or goes: worked out by reads, so no state."""

    __slots__ = ("entries", "membership_version")

    def __init__(self) -> None:
        self.entries: list[DirectoryEntry] = []
        self.membership_version = -1

    def __reduce__(self) -> tuple[type[_PeerEntries], tuple[()]]:
        return _PeerEntries, ()


class Subscription:
    """The workers of other locations, *peers*, that a location follows, and what its readers have read.

    | event                            | effect                                                              |
    |----------------------------------|---------------------------------------------------------------------|
    | a model is requested or loaded   | if no peer holds it, the nearest holder becomes a peer              |
    | more peers than ``limits.peers`` | the least recently used one is unsubscribed; the nearest ones stay  |

    In a cluster of no more than ``limits.peers`` workers all are peers. So the size of the deltas of a location, and
    their cost, are bounded by the demand of its users, whatever the number of locations.

    A reader of no location follows all workers.

    Args:
        location: whose readers it serves.
        directory: of all workers.
        limits: of the deltas.
        rtt_s: round trip in seconds from one location to another.
        version: at which it begins.

    Attributes:
        oldest_delta_version: readers with an older version get everything.
        peers: the version at which each became one, least recently used first.
        models: that the location has asked for, by the version at which it first did.
        rates: requests per second, as of the last ``set_rates``.
        rates_version: at which they were set.
    """

    __slots__ = (
        "_directory", "_has_read_s", "_limits", "_location", "_members", "_nearest", "_nearest_s", "_peer_entries",
        "_rated_s", "_reading", "_rtt_s", "_unsubscribed", "joined_version", "models", "oldest_delta_version", "peers",
        "rates", "rates_version",
    )  # fmt: skip

    def __init__(
        self,
        location: str | None,
        directory: Directory,
        limits: DeltaLimits,
        rtt_s: Callable[[str, str], float],
        version: int,
    ) -> None:
        self._location, self._directory, self._limits, self._rtt_s = location, directory, limits, rtt_s
        self.oldest_delta_version = self.joined_version = version
        self.peers: dict[str, int] = {}
        self.models: ChangeLog[str] = ChangeLog()
        self._peer_entries = _PeerEntries()
        self._unsubscribed: ChangeLog[str] = ChangeLog()
        self._nearest: frozenset[str] = frozenset()
        self._nearest_s = 0.0
        self._members = 0
        #: When each worker of the location read last; those whose present report is answered with a delta.
        self._has_read_s: dict[str, float] = {}
        self._reading: set[str] = set()
        self.rates: Mapping[str, Mapping[str, float]] = {}
        self.rates_version = version
        self._rated_s: float | None = None

    # Changes

    def request(self, model_id: str, version: int) -> None:
        """Take note that the location asks for a model or has loaded it."""
        if model_id not in self.models:
            self.models.add(model_id, version)
            self.models.trim(self._limits.models)
        holders, peers = self._directory.holders(model_id), self.peers
        fewer, more = (holders, peers) if len(holders) < len(peers) else (peers, holders)
        for replica in fewer:
            if replica in more:
                peers[replica] = peers.pop(replica)
                return
        own = self._directory.replicas_at(self._location or "")
        others = [replica for replica in holders if replica not in own]
        if others:
            self._add(self._nearest_of(1, others), version)

    def refresh_nearest(self, version: int, now: float) -> bool:
        """Determine the nearest workers if that is due; returns whether peers have joined as of ``version``."""
        if self._location is None:
            return False
        members = len(self._directory.workers)
        is_small = members <= self._limits.peers
        is_due = (
            now - self._nearest_s >= self._limits.nearest_every_s
            or not 0.9 * self._members <= members <= 1.1 * self._members
        )
        if not (is_due or (is_small and members != self._members)):
            return False
        self._nearest_s, self._members = now, members
        own = self._directory.replicas_at(self._location)
        others = [replica for replica in self._directory.workers if replica not in own]
        self._nearest = frozenset(others if is_small else self._nearest_of(self._limits.nearest, others))
        joined = self._nearest - self.peers.keys()
        self._add(sorted(joined), version)
        return bool(joined)

    def admit(self, replica: str, now: float, *, knows_nothing: bool) -> bool:
        """Decide whether the present report of a worker is answered with a delta; returns the decision."""
        read_s = self._has_read_s.get(replica)
        if knows_nothing or read_s is None or now - read_s >= self._limits.worker_reads_every_s:
            self._has_read_s[replica] = now
            self._reading.add(replica)
            return True
        self._reading.discard(replica)
        return False

    def deregister(self, replica: str) -> None:
        """Forget when a worker of the location, which has gone, has read."""
        self._has_read_s.pop(replica, None)
        self._reading.discard(replica)

    def are_rates_due(self, now: float) -> bool:
        """Whether routers should get other rates."""
        limits = self._limits
        every_s = limits.all_rates_every_s if self._location is None else limits.rates_every_s
        return self._rated_s is None or now - self._rated_s >= every_s

    def set_rates(self, rates: Mapping[str, Mapping[str, float]], version: int, now: float) -> None:
        """Set what routers get as rates."""
        self.rates, self.rates_version, self._rated_s = rates, version, now

    # Reads

    def is_reading(self, replica: str) -> bool:
        """What ``admit`` has decided last."""
        return replica in self._reading

    def workers_and_changes(self, reader: str | None, since: int) -> tuple[list[WorkerReport], list[WorkerChange]]:
        """Whole reports and changes for a reader that has version ``since``; ``reader``: if it is this worker."""
        entries, location = self._directory.entries, self._location
        if location is None:
            published = [entry for entry in entries.values() if entry.published_version > since]
            return (
                [entry.summary(None) for entry in published if entry.compacted_version > since],
                [entry.change(since) for entry in published if entry.compacted_version <= since],
            )
        own = [entries[replica] for replica in self._directory.replicas_at(location) if replica != reader]
        workers = [entry.without_demand() for entry in own if entry.reported_version > since]
        names = self.models
        joined = self._joined(since)
        workers += [entries[replica].summary(names) for replica in joined if replica in entries]
        changes: list[WorkerChange] = []
        for entry in self._published(since):
            if entry.compacted_version > since:
                if entry.report.replica not in joined:
                    workers.append(entry.summary(names))
            elif not joined or entry.report.replica not in joined:
                changes.append(entry.change(since))
        # Of models that are new to the location, at peers that are not.
        for model_id in names.since(since):
            for replica in self.peers.keys() & self._directory.holders(model_id):
                entry = entries[replica]
                if max(self.peers[replica], entry.compacted_version) <= since:
                    changes.append(entry.change_of(model_id))
        return workers, changes

    def unsubscribed(self, since: int) -> tuple[str, ...]:
        """The replicas that ceased to be peers after version ``since``."""
        return tuple(self._unsubscribed.since(since))

    def _joined(self, since: int) -> list[str]:
        """The replicas that became peers after version ``since``."""
        if self.joined_version <= since:
            return []
        return [replica for replica, joined in self.peers.items() if joined > since]

    def _published(self, since: int) -> list[DirectoryEntry]:
        """The entries of peers with anything published after version ``since``."""
        known, directory = self._peer_entries, self._directory
        if known.membership_version != directory.membership_version:
            known.membership_version = directory.membership_version
            known.entries = [directory.entries[replica] for replica in self.peers if replica in directory.entries]
        return [entry for entry in known.entries if entry.published_version > since]

    def _nearest_of(self, count: int, replicas: Iterable[str]) -> list[str]:
        here, workers, rtt_s = self._location or "", self._directory.workers, self._rtt_s
        away_s = [(rtt_s(here, workers[replica].location), replica) for replica in replicas]
        return [replica for _, replica in heapq.nsmallest(count, away_s, key=itemgetter(0))]

    def _add(self, replicas: Collection[str], version: int) -> None:
        if replicas:
            self.joined_version, self._peer_entries = version, _PeerEntries()
        for replica in replicas:
            self._unsubscribed.pop(replica, None)
            self.peers[replica] = version
        while len(self.peers) > self._limits.peers:
            last = next((name for name in self.peers if name not in self._nearest and name not in replicas), None)
            if last is None:
                break
            del self.peers[last]
            self._unsubscribed.add(last, version)
        self.oldest_delta_version = max(self.oldest_delta_version, self._unsubscribed.trim(self._limits.peers))
