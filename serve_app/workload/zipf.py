"""Generate independent requests whose models follow Zipf's law at every location."""

from __future__ import annotations

import math
import random
from bisect import bisect
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate, count, islice
from typing import Literal, get_args

import numpy as np

from serve_app.workload.request import Request
from serve_app.workload.trace import MAX_REQUESTS, Trace, make_trace

Arrivals = Literal["even", "poisson", "gamma"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ZipfWorkload:
    """An endless stream of requests; at each location the model of rank r is drawn in proportion to r^-exponent.

    Models, arrivals and locations are drawn independently: the models do not change with the rate, nor the popularity
    at one location with the presence of another.

    Args:
        models: distinct names, the most popular first.
        locations: distinct names; each request comes from any of them with the same probability.
        exponent: 0 makes all models equally popular.
        location_skew: difference of the locations, 0..1. Each location ranks the models by scores of its own, and
            the scores of two locations have the correlation ``1 - location_skew``: with 0 every location has the order
            of ``models``, with 1 the orders are independent permutations.
        rate_per_s: requests per second, all locations together.
        arrivals: ``even`` spacing, ``poisson``: independent exponential gaps, or ``gamma``: independent gamma gaps.
        cv: coefficient of variation of gamma gaps: below 1 more even than Poisson, above 1 burstier; 0.001 to 100.
        seed: the same seed and arguments give the same stream.

    Raises:
        ValueError: an argument is out of its range.
    """

    models: tuple[str, ...]
    locations: tuple[str, ...]
    exponent: float = 1.0
    location_skew: float = 0.0
    rate_per_s: float = 1.0
    arrivals: Arrivals = "poisson"
    cv: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        _check_names("models", self.models)
        _check_names("locations", self.locations)
        if not (math.isfinite(self.exponent) and self.exponent >= 0):
            raise ValueError(f"exponent must be finite and not negative, not {self.exponent}")
        if not 0 <= self.location_skew <= 1:
            raise ValueError(f"location_skew must be from 0 to 1, not {self.location_skew}")
        if not (math.isfinite(self.rate_per_s) and self.rate_per_s > 0):
            raise ValueError(f"rate_per_s must be finite and positive, not {self.rate_per_s}")
        if self.arrivals not in get_args(Arrivals):
            raise ValueError(f"arrivals must be one of {', '.join(get_args(Arrivals))}, not {self.arrivals!r}")
        if not 0.001 <= self.cv <= 100:
            raise ValueError(f"cv must be from 0.001 to 100, not {self.cv}")

    def requests(self) -> Iterator[Request]:
        """Yield the stream from its beginning; it does not end."""
        cumulative = list(accumulate(self.probabilities()))
        rankings = {location: self.ranking(location) for location in self.locations}
        draws = self._rng("requests")
        for arrival_s in self._arrivals():
            location = self.locations[int(draws.random() * len(self.locations))]
            # The sum may fall short of 1 by a rounding error, hence the bound.
            rank = bisect(cumulative, draws.random(), hi=len(cumulative) - 1)
            yield Request(arrival_s=arrival_s, model_id=rankings[location][rank], location=location)

    def trace(self, requests: int, *, name: str = "zipf") -> Trace:
        """Return the first ``requests`` of the stream; every request is a source of its own.

        Raises:
            ValueError: ``requests`` is out of its range.
        """
        if not 1 <= requests <= MAX_REQUESTS:
            raise ValueError(f"requests must be from 1 to {MAX_REQUESTS}, not {requests}")
        model_of = {model: index for index, model in enumerate(self.models)}
        location_of = {location: index for index, location in enumerate(self.locations)}
        arrival_s, model, location = np.empty(requests), np.empty(requests, np.uintc), np.empty(requests, np.uintc)
        for place, request in enumerate(islice(self.requests(), requests)):
            arrival_s[place] = request.arrival_s
            model[place] = model_of[request.model_id]
            location[place] = location_of[request.location]
        return make_trace(
            name=name,
            models=self.models,
            locations=self.locations,
            arrival_s=arrival_s,
            model=model,
            source=np.arange(requests),
            location=location if len(self.locations) > 1 else None,
        )

    def probabilities(self) -> tuple[float, ...]:
        """Return the shares of a location's requests for its most popular model, its second, and so on."""
        weights = [rank**-self.exponent for rank in range(1, len(self.models) + 1)]
        total = sum(weights)
        return tuple(weight / total for weight in weights)

    def ranking(self, location: str) -> tuple[str, ...]:
        """Rank the models by their popularity at a location, the most popular first."""
        common, own = self._rng("scores"), self._rng(f"scores of {location}")
        shared = sorted((common.gauss() for _ in self.models), reverse=True)
        keep, blend = math.sqrt(1 - self.location_skew), math.sqrt(self.location_skew)
        scores = {model: keep * score + blend * own.gauss() for model, score in zip(self.models, shared, strict=True)}
        return tuple(sorted(self.models, key=scores.__getitem__, reverse=True))

    def _arrivals(self) -> Iterator[float]:
        match self.arrivals:
            case "even":
                return (number / self.rate_per_s for number in count())
            case "poisson":
                gaps = self._rng("arrivals")
                return accumulate(gaps.expovariate(self.rate_per_s) for _ in count())
            case "gamma":
                gaps, shape = self._rng("arrivals"), self.cv**-2
                return accumulate(gaps.gammavariate(shape, 1 / shape / self.rate_per_s) for _ in count())

    def _rng(self, purpose: str) -> random.Random:
        return random.Random(f"{self.seed}: {purpose}")


def _check_names(what: str, names: tuple[str, ...]) -> None:
    if not names:
        raise ValueError(f"{what} must not be empty")
    if len(set(names)) != len(names):
        raise ValueError(f"{what} must be distinct, not {names}")
