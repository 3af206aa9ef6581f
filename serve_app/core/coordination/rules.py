"""How a coordinator works."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from serve_app.core.placement.rules import PlacementRules
from serve_app.core.routing.rules import RoutingRules


@dataclass(frozen=True, slots=True, kw_only=True)
class PlacementSettings:
    """What a coordinator needs in order to place models.

    Attributes:
        routing: profiles and links.
        every_s: period of the rounds.
        payload_bytes: of a typical request.
        min_copies: models of which there must be several copies.
        rules: how eager to be.
    """

    routing: RoutingRules
    every_s: float
    payload_bytes: int
    min_copies: Mapping[str, int] = field(default_factory=dict)
    rules: PlacementRules = field(default_factory=PlacementRules)


@dataclass(frozen=True, slots=True, kw_only=True)
class CoordinatorRules:
    """How a coordinator works, as those who need it have been configured.

    Attributes:
        issued: grows with every configuration; the newest one counts.
        half_life_s: after how long a request counts half towards popularity.
        stale_after_s: after how long a silent replica is taken for dead.
        placement: None where nothing is to be placed.
    """

    issued: int = 0
    half_life_s: float
    stale_after_s: float
    placement: PlacementSettings | None = None
