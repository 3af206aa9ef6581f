"""What one location needs to know of a large cluster: who holds what it is asked for, and who is near."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Collection, Iterable, Mapping
from operator import itemgetter

from serve_app.core.cluster.directory import Directory, DirectoryEntry


class Subscription:
    """The workers of other locations, *peers*, of which a location is told.

    | event                            | effect                                                        |
    |----------------------------------|---------------------------------------------------------------|
    | a model is asked for or loaded   | if no peer holds it, the nearest holder becomes one           |
    | more than ``PEERS``              | who was of use longest ago goes; the nearest workers stay     |

    In a cluster of no more than ``PEERS`` workers everybody is a peer. So what a location is told, and what that costs,
    is bounded by what its users ask for, whatever the number of locations.

    Args:
        location: whose scope it is.
        directory: who is there, and holds what.
        version: as of which it begins.
    """

    PEERS = 64
    #: The nearest ones, which are always peers: a model may be loaded there when all are busy here.
    NEAR = 8
    #: So many models are remembered as asked for.
    MODELS = 1024
    #: How often it is looked who is near.
    LOOK_EVERY_S = 30.0

    __slots__ = (
        "_directory",
        "_entries",
        "_left",
        "_location",
        "_looked_s",
        "_members",
        "_moves",
        "_near",
        "complete_since",
        "joined_at",
        "models",
        "peers",
        "rated_s",
        "rates",
        "rates_at",
    )  # fmt: skip

    def __init__(self, location: str, directory: Directory, version: int) -> None:
        self._location = location
        self._directory = directory
        #: Who has read nothing since then reads everything.
        self.complete_since = version
        #: As of which version each is one, in the order of their last use; and the models, likewise.
        self.peers: dict[str, int] = {}
        #: The version as of which the last one joined; and what is told of them, as long as nobody comes or goes.
        self.joined_at = version
        self._entries: list[DirectoryEntry] = []
        self._moves = -1
        self.models: dict[str, int] = {}
        self._left: dict[str, int] = {}
        self._near: frozenset[str] = frozenset()
        self._members = 0
        self._looked_s = 0.0
        #: Requests per second as of ``rated_s``, and the version as of which they are told.
        self.rates: Mapping[str, Mapping[str, float]] = {}
        self.rated_s: float | None = None
        self.rates_at = version

    def follow(self, model_id: str, version: int, way_s: Callable[[str, str], float]) -> bool:
        """Somebody here asks for a model or has loaded it; whether something is new as of ``version``."""
        is_new = model_id not in self.models
        if is_new:
            self.models[model_id] = version
            if len(self.models) > self.MODELS:
                del self.models[next(iter(self.models))]
        holders, peers = self._directory.holders(model_id), self.peers
        fewer, more = (holders, peers) if len(holders) < len(peers) else (peers, holders)
        for replica in fewer:
            if replica in more:
                peers[replica] = peers.pop(replica)
                return is_new
        own = self._directory.at(self._location)
        others = [replica for replica in holders if replica not in own]
        if others:
            self._add(self._nearest(1, others, way_s), version)
        return is_new or bool(others)

    def look(self, version: int, now: float, way_s: Callable[[str, str], float]) -> bool:
        """Find out who is near, if it is time to; whether something is new as of ``version``."""
        members = len(self._directory)
        is_small = members <= self.PEERS
        is_due = now - self._looked_s >= self.LOOK_EVERY_S or not 0.9 * self._members <= members <= 1.1 * self._members
        if not (is_due or (is_small and members != self._members)):
            return False
        self._looked_s, self._members = now, members
        own = self._directory.at(self._location)
        others = [replica for replica in self._directory if replica not in own]
        self._near = frozenset(others if is_small else self._nearest(self.NEAR, others, way_s))
        new = self._near - self.peers.keys()
        self._add(sorted(new), version)
        return bool(new)

    def told(self, since: int) -> list[DirectoryEntry]:
        """What peers have told of themselves after version ``since``."""
        if self._moves != self._directory.moves:
            self._moves = self._directory.moves
            entries = self._directory.entries
            self._entries = [entries[replica] for replica in self.peers if replica in entries]
        return [entry for entry in self._entries if entry.told_at > since]

    def joined(self, since: int) -> list[str]:
        """Who has become a peer after version ``since``."""
        if self.joined_at <= since:
            return []
        return [replica for replica, joined in self.peers.items() if joined > since]

    def beyond(self, since: int) -> tuple[str, ...]:
        """Who has become a peer no more after version ``since``."""
        found = []
        for replica, version in reversed(self._left.items()):
            if version <= since:
                break
            found.append(replica)
        return tuple(found)

    def new_models(self, since: int) -> list[str]:
        """What was asked for here for the first time after version ``since``."""
        found = []
        for model_id, version in reversed(self.models.items()):
            if version <= since:
                break
            found.append(model_id)
        return found

    def _nearest(self, count: int, replicas: Iterable[str], way_s: Callable[[str, str], float]) -> list[str]:
        reports = self._directory
        ways_s = [(way_s(self._location, reports[replica].location), replica) for replica in replicas]
        return [replica for _, replica in heapq.nsmallest(count, ways_s, key=itemgetter(0))]

    def _add(self, replicas: Collection[str], version: int) -> None:
        if replicas:
            self.joined_at, self._moves = version, -1
        for replica in replicas:
            self._left.pop(replica, None)
            self.peers[replica] = version
        while len(self.peers) > self.PEERS:
            last = next((name for name in self.peers if name not in self._near and name not in replicas), None)
            if last is None:
                break
            del self.peers[last]
            self._left[last] = version
        while len(self._left) > self.PEERS:
            self.complete_since = self._left.pop(next(iter(self._left)))
