"""The parameters of a simulation besides its trace."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import Literal

from serve_app.config.edge import CoordinatorSettings, WorkerSettings
from serve_app.core.cache.model_cache import ModelCache
from serve_app.core.links import Link
from serve_app.core.placement.rules import PlacementRules
from serve_app.simulator.forms import FormsInMemory

#: ``none``: independent caches; ``forwarding``: reports, views and forwards as well; ``full``: placement as well.
Coordination = Literal["none", "forwarding", "full"]

_COORDINATOR, _WORKER = CoordinatorSettings(), WorkerSettings()
#: A float image of 224 x 224 pixels and three colors.
IMAGE_BYTES = 4 * 3 * 224 * 224
GIGABIT_BYTES_PER_S = 125e6


@dataclass(frozen=True, slots=True, kw_only=True)
class DiscreteEventOptions:
    """The locations and what connects them; defaults are those of the live system's configuration.

    Attributes:
        make_cache: a fresh cache for the location of that number, with its policy, randomness and capacity.
        make_forms: the forms of a fresh cache; None: every model has one.
        coordination: how far the locations cooperate.
        exec_slots: executions at the same time, per location.
        links: between locations, by their names, in either direction.
        default_link: between all others.
        payload_bytes: of a request.
        report_every_s: period of the reports, and of the views.
        coordinator_delay_s: one way between any location and the coordinator.
        half_life_s: of the popularity that routers see.
        horizon_s: see ``RoutingRules``.
        staleness_s: see ``RoutingRules``; the live system takes two report periods.
        placement_every_s: period of placement.
        placement: its rules.

    Raises:
        ValueError: an argument is out of its range.
    """

    make_cache: Callable[[int], ModelCache]
    make_forms: Callable[[], FormsInMemory] | None = None
    coordination: Coordination = "full"
    exec_slots: int = _WORKER.parallel_inferences
    links: Mapping[tuple[str, str], Link] = field(default_factory=dict)
    default_link: Link = field(default_factory=lambda: Link(rtt_s=0.02, bytes_per_s=GIGABIT_BYTES_PER_S))
    payload_bytes: int = IMAGE_BYTES
    report_every_s: float = _COORDINATOR.report_every
    coordinator_delay_s: float = 0.02
    half_life_s: float = _COORDINATOR.popularity_half_life
    horizon_s: float = _COORDINATOR.horizon
    staleness_s: float = 2 * _COORDINATOR.report_every
    placement_every_s: float = 5.0
    placement: PlacementRules = field(default_factory=PlacementRules)

    def __post_init__(self) -> None:
        for name in ("report_every_s", "half_life_s", "placement_every_s"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be positive and finite, not {getattr(self, name)}")
        for name in ("payload_bytes", "coordinator_delay_s", "horizon_s", "staleness_s"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be finite and not negative, not {getattr(self, name)}")
        if self.exec_slots < 1:
            raise ValueError(f"exec_slots must be at least 1, not {self.exec_slots}")


def geographic_links(
    locations: Sequence[str],
    *,
    seed: int,
    low_s: float = 0.005,
    high_s: float = 0.080,
    bytes_per_s: float = GIGABIT_BYTES_PER_S,
) -> dict[tuple[str, str], Link]:
    """A link for every pair: locations are random points, and round trips grow with the distance.

    Two locations at the same point would be ``low_s`` apart; the two that are furthest apart are ``high_s``.
    """
    rng = random.Random(f"{seed}: points")
    points = [(rng.random(), rng.random()) for _ in locations]
    distances = {(a, b): math.dist(points[a], points[b]) for a, b in combinations(range(len(locations)), 2)}
    furthest = max(distances.values(), default=0.0) or 1.0
    return {
        (locations[a], locations[b]): Link(
            rtt_s=low_s + (high_s - low_s) * distance / furthest, bytes_per_s=bytes_per_s
        )
        for (a, b), distance in distances.items()
    }
