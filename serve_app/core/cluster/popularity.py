"""The popularity of models: request rates that decay exponentially."""

from __future__ import annotations

import math
from collections.abc import Mapping


class DecayedRate:
    """Requests per second, each request counting half as much after every ``half_life_s``.

    The weights are normalized so that a steady stream of r requests per second reads r. Other decays stand apart:
    ``ModelDemand`` keeps two rates in one object without parameters of its own, as placement has one for every location
    and model; ``RateForecast`` runs for each request of the simulator.
    """

    __slots__ = ("_level", "_updated_s", "decay_per_s")

    def __init__(self, half_life_s: float, per_s: float = 0.0, now: float = 0.0) -> None:
        if half_life_s <= 0:
            raise ValueError(f"half_life_s must be positive, not {half_life_s}")
        #: The share by which the rate falls in a second, at first.
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
        """The number of requests at this moment that the rate as of ``now`` is worth."""
        return self.per_s(now) / self.decay_per_s


class Popularity:
    """Decayed request rate per (location, model)."""

    #: What is left of one request when a pair is forgotten, after 13 half-lives, so that memory stays bounded.
    FORGET_REQUESTS = 1e-4

    def __init__(self, half_life_s: float) -> None:
        self._half_life_s = half_life_s
        self._rates: dict[str, dict[str, DecayedRate]] = {}

    def change(self, half_life_s: float, now: float) -> None:
        """Use another half-life from now on."""
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

    def rates(self, now: float) -> Mapping[str, Mapping[str, float]]:
        """Requests per second of every model at every location with requests that are not forgotten yet."""
        return {location: rates for location in self._rates if (rates := self.rates_of(location, now))}

    def rates_of(self, location: str, now: float) -> Mapping[str, float]:
        """The same of one location."""
        rates = {model_id: rate.per_s(now) for model_id, rate in self._rates.get(location, {}).items()}
        least_per_s = self._least_per_s
        if rates and min(rates.values()) < least_per_s:
            return {model_id: per_s for model_id, per_s in rates.items() if per_s >= least_per_s}
        return rates

    def forget(self, now: float) -> None:
        """Release the memory of pairs that ``rates`` leaves out."""
        least_per_s = self._least_per_s
        for location, known in list(self._rates.items()):
            kept = {model_id: rate for model_id, rate in known.items() if rate.per_s(now) >= least_per_s}
            if not kept:
                del self._rates[location]
            elif len(kept) < len(known):
                self._rates[location] = kept

    @property
    def pairs(self) -> int:
        """Number of pairs of location and model with a rate, some of which may be forgotten soon."""
        return sum(map(len, self._rates.values()))

    @property
    def _least_per_s(self) -> float:
        return self.FORGET_REQUESTS * math.log(2) / self._half_life_s
