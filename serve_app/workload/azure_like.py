"""Serverless functions: a seeded stream with the statistics of the Azure Functions trace of 2019.

The measured distributions (Shahrad et al., "Serverless in the Wild", USENIX ATC 2020) are drawn for every function: its
class, its rate of calls, and their regularity.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from serve_app.errors import TraceError
from serve_app.workload.diurnal import clock_times
from serve_app.workload.popularity_filter import worth_keeping
from serve_app.workload.seeded_random import Column, SeededRandom
from serve_app.workload.trace import MAX_REQUESTS, Trace, make_trace

#: Share of the functions. Timers tick, steady ones are called evenly, the others in bursts.
_TIMER, _STEADY = 0.336, 0.064
#: Period of a timer in minutes, and its weight.
_PERIODS = {5: 47, 1: 33, 60: 28, 15: 15, 10: 10, 3: 10, 2: 8, 30: 7, 4: 6, 120: 2}
#: Share of the timers that call twice a tick: the median is one call, the 90th percentile two.
_TWICE = 0.15
_STEADY_CV = 0.1
_BURSTY_CV_MEDIAN, _BURSTY_CV_SIGMA, _BURSTY_CV_RANGE = 1.3, 0.9, (0.3, 8.0)
#: Decimal logarithms of the calls per minute at some shares of the functions, straight lines between them.
#: 10^-2.68 is one call in eight hours, the least that was measured. Of the steady ones no low share was, so their
#: lower half mirrors the upper, down to one call a minute: with fewer, steadiness cannot be seen in a trace by minutes.
_STEADY_RATES = ((0.0, 0.1, 0.5, 0.9, 1.0), (0.0, 0.15, 1.22, 2.29, 3.60))
_BURSTY_RATES = ((0.0, 0.2, 0.5, 0.9, 1.0), (-2.68, -2.68, -1.49, 0.0, 1.38))
#: The gaps of very bursty functions may all be zero.
_TINY = 1e-300
_LONGEST_MINUTES = 366 * 1440
_MOST_FUNCTIONS = 1_000_000


@dataclass(frozen=True, slots=True, kw_only=True)
class AzureLike:
    """Parameters of the stream; every function is a model and a source of its own.

    Args:
        functions: their number before any is dropped.
        minutes: length of the stream.
        start_hour: hour of the day at the beginning, 0..23, which decides the rates of the hours.
        rate_cap_per_min: functions with more calls per minute are dropped; clamping would pile them up at the cap.
        max_quantile: the most popular functions are dropped, see ``worth_keeping``.
        drop_one_hit: functions that are called once are dropped.
        seed: the same seed and arguments give the same stream.

    Raises:
        ValueError: an argument is out of its range.
    """

    functions: int = 500
    minutes: int = 480
    start_hour: int = 8
    rate_cap_per_min: float = math.inf
    max_quantile: float = 0.95
    drop_one_hit: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        if not 1 <= self.functions <= _MOST_FUNCTIONS:
            raise ValueError(f"functions must be from 1 to {_MOST_FUNCTIONS}, not {self.functions}")
        if not 1 <= self.minutes <= _LONGEST_MINUTES:
            raise ValueError(f"minutes must be from 1 to {_LONGEST_MINUTES}, not {self.minutes}")
        if not 0 <= self.start_hour <= 23:
            raise ValueError(f"start_hour must be from 0 to 23, not {self.start_hour}")
        if not self.rate_cap_per_min > 0:
            raise ValueError(f"rate_cap_per_min must be positive, not {self.rate_cap_per_min}")
        if not 0 < self.max_quantile <= 1:
            raise ValueError(f"max_quantile must be above 0 and at most 1, not {self.max_quantile}")

    def trace(self, name: str = "azure-like") -> Trace:
        """Generate the stream.

        Raises:
            TraceError: no function is left, or there are more requests than a trace can have.
        """
        draws = _FunctionDraws.draw(self)
        capped = np.where(draws.counts <= self.rate_cap_per_min * self.minutes, draws.counts, 0)
        kept = np.flatnonzero(worth_keeping(capped, max_quantile=self.max_quantile, drop_one_hit=self.drop_one_hit))
        total = int(capped[kept].sum())
        if not total:
            raise TraceError(f"{name}: no function is left; make functions or minutes more, or drop fewer")
        if total > MAX_REQUESTS:
            raise TraceError(f"{name}: {total} requests are more than {MAX_REQUESTS}; make minutes or functions fewer")
        arrivals = [self._arrivals(draws, int(function)) for function in kept]
        model = np.repeat(kept, [len(times) for times in arrivals])
        return make_trace(
            name=name,
            models=tuple(f"f{function + 1}" for function in range(self.functions)),
            arrival_s=np.concatenate(arrivals),
            model=model,
            source=model,
        )

    def _arrivals(self, draws: _FunctionDraws, function: int) -> Column:
        rng, count = SeededRandom(self.seed, f"calls of function {function}"), int(draws.counts[function])
        period = int(draws.periods_min[function])
        if period:
            return _ticks(rng, int(draws.phases_min[function]), period, int(draws.calls_a_tick[function]), count)
        # A renewal process with a given number of calls, around a circle, which has no edges.
        ends = np.cumsum(rng.gamma_gaps(float(draws.cvs[function]), count))
        progress = (ends / max(ends[-1], _TINY) + rng.uniform(1)) % 1.0
        return clock_times(np.sort(progress), start_hour=self.start_hour, minutes=self.minutes)


@dataclass(frozen=True, slots=True, kw_only=True)
class _FunctionDraws:
    """The draws for every function before its calls: columns with one entry per function."""

    #: 0 if the function is no timer.
    periods_min: NDArray[np.intp]
    phases_min: NDArray[np.intp]
    calls_a_tick: NDArray[np.intp]
    cvs: Column
    counts: NDArray[np.int64]

    @classmethod
    def draw(cls, parameters: AzureLike) -> _FunctionDraws:
        size, minutes = parameters.functions, parameters.minutes
        rng = SeededRandom(parameters.seed, "functions")
        kind = rng.uniform(size)
        timer, steady = kind < _TIMER, (kind >= _TIMER) & (kind < _TIMER + _STEADY)
        periods = np.array(list(_PERIODS))[rng.pick(np.array(list(_PERIODS.values()), dtype=np.float64), size)]
        phases = (rng.uniform(size) * periods).astype(np.intp)
        calls = 1 + (rng.uniform(size) < _TWICE)
        ticks = np.maximum(0, -((phases - minutes) // periods))
        cvs = np.clip(_BURSTY_CV_MEDIAN * np.exp(_BURSTY_CV_SIGMA * rng.normal(size)), *_BURSTY_CV_RANGE)
        place = rng.uniform(size)
        rates = 10 ** np.where(steady, np.interp(place, *_STEADY_RATES), np.interp(place, *_BURSTY_RATES))
        # Rounded up or down by rng, so that the mean is right for rare calls too.
        drawn = np.floor(rates * minutes + rng.uniform(size))
        return cls(
            periods_min=np.where(timer, periods, 0),
            phases_min=phases,
            calls_a_tick=calls,
            cvs=np.where(steady, _STEADY_CV, cvs),
            counts=np.where(timer, ticks * calls, drawn).astype(np.int64),
        )


def _ticks(rng: SeededRandom, phase_min: int, period_min: int, calls: int, count: int) -> Column:
    """Return the calls of a timer: in the minute of every period, at random seconds."""
    minutes = phase_min + period_min * (np.arange(count) // calls)
    return np.sort(60.0 * (minutes + rng.uniform(count)))
