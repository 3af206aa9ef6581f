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
        self._level = self.per_s(now) + count * self.decay_per_s
        self._updated_s = max(now, self._updated_s)

    def per_s(self, now: float) -> float:
        """The rate as of ``now``, in requests per second."""
        since_s = now - self._updated_s
        return self._level * math.exp(-self.decay_per_s * since_s) if since_s > 0 else self._level

    def cap(self, per_s: float, now: float) -> None:
        """Let the rate as of ``now`` be at most ``per_s``."""
        self._level = min(self.per_s(now), per_s)
        self._updated_s = max(now, self._updated_s)

    def filled(self, since_s: float) -> float:
        """What part of a steady rate is read after so many seconds of it."""
        return -math.expm1(-self.decay_per_s * since_s)

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


class Interest:
    """How often users of one location ask for one model, for placement: patient, but quick to see a crowd come and go.

    - ``steady_per_s``: a rate over a long memory.
    - ``crowd_per_s``: a rate over a very short memory, as far as it cannot be chance: two standard deviations less.
    - ``is_over``: there was a crowd, and nobody has asked for so long that by the long memory several requests would
      have come. The steady rate is 0 then, and when requests come again, what they are after such a silence.
    """

    #: So many requests that should have come and have not mean that a popularity is over.
    MISSED = 4.0
    #: So many requests or fewer of the short memory are never beyond chance; a little less, for rounding.
    CHANCE = 3.999
    #: What comes at once is taken to have come in this time.
    LEAST_S = 1.0

    __slots__ = ("_crowd", "_crowd_since_s", "_had_crowd", "_last_s", "_steady")

    def __init__(self, half_life_s: float, crowd_half_life_s: float) -> None:
        self._steady = DecayedRate(half_life_s)
        self._crowd = DecayedRate(crowd_half_life_s)
        self._last_s = -math.inf
        self._had_crowd = False
        self._crowd_since_s = 0.0

    def add(self, now: float, count: int, *, in_crowd: bool) -> bool:
        """Count ``count`` requests at ``now`` (seconds; never runs backwards), perhaps those of a crowd.

        Returns:
            Whether it may be a crowd now, or was one.
        """
        if self.is_over(now):
            self._steady.cap(1 / (now - self._last_s), now)
            self._had_crowd = False
        before = self._crowd.requests(now)
        if before < 1:
            self._crowd_since_s = now
        self._steady.add(now, count)
        self._crowd.add(now, count)
        self._last_s = now
        self._had_crowd = self._had_crowd or in_crowd
        return self._had_crowd or before + count > self.CHANCE

    def steady_per_s(self, now: float) -> float | None:
        """Requests per second that are to be expected for long; None when nothing worth mentioning is left of them."""
        steady = self._steady
        per_s = steady.per_s(now)
        if per_s < Popularity.FORGET_REQUESTS * steady.decay_per_s:
            return None
        return 0.0 if self._had_crowd and self.is_over(now) else per_s

    def crowd_per_s(self, now: float) -> float:
        """Requests per second of a crowd, 0 if there is none."""
        sure = _beyond_chance(self._crowd.requests(now))
        if sure <= 0:
            return 0.0
        # Requests have come only for so long yet, which is less than what such a memory takes to fill.
        since_s = max(now - self._crowd_since_s, self.LEAST_S)
        return self._crowd.per_s(now) * sure / self._crowd.requests(now) / self._crowd.filled(since_s)

    def is_over(self, now: float) -> bool:
        """Whether there was a crowd, which has gone."""
        silence_s = now - self._last_s
        return self._had_crowd and self._steady.per_s(now) * silence_s > self.MISSED

    def is_lively(self, now: float) -> bool:
        """Whether there may be a crowd, or was one."""
        return self._had_crowd or self._crowd.requests(now) > self.CHANCE


def _beyond_chance(requests: float) -> float:
    """Two standard deviations less."""
    return requests - 2.0 * math.sqrt(requests)


class Interests:
    """``Interest`` of every location in every model."""

    #: So many requests of the very short memory, of all locations and beyond chance, are a crowd. Fewer are a burst,
    #: which will come again.
    CROWD = 40.0

    def __init__(self, half_life_s: float, crowd_half_life_s: float) -> None:
        self._half_lives_s = half_life_s, crowd_half_life_s
        self._known: dict[str, dict[str, Interest]] = {}
        #: Those of them that may be a crowd, or were one: few.
        self._lively: dict[tuple[str, str], Interest] = {}
        self._everywhere: dict[str, DecayedRate] = {}

    def add(self, location: str, model_id: str, count: int, now: float) -> None:
        """Count ``count`` requests for ``model_id`` that users of ``location`` sent."""
        known = self._known.setdefault(location, {})
        if model_id not in known:
            known[model_id] = Interest(*self._half_lives_s)
        everywhere = self._everywhere.setdefault(model_id, DecayedRate(self._half_lives_s[1]))
        everywhere.add(now, count)
        in_crowd = _beyond_chance(everywhere.requests(now)) >= self.CROWD
        interest = known[model_id]
        if interest.add(now, count, in_crowd=in_crowd):
            self._lively[location, model_id] = interest

    def steady(self, now: float) -> dict[str, dict[str, float]]:
        """Steady requests per second of every model at every location that asks for it; forgets the rest."""
        self._everywhere = {model_id: rate for model_id, rate in self._everywhere.items() if rate.requests(now) >= 1e-3}
        steady: dict[str, dict[str, float]] = {}
        for location, known in self._known.items():
            rates = {model_id: interest.steady_per_s(now) for model_id, interest in known.items()}
            for model_id in [model_id for model_id, per_s in rates.items() if per_s is None]:
                del known[model_id], rates[model_id]
                self._lively.pop((location, model_id), None)
            if rates:
                steady[location] = rates  # type: ignore[assignment]
        self._known = {location: self._known[location] for location in steady}
        return steady

    def crowds(self, now: float) -> dict[str, dict[str, float]]:
        """Requests per second of every crowd; of what is no crowd, nothing."""
        self._lively = {key: interest for key, interest in self._lively.items() if interest.is_lively(now)}
        crowds: dict[str, dict[str, float]] = {}
        for (location, model_id), interest in self._lively.items():
            per_s = interest.crowd_per_s(now)
            if per_s > 0:
                crowds.setdefault(location, {})[model_id] = per_s
        return crowds

    def over(self, now: float) -> frozenset[str]:
        """Models for which there was a crowd somewhere, which has gone."""
        return frozenset(model_id for (_, model_id), interest in self._lively.items() if interest.is_over(now))
