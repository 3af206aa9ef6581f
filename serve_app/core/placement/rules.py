"""How eager placement is."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class PlacementRules:
    """How eager placement is.

    Attributes:
        share_per_round: of a worker's memory, that one round may fill, and that it may empty. For a crowd a larger one
            may move, alone; then nothing does at this worker until its bytes have been made up for. Required copies
            have as much to themselves, and end with the one that exceeds it.
        most_copies: that one round orders in the whole cluster because they are worth it; the others wait for the next.
        hysteresis: a copy displaces others only if it is worth so many times what they are.
        payback_s: a copy is worth its load only if it saves as many seconds within this time.
        patience_s: how long an order counts as carried out though no report confirms it.
        repeat_s: how long a worker is not told anything else about the same model.
        half_life_s: of the popularity that a copy is worth something for.
        crowd_half_life_s: of the popularity in which crowds are seen.
        crowd_payback_s: for a crowd, which may leave as it came, a copy must be worth its load within this time.
        busy_share: of their time that the holders of a model spend with it at most, before there must be more.
        withdraw_after_s: after a crowd, a copy that is not worth its load goes when it was not used for so long.
        hand_over_share: of a worker's memory that may be filled and emptied with the models of one that leaves.
    """

    share_per_round: float = 0.1
    most_copies: int = 500
    hysteresis: float = 3.0
    payback_s: float = 600.0
    patience_s: float = 10.0
    repeat_s: float = 120.0
    half_life_s: float = 1800.0
    crowd_half_life_s: float = 2.0
    crowd_payback_s: float = 10.0
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
            "most_copies", "payback_s", "patience_s", "repeat_s", "half_life_s", "crowd_half_life_s", "crowd_payback_s",
            "withdraw_after_s",
        ):  # fmt: skip
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, not {getattr(self, name)}")
