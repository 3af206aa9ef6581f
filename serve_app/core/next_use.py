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

#: Where one age ends and the next begins, in seconds: octaves from 4 s, half octaves from 64 s to 12 days.
AGE_EDGES_S = (0.0, 4.0, 8.0, 16.0, 32.0, *(64.0 * 2 ** (step / 2) for step in range(29)), math.inf)
_AGES = len(AGE_EDGES_S) - 1


class History:
    """What is remembered of one model."""

    __slots__ = ("age", "counted_s", "expected", "fast", "gain", "last_s", "requests", "seen", "slow")

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
        #: Requests that came, and that were expected, at each age.
        self.seen = [0.0] * _AGES
        self.expected = [0.0] * _AGES
        #: How much better the factors would have predicted the past: a difference of log-likelihoods.
        self.gain = 0.0


class NextUse:
    """Predicts the request rates of models.

    Args:
        short_s: half-life of the short memory.
        long_s: half-life of the long memory.
        now: when its endless memory begins.
    """

    #: What the endless memory holds of every model from the beginning: so many requests in so many seconds.
    PRIOR_REQUESTS = 0.2
    PRIOR_S = 3600.0
    #: How many requests, seen and expected, a factor starts with; more make it slower to leave 1.
    FACTOR_PRIOR = 0.5
    #: How much of its gain a model keeps with every request.
    GAIN_KEPT = math.exp(-1 / 50)
    #: No two changes are announced closer together than this.
    STEP_S = 1e-3

    def __init__(self, *, short_s: float, long_s: float, now: float) -> None:
        self._fast_decay = math.log(2) / short_s
        self._slow_decay = math.log(2) / long_s
        self._began_s = now
        #: For each memory: the requests that it has explained, and those that it has promised.
        self._explained = [1.0, 1.0, 1.0]
        self._promised = [3.0, 3.0, 3.0]
        #: Rates per request that the memories hold: their weights, in seconds.
        self._fast_weight = self._fast_decay / 3
        self._slow_weight = self._slow_decay / 3
        self._endless_weight = 1 / 3

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

    def look(self, known: History, lead_s: float, now: float) -> tuple[float, float]:
        """The highest rate between now and ``lead_s`` seconds from now, and when to look again if no request comes."""
        if now > known.counted_s:
            self._count(known, now)
        base = (
            self._fast_weight * known.fast
            + self._slow_weight * known.slow
            + self._endless_weight * (known.requests + self.PRIOR_REQUESTS) / (now - self._began_s + self.PRIOR_S)
        )
        age = known.age
        change_s = known.last_s + AGE_EDGES_S[age + 1]
        if known.requests:
            ahead = bisect_right(AGE_EDGES_S, now - known.last_s + lead_s) - 1
            change_s = min(change_s, known.last_s + AGE_EDGES_S[ahead + 1] - lead_s)
            seen, expected, prior = known.seen, known.expected, self.FACTOR_PRIOR
            factor = (seen[age] + prior) / (expected[age] + prior)
            while age < ahead:
                age += 1
                factor = max(factor, (seen[age] + prior) / (expected[age] + prior))
            base *= 1 + (factor - 1) * _trust(known.gain)
        # Sums of floats do not come out even: without the floor the same change might be announced for ever.
        return base, max(change_s, now + self.STEP_S)

    def _learn(self, known: History, now: float) -> None:
        fast, slow = self._fast_weight * known.fast, self._slow_weight * known.slow
        endless = (
            self._endless_weight * (known.requests + self.PRIOR_REQUESTS) / (now - self._began_s + self.PRIOR_S)
        )
        base = fast + slow + endless
        explained, promised = self._explained, self._promised
        explained[0] += fast / base
        explained[1] += slow / base
        explained[2] += endless / base
        self._fast_weight = explained[0] / promised[0] * self._fast_decay
        self._slow_weight = explained[1] / promised[1] * self._slow_decay
        self._endless_weight = explained[2] / promised[2]
        if known.requests:
            age, prior = known.age, self.FACTOR_PRIOR
            factor = (known.seen[age] + prior) / (known.expected[age] + prior)
            known.gain = known.gain * self.GAIN_KEPT + math.log(factor)
            known.seen[age] += 1

    def _count(self, known: History, now: float) -> None:
        """Account for the time since ``counted_s``, age by age, in which no request came."""
        since_s, last_s, promised = known.counted_s, known.last_s, self._promised
        while since_s < now:
            edge_s = last_s + AGE_EDGES_S[known.age + 1]
            until_s = min(now, edge_s)
            passed_s = until_s - since_s
            if passed_s > 0:
                fast = known.fast * math.exp(-self._fast_decay * passed_s)
                slow = known.slow * math.exp(-self._slow_decay * passed_s)
                endless = (known.requests + self.PRIOR_REQUESTS) * passed_s / (until_s - self._began_s + self.PRIOR_S)
                promised[0] += known.fast - fast
                promised[1] += known.slow - slow
                promised[2] += endless
                if known.requests:
                    expected = (
                        self._fast_weight / self._fast_decay * (known.fast - fast)
                        + self._slow_weight / self._slow_decay * (known.slow - slow)
                        + self._endless_weight * endless
                    )
                    age, prior = known.age, self.FACTOR_PRIOR
                    factor = (known.seen[age] + prior) / (known.expected[age] + prior)
                    known.gain -= (factor - 1) * expected
                    known.expected[age] += expected
                known.fast, known.slow = fast, slow
            since_s = until_s
            if until_s >= edge_s:
                known.age += 1
        known.counted_s = now


def _trust(gain: float) -> float:
    """How far the factors count, 0..1, after what they would have gained so far."""
    if gain > 30.0:
        return 1.0
    return 1 / (1 + math.exp(-gain)) if gain > -30.0 else 0.0
