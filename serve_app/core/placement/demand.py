"""Demand per model and location, for placement: over a long memory, and in a flash crowd that has just come or gone."""

from __future__ import annotations

import math
from typing import NamedTuple

from serve_app.core.cluster.popularity import DecayedRate, Popularity


class DecayRates(NamedTuple):
    """The share per second, at first, by which requests are forgotten: by the long memory, and by the short one."""

    steady_per_s: float
    flash_crowd_per_s: float


class ModelDemand:
    """Requests of one location for one model: patient, but quick to see a flash crowd come and go.

    - ``steady_per_s``: a rate over a long memory.
    - ``flash_crowd_per_s``: a rate over a short memory, as far as randomness does not explain it: two standard
      deviations less.
    - ``is_over``: there was a flash crowd, and the silence since has lasted so long that by the long memory several
      requests would have come. The steady rate is then 0. After new requests, it is computed from the length of the
      silence.

    Both rates decay as in ``DecayedRate``. There is one object for every location and model, and every round of
    placement looks at all of them: so both rates are plain numbers as of the last request, and the decay rates, which
    all objects share, are arguments.
    """

    #: A popularity is over when so many expected requests have not come.
    MISSING = 4.0
    #: Up to so many requests of the short memory are never more than randomness; a little less, for rounding.
    RANDOM_REQUESTS = 3.999
    #: Requests that come at once are taken to have come in this time.
    LEAST_S = 1.0

    __slots__ = ("_flash_crowd", "_flash_crowd_since_s", "_had_flash_crowd", "last_s", "steady")

    def __init__(self) -> None:
        #: When the last request came, and steady requests per second as of then.
        self.last_s = -math.inf
        self.steady = 0.0
        self._flash_crowd = 0.0
        self._had_flash_crowd = False
        self._flash_crowd_since_s = 0.0

    def add(self, now: float, count: int, decays: DecayRates, *, in_flash_crowd: bool) -> bool:
        """Count ``count`` requests at ``now`` (seconds; never runs backwards), perhaps those of a flash crowd.

        Returns:
            Whether there may be a flash crowd now, or was one.
        """
        since_s = now - self.last_s
        steady, flash_crowd = self.steady, self._flash_crowd
        if since_s > 0:
            steady *= math.exp(-decays.steady_per_s * since_s)
            flash_crowd *= math.exp(-decays.flash_crowd_per_s * since_s)
            self.last_s = now
        if self._had_flash_crowd and steady * since_s > self.MISSING:
            steady = min(steady, 1 / since_s)
            self._had_flash_crowd = False
        before = flash_crowd / decays.flash_crowd_per_s
        if before < 1:
            self._flash_crowd_since_s = now
        self.steady = steady + count * decays.steady_per_s
        self._flash_crowd = flash_crowd + count * decays.flash_crowd_per_s
        self._had_flash_crowd = self._had_flash_crowd or in_flash_crowd
        return self._had_flash_crowd or before + count > self.RANDOM_REQUESTS

    def flash_crowd_per_s(self, now: float, decays: DecayRates) -> float:
        """Requests per second of a flash crowd, 0 if there is none."""
        requests = self._requests(now, decays)
        sure = _beyond_chance(requests)
        if sure <= 0:
            return 0.0
        # Requests have come for less time than the memory takes to fill.
        since_s = max(now - self._flash_crowd_since_s, self.LEAST_S)
        filled = -math.expm1(-decays.flash_crowd_per_s * since_s)
        return requests * decays.flash_crowd_per_s * sure / requests / filled

    def is_over(self, now: float, decays: DecayRates) -> bool:
        """Whether there was a flash crowd, which has gone."""
        silence_s = now - self.last_s
        return self._had_flash_crowd and self._steady_per_s(now, decays) * silence_s > self.MISSING

    def is_lively(self, now: float, decays: DecayRates) -> bool:
        """Whether there may be a flash crowd, or was one."""
        return self._had_flash_crowd or self._requests(now, decays) > self.RANDOM_REQUESTS

    def _steady_per_s(self, now: float, decays: DecayRates) -> float:
        return self.steady * math.exp(-decays.steady_per_s * max(0.0, now - self.last_s))

    def _requests(self, now: float, decays: DecayRates) -> float:
        """The number of requests at this moment that the short memory is worth."""
        return (
            self._flash_crowd
            * math.exp(-decays.flash_crowd_per_s * max(0.0, now - self.last_s))
            / decays.flash_crowd_per_s
        )


def _beyond_chance(requests: float) -> float:
    """Two standard deviations less."""
    return requests - 2.0 * math.sqrt(requests)


class DemandTracker:
    """``ModelDemand`` of every location for every model.

    Args:
        half_life_s: of the long memory.
        flash_crowd_half_life_s: of the short one.
    """

    #: So many requests of the short memory, of all locations and beyond randomness, are a flash crowd. Fewer are a
    #: burst, which will come again.
    FLASH_CROWD = 40.0

    def __init__(self, half_life_s: float, flash_crowd_half_life_s: float) -> None:
        self._flash_crowd_half_life_s = flash_crowd_half_life_s
        self._decays = DecayRates(math.log(2) / half_life_s, math.log(2) / flash_crowd_half_life_s)
        self._known: dict[str, dict[str, ModelDemand]] = {}
        #: The few of them that may be in a flash crowd, or were.
        self._lively: dict[tuple[str, str], ModelDemand] = {}
        self._everywhere: dict[str, DecayedRate] = {}

    def add(self, location: str, model_id: str, count: int, now: float) -> None:
        """Count ``count`` requests for ``model_id`` that users of ``location`` sent."""
        known = self._known.get(location)
        if known is None:
            known = self._known[location] = {}
        demand = known.get(model_id)
        if demand is None:
            demand = known[model_id] = ModelDemand()
        everywhere = self._everywhere.get(model_id)
        if everywhere is None:
            everywhere = self._everywhere[model_id] = DecayedRate(self._flash_crowd_half_life_s)
        everywhere.add(now, count)
        in_flash_crowd = _beyond_chance(everywhere.requests(now)) >= self.FLASH_CROWD
        if demand.add(now, count, self._decays, in_flash_crowd=in_flash_crowd):
            self._lively[location, model_id] = demand

    def steady(self, now: float) -> dict[str, dict[str, float]]:
        """Steady requests per second of every model at every location that asks for it; the rest is forgotten."""
        self._everywhere = {model_id: rate for model_id, rate in self._everywhere.items() if rate.requests(now) >= 1e-3}
        decay, exp = self._decays.steady_per_s, math.exp
        least_per_s = Popularity.FORGET_REQUESTS * decay
        steady: dict[str, dict[str, float]] = {}
        for location, known in self._known.items():
            rates = {model_id: item.steady * exp(decay * (item.last_s - now)) for model_id, item in known.items()}
            if rates and min(rates.values()) < least_per_s:
                for model_id in [model_id for model_id, per_s in rates.items() if per_s < least_per_s]:
                    del known[model_id], rates[model_id]
                    self._lively.pop((location, model_id), None)
            if rates:
                steady[location] = rates
        self._known = {location: self._known[location] for location in steady}
        for (location, model_id), demand in self._lively.items():
            if demand.is_over(now, self._decays):
                steady[location][model_id] = 0.0
        return steady

    def flash_crowds(self, now: float) -> dict[str, dict[str, float]]:
        """Requests per second of every flash crowd; nothing of other demand."""
        decays = self._decays
        self._lively = {key: demand for key, demand in self._lively.items() if demand.is_lively(now, decays)}
        flash_crowds: dict[str, dict[str, float]] = {}
        for (location, model_id), demand in self._lively.items():
            per_s = demand.flash_crowd_per_s(now, decays)
            if per_s > 0:
                flash_crowds.setdefault(location, {})[model_id] = per_s
        return flash_crowds

    def over(self, now: float) -> frozenset[str]:
        """Models for which there was a flash crowd somewhere, which has gone."""
        return frozenset(
            model_id for (_, model_id), demand in self._lively.items() if demand.is_over(now, self._decays)
        )
