"""How likely each model is to be asked for in the next moment, learned from the requests so far.

The prediction for one model is a rate, requests per second, built in two steps:

1. *How often?* A mixture of the model's request rates over a short, a long and an endless memory. What weight each
   memory deserves is learned from all models together, by expectation-maximisation: a memory earns weight when it has
   given a high rate to a model that was then asked for, and loses it by promising requests that do not come. Sessions
   give weight to the short memory, steady popularity to the endless one. A model that nobody has asked for yet has the
   small rate of the prior of the endless memory.
2. *How long since the last time?* A factor for the model's age, the time since its last request, learned for each
   model by itself. Over ages of about the same length it compares the requests that came with those that step 1
   expected (a gamma-Poisson estimate, which starts at 1). So a timer is predicted when it is due and at no other time,
   and a burst that has ended is known to have ended. The factor counts as far as it would have predicted the model's
   past better than step 1 alone.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from math import exp, log

#: Where one age ends and the next begins, in seconds: at 16 and 32 s, and half octaves from 64 s to 12 days.
AGE_EDGES_S = (0.0, 16.0, 32.0, *(64.0 * 2 ** (step / 2) for step in range(29)), math.inf)
_AGES = len(AGE_EDGES_S) - 1
#: What the endless memory holds of every model from the beginning: so many requests in so many seconds.
_PRIOR_REQUESTS = 0.2
_PRIOR_S = 3600.0
#: How many requests, seen and expected, a factor starts with; more make it slower to leave 1.
_FACTOR_PRIOR = 0.5
#: How much of its gain a model keeps with every request.
_GAIN_KEPT = math.exp(-1 / 50)
#: A factor that falls to more than this share of itself is no reason to look at a rate again, for so many ages.
_NOTICEABLE = 0.5
_AGES_PASSED_OVER = 4


class History:
    """What is remembered of one model."""

    __slots__ = ("age", "counted_s", "expected", "factor", "fast", "gain", "last_s", "requests", "seen", "slow")

    def __init__(self, now: float) -> None:
        self.last_s = now
        self.requests = 0
        #: Everything below is as of this moment.
        self.counted_s = now
        #: Which age it has: a position in ``AGE_EDGES_S``.
        self.age = 0
        #: Requests that the short and the long memory still hold.
        self.fast = 0.0
        self.slow = 0.0
        #: Requests that came, and that were expected, at each age, and what follows from them.
        self.seen = [0.0] * _AGES
        self.expected = [0.0] * _AGES
        self.factor = [1.0] * _AGES
        #: How much better the factors would have predicted the past: a difference of log-likelihoods.
        self.gain = 0.0


class NextUse:
    """Predicts the request rates of models.

    Args:
        short_s: half-life of the short memory.
        long_s: half-life of the long memory.
        now: when its endless memory begins.
    """

    #: No two changes are announced closer together than this.
    STEP_S = 1e-3

    def __init__(self, *, short_s: float, long_s: float, now: float) -> None:
        self._fast_decay = math.log(2) / short_s
        self._slow_decay = math.log(2) / long_s
        self._endless_since_s = now - _PRIOR_S
        #: For each memory: the requests that it has explained, and those that it has promised.
        self._explained = [1.0, 1.0, 1.0]
        self._promised = [3.0, 3.0, 3.0]
        self._weights = (1 / 3, 1 / 3, 1 / 3)
        #: How far step 2 counts, 0..1. It must not where nothing can be preloaded: what is not due yet is to be kept
        #: all the same, as it could not be fetched again.
        self.age_weight = 1.0

    def request(self, known: History, now: float) -> None:
        """The model was asked for."""
        if now > known.counted_s:
            self._count(known, now)
        self._learn(known, now)
        known.fast += 1
        known.slow += 1
        known.requests += 1
        known.last_s = now
        known.age = 0

    def rate(self, known: History, lead_s: float, now: float) -> float:
        """The highest rate, in requests per second, between now and ``lead_s`` seconds from now."""
        if now > known.counted_s:
            self._count(known, now)
        weights, requests = self._weights, known.requests
        rate = (
            weights[0] * self._fast_decay * known.fast
            + weights[1] * self._slow_decay * known.slow
            + weights[2] * (requests + _PRIOR_REQUESTS) / (now - self._endless_since_s)
        )
        if not requests:
            return rate
        age = known.age
        ahead = _ages_until(known, lead_s, now)
        factor = max(known.factor[age:ahead]) if ahead > age + 1 else known.factor[age]
        return rate * (1 + (factor - 1) * self.age_weight * _trust(known.gain))

    def next_fall_s(self, known: History, lead_s: float, now: float) -> float:
        """When ``rate`` may have fallen noticeably, if no request comes."""
        ahead = _ages_until(known, lead_s, now)
        factor = known.factor
        still_fine = _NOTICEABLE * max(factor[known.age : ahead])
        last = ahead - 1
        while factor[last] < still_fine:
            last -= 1
        furthest = min(ahead - 1 + _AGES_PASSED_OVER, _AGES - 1)
        while last < furthest and factor[last + 1] > still_fine:
            last += 1
        return max(known.last_s + AGE_EDGES_S[last + 1], now + self.STEP_S)

    def next_rise_s(self, known: History, lead_s: float, now: float) -> float:
        """When ``rate`` will rise though no request comes; infinite if never."""
        ahead = _ages_until(known, lead_s, now)
        factor = known.factor
        highest = max(factor[known.age : ahead])
        for age in range(ahead, _AGES):
            if factor[age] > highest:
                # Sums of floats do not come out even: without the floor the same rise might be announced for ever.
                return max(known.last_s + AGE_EDGES_S[age] - lead_s, now + self.STEP_S)
        return math.inf

    def _learn(self, known: History, now: float) -> None:
        weights, requests = self._weights, known.requests
        fast = weights[0] * self._fast_decay * known.fast
        slow = weights[1] * self._slow_decay * known.slow
        endless = weights[2] * (requests + _PRIOR_REQUESTS) / (now - self._endless_since_s)
        rate = fast + slow + endless
        explained, promised = self._explained, self._promised
        explained[0] += fast / rate
        explained[1] += slow / rate
        explained[2] += endless / rate
        self._weights = (explained[0] / promised[0], explained[1] / promised[1], explained[2] / promised[2])
        if requests:
            age = known.age
            known.gain = known.gain * _GAIN_KEPT + math.log(known.factor[age])
            known.seen[age] = seen = known.seen[age] + 1
            known.factor[age] = (seen + _FACTOR_PRIOR) / (known.expected[age] + _FACTOR_PRIOR)

    def _count(self, known: History, now: float) -> None:
        """Account for the time since ``counted_s``, age by age, in which no request came."""
        # The hottest loop of the policy: everything in local names.
        since_s, last_s, age = known.counted_s, known.last_s, known.age
        fast, slow, gain = known.fast, known.slow, known.gain
        fast_decay, slow_decay, began_s = -self._fast_decay, -self._slow_decay, self._endless_since_s
        fast_weight, slow_weight, endless_weight = self._weights
        requests = known.requests + _PRIOR_REQUESTS
        seen, expected, factor = known.seen, known.expected, known.factor
        fast_before, slow_before, endless_promised = fast, slow, 0.0
        while since_s < now:
            edge_s = last_s + AGE_EDGES_S[age + 1]
            until_s = edge_s if edge_s < now else now
            if until_s > since_s:
                passed_s = until_s - since_s
                fast_left, slow_left = fast * exp(fast_decay * passed_s), slow * exp(slow_decay * passed_s)
                endless = requests * log((until_s - began_s) / (since_s - began_s))
                endless_promised += endless
                if known.requests:
                    news = (
                        fast_weight * (fast - fast_left) + slow_weight * (slow - slow_left) + endless_weight * endless
                    )
                    gain -= (factor[age] - 1) * news
                    expected[age] += news
                    factor[age] = (seen[age] + _FACTOR_PRIOR) / (expected[age] + _FACTOR_PRIOR)
                fast, slow, since_s = fast_left, slow_left, until_s
            if until_s == edge_s:
                age += 1
        known.counted_s, known.age, known.fast, known.slow, known.gain = now, age, fast, slow, gain
        promised = self._promised
        promised[0] += fast_before - fast
        promised[1] += slow_before - slow
        promised[2] += endless_promised


def _ages_until(known: History, lead_s: float, now: float) -> int:
    """The first age that a model will not have reached in ``lead_s`` seconds without a request."""
    # Sums of floats do not come out even: the age that has been counted already is the truth.
    return max(bisect_right(AGE_EDGES_S, now - known.last_s + lead_s), known.age + 1)


def _trust(gain: float) -> float:
    """How far the factors count, 0..1, after what they would have gained so far."""
    if gain > 30.0:
        return 1.0
    return 1 / (1 + math.exp(-gain)) if gain > -30.0 else 0.0
