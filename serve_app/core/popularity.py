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

    def requests(self, now: float) -> float:
        """How many requests of this very moment the rate as of ``now`` is worth."""
        return self.per_s(now) / self._decay_per_s


class Popularity:
    """Decayed request rate per (location, model)."""

    #: What is left of one request when a pair is forgotten, 13 half-lives later, so that memory stays bounded.
    FORGET_REQUESTS = 1e-4

    def __init__(self, half_life_s: float) -> None:
        self._half_life_s = half_life_s
        self._rates: dict[str, dict[str, DecayedRate]] = {}

    def add(self, location: str, model_id: str, count: int, now: float) -> None:
        """Count ``count`` requests for ``model_id`` that users of ``location`` sent."""
        rates = self._rates.setdefault(location, {})
        if model_id not in rates:
            rates[model_id] = DecayedRate(self._half_life_s)
        rates[model_id].add(now, count)

    def rates(self, now: float) -> dict[str, dict[str, float]]:
        """Requests per second of every model at every location that has asked for it lately; forgets the rest."""
        self._rates = {location: kept for location, known in self._rates.items() if (kept := self._lately(known, now))}
        return {
            location: {model_id: rate.per_s(now) for model_id, rate in known.items()}
            for location, known in self._rates.items()
        }

    def _lately(self, known: dict[str, DecayedRate], now: float) -> dict[str, DecayedRate]:
        return {model_id: rate for model_id, rate in known.items() if rate.requests(now) >= self.FORGET_REQUESTS}
