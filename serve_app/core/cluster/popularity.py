"""How often a model is asked for: a request rate that forgets exponentially."""

from __future__ import annotations

import math


class DecayedRate:
    """Requests per second, each request counting half as much after every ``half_life_s``.

    The weights are normalised so that a steady stream of r requests per second reads r.
    """

    __slots__ = ("_level", "_updated_s", "decay_per_s")

    def __init__(self, half_life_s: float, per_s: float = 0.0, now: float = 0.0) -> None:
        if half_life_s <= 0:
            raise ValueError(f"half_life_s must be positive, not {half_life_s}")
        #: By what share it falls in a second, at first.
        self.decay_per_s = math.log(2) / half_life_s
        self._level = per_s
        self._updated_s = now

    def add(self, now: float, count: int = 1) -> None:
        """Count ``count`` requests at ``now`` (seconds; never runs backwards)."""
        since_s = now - self._updated_s
        if since_s > 0:
            self._level *= math.exp(-self.decay_per_s * since_s)
            self._updated_s = now
        self._level += count * self.decay_per_s

    def per_s(self, now: float) -> float:
        """The rate as of ``now``, in requests per second."""
        since_s = now - self._updated_s
        return self._level * math.exp(-self.decay_per_s * since_s) if since_s > 0 else self._level

    def requests(self, now: float) -> float:
        """How many requests of this very moment the rate as of ``now`` is worth."""
        return self.per_s(now) / self.decay_per_s


class Popularity:
    """Decayed request rate per (location, model)."""

    #: What is left of one request when a pair is forgotten, 13 half-lives later, so that memory stays bounded.
    FORGET_REQUESTS = 1e-4

    def __init__(self, half_life_s: float) -> None:
        self._half_life_s = half_life_s
        self._rates: dict[str, dict[str, DecayedRate]] = {}

    def change(self, half_life_s: float, now: float) -> None:
        """Forget faster or more slowly from now on."""
        if half_life_s == self._half_life_s:
            return
        known, self._half_life_s, self._rates = self.rates(now), half_life_s, {}
        for location, rates in known.items():
            for model_id, per_s in rates.items():
                self._rates.setdefault(location, {})[model_id] = DecayedRate(half_life_s, per_s, now)

    def add(self, location: str, model_id: str, count: int, now: float) -> None:
        """Count ``count`` requests for ``model_id`` that users of ``location`` sent."""
        rates = self._rates.get(location)
        if rates is None:
            rates = self._rates[location] = {}
        rate = rates.get(model_id)
        if rate is None:
            rate = rates[model_id] = DecayedRate(self._half_life_s)
        rate.add(now, count)

    def rates(self, now: float) -> dict[str, dict[str, float]]:
        """Requests per second of every model at every location that has asked for it lately; forgets the rest."""
        self._rates = {location: kept for location, known in self._rates.items() if (kept := self._lately(known, now))}
        return {
            location: {model_id: rate.per_s(now) for model_id, rate in known.items()}
            for location, known in self._rates.items()
        }

    def rates_of(self, location: str, now: float) -> dict[str, float]:
        """The same of one location."""
        known = self._rates.get(location, {})
        rates = {model_id: rate.per_s(now) for model_id, rate in known.items()}
        least_per_s = self.FORGET_REQUESTS * math.log(2) / self._half_life_s
        if rates and min(rates.values()) < least_per_s:
            self._rates[location] = self._lately(known, now)
            rates = {model_id: rates[model_id] for model_id in self._rates[location]}
        return rates

    @property
    def pairs(self) -> int:
        """Of how many pairs of location and model there are rates, some of which may be forgotten soon."""
        return sum(map(len, self._rates.values()))

    def _lately(self, known: dict[str, DecayedRate], now: float) -> dict[str, DecayedRate]:
        return {model_id: rate for model_id, rate in known.items() if rate.requests(now) >= self.FORGET_REQUESTS}
