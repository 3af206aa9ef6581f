"""Who asks for what, for placement: for long, and in a crowd that has just come or gone."""

from __future__ import annotations

import math
from typing import NamedTuple

from serve_app.core.cluster.popularity import DecayedRate, Popularity


class DecayRates(NamedTuple):
    """By what share per second, at first, requests are forgotten: of the long memory, and of the very short one."""

    steady_per_s: float
    crowd_per_s: float


class ModelDemand:
    """How often users of one location ask for one model, for placement: patient, but quick to see a crowd come and go.

    - ``steady_per_s``: a rate over a long memory.
    - ``crowd_per_s``: a rate over a very short memory, as far as it cannot be chance: two standard deviations less.
    - ``is_over``: there was a crowd, and nobody has asked for so long that by the long memory several requests would
      have come. The steady rate is 0 then, and when requests come again, what they are after such a silence.

    There is one of every location and model, and all of them are looked at in every round. So both rates are here as
    of the last request, rather than in objects of their own, and the memories, which all share, are arguments.
    """

    #: So many requests that should have come and have not mean that a popularity is over.
    MISSED = 4.0
    #: So many requests or fewer of the short memory are never beyond chance; a little less, for rounding.
    CHANCE = 3.999
    #: What comes at once is taken to have come in this time.
    LEAST_S = 1.0

    __slots__ = ("_crowd", "_crowd_since_s", "_had_crowd", "last_s", "steady")

    def __init__(self) -> None:
        #: When the last request came, and requests per second as of then.
        self.last_s = -math.inf
        self.steady = 0.0
        self._crowd = 0.0
        self._had_crowd = False
        self._crowd_since_s = 0.0

    def add(self, now: float, count: int, memories: DecayRates, *, in_crowd: bool) -> bool:
        """Count ``count`` requests at ``now`` (seconds; never runs backwards), perhaps those of a crowd.

        Returns:
            Whether it may be a crowd now, or was one.
        """
        since_s = now - self.last_s
        steady, crowd = self.steady, self._crowd
        if since_s > 0:
            steady *= math.exp(-memories.steady_per_s * since_s)
            crowd *= math.exp(-memories.crowd_per_s * since_s)
            self.last_s = now
        if self._had_crowd and steady * since_s > self.MISSED:
            steady = min(steady, 1 / since_s)
            self._had_crowd = False
        before = crowd / memories.crowd_per_s
        if before < 1:
            self._crowd_since_s = now
        self.steady = steady + count * memories.steady_per_s
        self._crowd = crowd + count * memories.crowd_per_s
        self._had_crowd = self._had_crowd or in_crowd
        return self._had_crowd or before + count > self.CHANCE

    def crowd_per_s(self, now: float, memories: DecayRates) -> float:
        """Requests per second of a crowd, 0 if there is none."""
        requests = self._requests(now, memories)
        sure = _beyond_chance(requests)
        if sure <= 0:
            return 0.0
        # Requests have come only for so long yet, which is less than what such a memory takes to fill.
        since_s = max(now - self._crowd_since_s, self.LEAST_S)
        filled = -math.expm1(-memories.crowd_per_s * since_s)
        return requests * memories.crowd_per_s * sure / requests / filled

    def is_over(self, now: float, memories: DecayRates) -> bool:
        """Whether there was a crowd, which has gone."""
        silence_s = now - self.last_s
        return self._had_crowd and self._steady_per_s(now, memories) * silence_s > self.MISSED

    def is_lively(self, now: float, memories: DecayRates) -> bool:
        """Whether there may be a crowd, or was one."""
        return self._had_crowd or self._requests(now, memories) > self.CHANCE

    def _steady_per_s(self, now: float, memories: DecayRates) -> float:
        return self.steady * math.exp(-memories.steady_per_s * max(0.0, now - self.last_s))

    def _requests(self, now: float, memories: DecayRates) -> float:
        """How many requests of this very moment the short memory is worth."""
        return self._crowd * math.exp(-memories.crowd_per_s * max(0.0, now - self.last_s)) / memories.crowd_per_s


def _beyond_chance(requests: float) -> float:
    """Two standard deviations less."""
    return requests - 2.0 * math.sqrt(requests)


class DemandTracker:
    """``ModelDemand`` of every location in every model.

    Args:
        half_life_s: of the long memory.
        crowd_half_life_s: of the very short one.
    """

    #: So many requests of the very short memory, of all locations and beyond chance, are a crowd. Fewer are a burst,
    #: which will come again.
    CROWD = 40.0

    def __init__(self, half_life_s: float, crowd_half_life_s: float) -> None:
        self._crowd_half_life_s = crowd_half_life_s
        self._memories = DecayRates(math.log(2) / half_life_s, math.log(2) / crowd_half_life_s)
        self._known: dict[str, dict[str, ModelDemand]] = {}
        #: Those of them that may be a crowd, or were one: few.
        self._lively: dict[tuple[str, str], ModelDemand] = {}
        self._everywhere: dict[str, DecayedRate] = {}

    def add(self, location: str, model_id: str, count: int, now: float) -> None:
        """Count ``count`` requests for ``model_id`` that users of ``location`` sent."""
        known = self._known.get(location)
        if known is None:
            known = self._known[location] = {}
        interest = known.get(model_id)
        if interest is None:
            interest = known[model_id] = ModelDemand()
        everywhere = self._everywhere.get(model_id)
        if everywhere is None:
            everywhere = self._everywhere[model_id] = DecayedRate(self._crowd_half_life_s)
        everywhere.add(now, count)
        in_crowd = _beyond_chance(everywhere.requests(now)) >= self.CROWD
        if interest.add(now, count, self._memories, in_crowd=in_crowd):
            self._lively[location, model_id] = interest

    def steady(self, now: float) -> dict[str, dict[str, float]]:
        """Steady requests per second of every model at every location that asks for it; forgets the rest."""
        self._everywhere = {model_id: rate for model_id, rate in self._everywhere.items() if rate.requests(now) >= 1e-3}
        decay, exp = self._memories.steady_per_s, math.exp
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
        for (location, model_id), interest in self._lively.items():
            if interest.is_over(now, self._memories):
                steady[location][model_id] = 0.0
        return steady

    def crowds(self, now: float) -> dict[str, dict[str, float]]:
        """Requests per second of every crowd; of what is no crowd, nothing."""
        memories = self._memories
        self._lively = {key: interest for key, interest in self._lively.items() if interest.is_lively(now, memories)}
        crowds: dict[str, dict[str, float]] = {}
        for (location, model_id), interest in self._lively.items():
            per_s = interest.crowd_per_s(now, memories)
            if per_s > 0:
                crowds.setdefault(location, {})[model_id] = per_s
        return crowds

    def over(self, now: float) -> frozenset[str]:
        """Models for which there was a crowd somewhere, which has gone."""
        return frozenset(
            model_id for (_, model_id), interest in self._lively.items() if interest.is_over(now, self._memories)
        )
