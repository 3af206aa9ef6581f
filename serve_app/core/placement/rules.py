"""Parameters of placement."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from serve_app.core.routing.rules import RoutingRules


@dataclass(frozen=True, slots=True, kw_only=True)
class PlacementRules:
    """Parameters of the rounds of placement.

    Attributes:
        share_per_round: share of a worker's memory that one round may load, and may unload. Required copies have a
            separate budget of the same size. An urgent model may exceed it once; the excess is deducted from later
            rounds.
        most_copies: improvements that one round orders in the whole cluster; the others wait for the next round.
        hysteresis: a copy displaces others only if it is worth so many times what they are.
        payback_s: a copy is worth its load only if it saves as many seconds within this time.
        patience_s: how long a command counts as carried out though no report confirms it.
        repeat_s: how long a worker gets no other command for the same model.
        half_life_s: of the popularity that a copy is worth something for.
        flash_crowd_half_life_s: of the popularity in which flash crowds are seen.
        flash_crowd_payback_s: in a flash crowd, which may leave as it came, a copy must pay for its load in this time.
        busy_share: of their time that the holders of a model may spend with it before more copies are required.
        withdraw_after_s: after a flash crowd, a copy that is not worth its load goes when it was unused for so long.
        hand_over_share: of a worker's memory that may be loaded and unloaded with the models of one that leaves.
    """

    share_per_round: float = 0.1
    most_copies: int = 500
    hysteresis: float = 3.0
    payback_s: float = 600.0
    patience_s: float = 10.0
    repeat_s: float = 120.0
    half_life_s: float = 1800.0
    flash_crowd_half_life_s: float = 2.0
    flash_crowd_payback_s: float = 10.0
    busy_share: float = 0.7
    withdraw_after_s: float = 60.0
    hand_over_share: float = 0.5

    def __post_init__(self) -> None:
        for name in ("share_per_round", "hand_over_share", "busy_share"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f"{name} must be above 0 and at most 1, not {getattr(self, name)}")
        if not self.hysteresis >= 1:
            raise ValueError(f"hysteresis must be at least 1, not {self.hysteresis}")
        for name in (
            "most_copies", "payback_s", "patience_s", "repeat_s", "half_life_s", "flash_crowd_half_life_s",
            "flash_crowd_payback_s", "withdraw_after_s",
        ):  # fmt: skip
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, not {getattr(self, name)}")


@dataclass(frozen=True, slots=True, kw_only=True)
class PlacementSettings:
    """Parameters of placement: the rounds, and what they depend on.

    Attributes:
        routing: profiles and links.
        every_s: period of the rounds.
        payload_bytes: of a typical request, which makes a link slow beside its round trip.
        min_copies: models of which there must be several copies, whether or not they are asked for.
        rules: parameters of a round.
    """

    routing: RoutingRules
    every_s: float
    payload_bytes: int
    min_copies: Mapping[str, int] = field(default_factory=dict)
    rules: PlacementRules = field(default_factory=PlacementRules)
