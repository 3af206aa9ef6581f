"""Predicts how likely a request for each model is in the next moment, from the requests so far.

The prediction for one model is a rate, requests per second, built in two steps:

1. *How often?* A mixture of three request rates of the model: a short-term and a long-term one, which decay with
   half-lives, and the all-time rate. The weight of each is learned from all models together, by
   expectation-maximization: a rate earns weight by having been high for a model when a request came for that model, and
   loses weight by promising requests that do not come. Sessions give weight to the short-term rate, steady popularity
   to the all-time rate. A model without any request has the small rate of the prior of the all-time rate.
2. *How long since the last request?* A factor for the model's age, the time since its last request, learned for each
   model by itself. Over ages of about the same length the factor compares the requests that came with those that step 1
   expected (a gamma-Poisson estimate, which starts at 1). So a timer is predicted when it is due and at no other time,
   and after a burst the rate is known to have fallen. The factor counts as far as it would have predicted the model's
   past better than step 1 alone.
"""

from __future__ import annotations

import math
from array import array
from copy import copy
from math import exp, log

#: Where one age ends and the next begins, in seconds: at 16 and 32 s, and half octaves from 64 s to 12 days.
AGE_EDGES_S = (0.0, 16.0, 32.0, *(64.0 * 2 ** (step / 2) for step in range(29)), math.inf)
_AGES = len(AGE_EDGES_S) - 1
#: The prior of the all-time rate of every model: so many requests in so many seconds.
_PRIOR_REQUESTS = 0.2
_PRIOR_S = 3600.0
#: How many requests, seen and expected, a factor starts with; more make it slower to leave 1.
_FACTOR_PRIOR = 0.5
#: How much of its gain a model keeps with every request.
_GAIN_KEPT = math.exp(-1 / 50)
#: A factor that falls to more than this share of itself is no reason to compute a rate again, for so many ages.
_NOTICEABLE = 0.5
_AGES_PASSED_OVER = 4


class RequestHistory:
    """What the forecast keeps of one model."""

    __slots__ = (
        "age", "ahead", "counted_s", "expected", "factor", "fast", "fast_left", "gain", "highest", "last_s", "lead_s",
        "requests", "seen", "slow", "slow_left",
    )  # fmt: skip

    def __init__(self, now: float) -> None:
        self.last_s = now
        self.requests = 0
        #: Decayed counts of requests, short-term and long-term, right after the last request.
        self.fast = 0.0
        self.slow = 0.0
        #: Everything below is as of this moment.
        self.counted_s = now
        #: The shares of the counts that have not decayed since.
        self.fast_left = 1.0
        self.slow_left = 1.0
        #: The age of the model: a position in ``AGE_EDGES_S``.
        self.age = 0
        #: Requests that came, and that were expected, at each age, and the factors that follow from them.
        #: Arrays, because with thousands of models it counts in how many places of memory they lie.
        self.seen = array("d", [0.0]) * _AGES
        self.expected = array("d", [0.0]) * _AGES
        self.factor = array("d", [1.0]) * _AGES
        #: How much better the factors would have predicted the past: a difference of log-likelihoods.
        self.gain = 0.0
        #: How far ahead ``rate`` looked last, the first age that lay further ahead, and the highest factor before it.
        self.lead_s = 0.0
        self.ahead = 1
        self.highest = 1.0


class RateForecast:
    """Predicts the request rates of models.

    Args:
        short_s: half-life of the short-term rate.
        long_s: half-life of the long-term rate.
        now: when the all-time rate begins.
    """

    #: No two changes are announced closer together than this.
    STEP_S = 1e-3

    def __init__(self, *, short_s: float, long_s: float, now: float) -> None:
        self._fast_decay = math.log(2) / short_s
        self._slow_decay = math.log(2) / long_s
        self._all_time_since_s = now - _PRIOR_S
        #: Where each age ends, and the shares of the short-term and the long-term count that have not decayed then.
        self._ends = tuple(
            (end_s, exp(-self._fast_decay * end_s), exp(-self._slow_decay * end_s)) for end_s in AGE_EDGES_S[1:]
        )
        #: For each of the three rates: the requests that it has explained, and those that it has promised.
        self._explained = [1.0, 1.0, 1.0]
        self._promised = [3.0, 3.0, 3.0]
        self._weights = (1 / 3, 1 / 3, 1 / 3)
        #: How far step 2 counts, 0..1. It must not where nothing is preloaded: a model that is not due yet must stay,
        #: because nothing would load it again in time.
        self.age_weight = 1.0

    def request(self, known: RequestHistory, now: float) -> None:
        """Take in a request for the model."""
        if now > known.counted_s:
            self._count(known, now)
        self._learn(known, now)
        known.fast = known.fast * known.fast_left + 1
        known.slow = known.slow * known.slow_left + 1
        known.fast_left = known.slow_left = 1.0
        known.requests += 1
        known.last_s = now
        known.age = 0

    def hand_over(self, known: RequestHistory, successor: RequestHistory, now: float) -> None:
        """Take the requests for one model as requests for another, which comes in its place."""
        for each in (known, successor):
            if now > each.counted_s:
                self._count(each, now)
        if not successor.requests:
            # When requests come is known of a model that has had some.
            for name in ("expected", "factor", "gain", "last_s", "seen"):
                setattr(successor, name, copy(getattr(known, name)))
        later = max(known, successor, key=lambda each: each.last_s)
        last_s, successor.age = later.last_s, later.age
        successor.fast = sum(each.fast * exp(self._fast_decay * (each.last_s - last_s)) for each in (known, successor))
        successor.slow = sum(each.slow * exp(self._slow_decay * (each.last_s - last_s)) for each in (known, successor))
        successor.last_s, successor.fast_left, successor.slow_left = last_s, later.fast_left, later.slow_left
        successor.requests += known.requests
        RequestHistory.__init__(known, now)

    def rate(self, known: RequestHistory, lead_s: float, now: float) -> float:
        """The highest rate, in requests per second, between now and ``lead_s`` seconds from now."""
        if now > known.counted_s:
            self._count(known, now)
        fast_weight, slow_weight, all_time_weight = self._weights
        requests = known.requests
        rate = (
            fast_weight * self._fast_decay * known.fast * known.fast_left
            + slow_weight * self._slow_decay * known.slow * known.slow_left
            + all_time_weight * (requests + _PRIOR_REQUESTS) / (now - self._all_time_since_s)
        )
        if not requests:
            return rate
        factor = known.factor
        highest, ahead, until_s = factor[known.age], known.age + 1, now + lead_s - known.last_s
        while AGE_EDGES_S[ahead] <= until_s:
            if factor[ahead] > highest:
                highest = factor[ahead]
            ahead += 1
        known.lead_s, known.ahead, known.highest = lead_s, ahead, highest
        gain = known.gain
        # How far the factors count, 0..1, after what they would have gained so far.
        trust = 1.0 if gain > 30.0 else 1 / (1 + exp(-gain)) if gain > -30.0 else 0.0
        return rate * (1 + (highest - 1) * self.age_weight * trust)

    def next_fall_s(self, known: RequestHistory, now: float) -> float:
        """When ``rate`` may fall noticeably below what it was last, if no request comes."""
        if not known.requests:
            # The all-time rate falls as time passes, and by half while its time doubles.
            return now + (now - self._all_time_since_s)
        ahead, factor = known.ahead, known.factor
        lowest = _NOTICEABLE * known.highest
        last = ahead - 1
        while factor[last] < lowest:
            last -= 1
        furthest = min(ahead - 1 + _AGES_PASSED_OVER, _AGES - 1)
        while last < furthest and factor[last + 1] > lowest:
            last += 1
        return max(known.last_s + AGE_EDGES_S[last + 1], now + self.STEP_S)

    def next_rise_s(self, known: RequestHistory, now: float) -> float:
        """When ``rate`` will rise above what it was last though no request comes; infinite if never."""
        highest = known.highest
        for age, factor in enumerate(known.factor[known.ahead :], known.ahead):
            if factor > highest:
                # Sums of floats do not come out even: without the floor the same rise might be announced for ever.
                return max(known.last_s + AGE_EDGES_S[age] - known.lead_s, now + self.STEP_S)
        return math.inf

    def _learn(self, known: RequestHistory, now: float) -> None:
        weights, requests = self._weights, known.requests
        fast = weights[0] * self._fast_decay * known.fast * known.fast_left
        slow = weights[1] * self._slow_decay * known.slow * known.slow_left
        all_time = weights[2] * (requests + _PRIOR_REQUESTS) / (now - self._all_time_since_s)
        rate = fast + slow + all_time
        explained, promised = self._explained, self._promised
        explained[0] += fast / rate
        explained[1] += slow / rate
        explained[2] += all_time / rate
        self._weights = (explained[0] / promised[0], explained[1] / promised[1], explained[2] / promised[2])
        if requests:
            age = known.age
            known.gain = known.gain * _GAIN_KEPT + log(known.factor[age])
            known.seen[age] = seen = known.seen[age] + 1
            known.factor[age] = (seen + _FACTOR_PRIOR) / (known.expected[age] + _FACTOR_PRIOR)

    def _count(self, known: RequestHistory, now: float) -> None:
        """Account for the time since ``counted_s``, age by age, in which no request came."""
        since_s, known.counted_s = known.counted_s, now
        promised = self._promised
        # Over the time in question the all-time rate is taken to promise evenly.
        all_time = (known.requests + _PRIOR_REQUESTS) / ((since_s + now) / 2 - self._all_time_since_s)
        promised[2] += all_time * (now - since_s)
        if not known.requests:
            return
        last_s, fast, slow = known.last_s, known.fast, known.slow
        fast_left_before, slow_left_before = known.fast_left, known.slow_left
        now_s = now - last_s
        known.fast_left = fast_left = exp(-self._fast_decay * now_s)
        known.slow_left = slow_left = exp(-self._slow_decay * now_s)
        promised[0] += fast * (fast_left_before - fast_left)
        promised[1] += slow * (slow_left_before - slow_left)

        # The hottest loop of the policy: everything in local names. What is left of a promise at one moment less what
        # is left at another was promised in between.
        fast_weight, slow_weight, all_time_weight = self._weights
        fast, slow, all_time = fast * fast_weight, slow * slow_weight, all_time * all_time_weight
        left = fast * fast_left_before + slow * slow_left_before - all_time * (since_s - last_s)
        seen, expected, factor = known.seen, known.expected, known.factor
        ends, age, gain = self._ends, known.age, known.gain
        end_s, fast_left_then, slow_left_then = ends[age]
        while end_s <= now_s:
            left_then = fast * fast_left_then + slow * slow_left_then - all_time * end_s
            gain -= (factor[age] - 1) * (left - left_then)
            expected[age] = so_far = expected[age] + left - left_then
            factor[age] = (seen[age] + _FACTOR_PRIOR) / (so_far + _FACTOR_PRIOR)
            left = left_then
            age += 1
            end_s, fast_left_then, slow_left_then = ends[age]
        left_then = fast * fast_left + slow * slow_left - all_time * now_s
        known.gain = gain - (factor[age] - 1) * (left - left_then)
        expected[age] = so_far = expected[age] + left - left_then
        factor[age] = (seen[age] + _FACTOR_PRIOR) / (so_far + _FACTOR_PRIOR)
        known.age = age
