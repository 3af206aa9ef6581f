"""Users of generative models: a seeded stream of sessions in which a user mostly stays with a model.

Popularity is steep, changes from day to day, and comes in runs; recency predicts better than long counts.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from serve_app.errors import TraceError
from serve_app.workload.diurnal import clock_times
from serve_app.workload.seeded_random import Column, SeededRandom
from serve_app.workload.trace import MAX_REQUESTS, Trace, make_trace

_DAY_S = 86_400.0
_DAY_MINUTES = 1440
_WEEKEND_FACTOR = 0.45
_DAY_SIGMA = 0.6
_LENGTH_MU, _LENGTH_SIGMA = 0.55, 1.25
_GAP_MU, _GAP_SIGMA = 4.32, 1.0
_RANK_DECAY = 18.9
_POPULARITY_SIGMA = 0.5
#: Probability that a request of a session draws a new model.
_REDRAW = 0.27
_MOST_DAYS = 3660
_MOST_MODELS = 1_000_000
#: Mean length of a session in requests, to refuse too many requests before they are drawn.
_MEAN_LENGTH = math.exp(_LENGTH_MU + _LENGTH_SIGMA**2 / 2) + 0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class Sessions:
    """Parameters of the stream; the first day is a Monday and begins at midnight. A source is a user.

    Users decide neither models nor times of requests, only their sources: every user begins all sessions with the same
    model, so that a split over locations moves preferences with the users.

    Args:
        days: length of the stream.
        models: their number; the model of rank r is drawn in proportion to exp(-r / 18.9) / r, with daily noise.
        sessions_per_day: median number of sessions that begin on a working day.
        users: their number; the fewer, the more the popularities at the locations differ.
        seed: the same seed and arguments give the same stream.

    Raises:
        ValueError: an argument is out of its range.
    """

    days: int = 30
    models: int = 86
    sessions_per_day: float = 257.0
    users: int = 180
    seed: int = 0

    def __post_init__(self) -> None:
        if not 1 <= self.days <= _MOST_DAYS:
            raise ValueError(f"days must be from 1 to {_MOST_DAYS}, not {self.days}")
        if not 1 <= self.models <= _MOST_MODELS:
            raise ValueError(f"models must be from 1 to {_MOST_MODELS}, not {self.models}")
        if not 0 < self.sessions_per_day < math.inf:
            raise ValueError(f"sessions_per_day must be positive and finite, not {self.sessions_per_day}")
        if self.users < 1:
            raise ValueError(f"users must be at least 1, not {self.users}")

    def trace(self, name: str = "sessions") -> Trace:
        """Generate the stream.

        Raises:
            TraceError: there are no requests, or more than a trace can have.
        """
        means = self._sessions_by_day()
        if means.sum() * _MEAN_LENGTH > MAX_REQUESTS:
            raise TraceError(f"{name}: more than {MAX_REQUESTS} requests; make days or sessions_per_day fewer")
        starts_s = np.concatenate([self._starts(day, float(mean)) for day, mean in enumerate(means)])
        if not len(starts_s):
            raise TraceError(f"{name}: no session begins; make days or sessions_per_day more")
        lengths = self._lengths(len(starts_s))
        session = np.repeat(np.arange(len(starts_s)), lengths)
        first = np.concatenate([[0], np.cumsum(lengths)[:-1]])
        day = (starts_s // _DAY_S).astype(np.intp)
        model = self._models(session, first, day[session])
        return make_trace(
            name=name,
            models=tuple(f"m{rank}" for rank in range(1, self.models + 1)),
            arrival_s=starts_s[session] + self._since_start(session, first),
            model=model,
            source=self._users(model[first])[session],
        )

    def _sessions_by_day(self) -> Column:
        factors = np.exp(_DAY_SIGMA * SeededRandom(self.seed, "days").normal(self.days))
        factors[np.arange(self.days) % 7 >= 5] *= _WEEKEND_FACTOR
        return np.asarray(factors * self.sessions_per_day)

    def _starts(self, day: int, mean: float) -> Column:
        """Draw the beginnings of the sessions of a day: a Poisson process whose rate follows the hours."""
        rng = SeededRandom(self.seed, f"starts of day {day}")
        # Ten standard deviations above the mean are enough to reach the end of the day.
        ends = np.cumsum(rng.exponential(int(mean + 10 * math.sqrt(mean)) + 40))
        return day * _DAY_S + clock_times(ends[ends < mean] / mean, start_hour=0, minutes=_DAY_MINUTES)

    def _lengths(self, count: int) -> NDArray[np.intp]:
        drawn = np.exp(_LENGTH_MU + _LENGTH_SIGMA * SeededRandom(self.seed, "lengths").normal(count))
        return np.ceil(drawn).astype(np.intp)

    def _since_start(self, session: NDArray[np.intp], first: NDArray[np.intp]) -> Column:
        gaps_s = np.exp(_GAP_MU + _GAP_SIGMA * SeededRandom(self.seed, "gaps").normal(len(session)))
        gaps_s[first] = 0.0
        passed_s = np.cumsum(gaps_s)
        return np.asarray(passed_s - passed_s[first][session])

    def _models(self, session: NDArray[np.intp], first: NDArray[np.intp], day: NDArray[np.intp]) -> NDArray[np.intp]:
        rank = np.arange(1, self.models + 1)
        drawn = np.empty(len(session), dtype=np.intp)
        for today in np.unique(day):
            rng = SeededRandom(self.seed, f"models of day {today}")
            weights = np.exp(-rank / _RANK_DECAY + _POPULARITY_SIGMA * rng.normal(self.models)) / rank
            requests = day == today
            drawn[requests] = rng.pick(weights, int(requests.sum()))
        redrawn = SeededRandom(self.seed, "changes").uniform(len(session)) < _REDRAW
        redrawn[first] = True
        latest = np.maximum.accumulate(np.where(redrawn, np.arange(len(session)), 0))
        return drawn[latest]

    def _users(self, began_with: NDArray[np.intp]) -> NDArray[np.intp]:
        """Draw a user for every session among those of its first model, whose number follows its popularity."""
        sessions = np.bincount(began_with, minlength=self.models)
        users = np.maximum(1, np.round(self.users * sessions / len(began_with))).astype(np.intp)
        before = np.concatenate([[0], np.cumsum(users)[:-1]])
        which = SeededRandom(self.seed, "users").uniform(len(began_with)) * users[began_with]
        return np.asarray(before[began_with] + which.astype(np.intp))
