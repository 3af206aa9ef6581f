"""How often a model is asked for: a request rate that forgets exponentially."""

from __future__ import annotations

import math


class DecayedRate:
    """Requests per second, each request counting half as much after every ``half_life_s``.

    The weights are normalised so that a steady stream of r requests per second reads r.
    """

    __slots__ = ("_decay_per_s", "_level", "_updated_s")

    def __init__(self, half_life_s: float) -> None:
        if half_life_s <= 0:
            raise ValueError(f"half_life_s must be positive, not {half_life_s}")
        self._decay_per_s = math.log(2) / half_life_s
        self._level = 0.0
        self._updated_s = 0.0

    def add(self, now: float, count: int = 1) -> None:
        """Count ``count`` requests at ``now`` (seconds; never runs backwards)."""
        self._level = self.per_s(now) + count * self._decay_per_s
        self._updated_s = max(now, self._updated_s)

    def per_s(self, now: float) -> float:
        """The rate as of ``now``, in requests per second."""
        return self._level * math.exp(-self._decay_per_s * max(0.0, now - self._updated_s))


class Popularity:
    """Decayed request rate per (location, model)."""

    #: Below one request in about eleven days a pair is forgotten, so that memory stays bounded.
    FORGET_PER_S = 1e-6

    def __init__(self, half_life_s: float) -> None:
        self._half_life_s = half_life_s
        self._rates: dict[str, dict[str, DecayedRate]] = {}

    def add(self, location: str, model_id: str, count: int, now: float) -> None:
        """Count ``count`` requests for ``model_id`` that users of ``location`` sent."""
        rates = self._rates.setdefault(location, {})
        if model_id not in rates:
            rates[model_id] = DecayedRate(self._half_life_s)
        rates[model_id].add(now, count)

    def rates(self, location: str, now: float) -> dict[str, float]:
        """Requests per second of every model that ``location`` has asked for lately; forgets the rest."""
        known = self._rates.get(location, {})
        current = {model_id: rate.per_s(now) for model_id, rate in known.items()}
        for model_id, per_s in current.items():
            if per_s < self.FORGET_PER_S:
                del known[model_id]
        return {model_id: per_s for model_id, per_s in current.items() if per_s >= self.FORGET_PER_S}
