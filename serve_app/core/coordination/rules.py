"""Parameters of a coordinator."""

from __future__ import annotations

from dataclasses import dataclass

from serve_app.core.placement.rules import PlacementSettings


@dataclass(frozen=True, slots=True, kw_only=True)
class CoordinatorRules:
    """Parameters of a coordinator, which routers and workers send to it from the configuration.

    Attributes:
        issued: grows with every configuration; the newest one counts.
        half_life_s: of the popularity that routers see.
        stale_after_s: a replica without a report for so long leaves the directory.
        placement: None: nothing is placed.
    """

    issued: int = 0
    half_life_s: float
    stale_after_s: float
    placement: PlacementSettings | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class DeltaLimits:
    """Parameters of deltas: what bounds those of a large cluster, and the memory that they need.

    Attributes:
        small_cluster: up to so many workers every reader gets every report, which is not much more than its share.
        peers: workers of other locations that a location subscribes to.
        nearest: peers by distance alone: a model may be loaded there when the location is busy.
        models: most recently requested models of a location that its subscription covers.
        changes: changes of models kept for each worker; readers that lack older ones get whole reports.
        departed: departed replicas kept; readers that lack older ones get everything.
        nearest_every_s: how often the nearest workers are determined.
        worker_reads_every_s: how often a worker gets a delta in a large cluster. It routes nothing, unlike a router.
        rates_every_s: how often a location's rates are worked out for its routers.
        all_rates_every_s: how often all rates are worked out for readers of no location.
    """

    small_cluster: float = 8
    peers: int = 64
    nearest: int = 8
    models: int = 1024
    changes: int = 256
    departed: int = 1000
    nearest_every_s: float = 30.0
    worker_reads_every_s: float = 2.0
    rates_every_s: float = 2.0
    all_rates_every_s: float = 10.0
