"""Eviction policies: what each remembers of the requests, and the one number by which it ranks.

A policy never owns a cache and never evicts. ``ModelCache`` tells it what happened and asks for ``utility``; the model
with the lowest utility goes first. To add one: write the class, add a line to ``POLICIES``.
"""

from __future__ import annotations

import inspect
import random
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Mapping

from serve_app.core.catalog import ModelProfile
from serve_app.core.popularity import DecayedRate


class EvictionPolicy(ABC):
    """The hooks that a policy may use; every one but ``utility`` may stay empty. All times are seconds."""

    def on_request(self, model: ModelProfile, now: float) -> None:
        """``model`` was asked for, whether or not it is resident."""

    def on_load(self, model: ModelProfile, now: float) -> None:
        """``model`` takes up memory from now on."""

    def on_evict(self, model: ModelProfile, now: float) -> None:
        """``model`` was displaced by another one and no longer takes up memory."""

    def on_unload(self, model: ModelProfile, now: float) -> None:
        """``model`` no longer takes up memory for any other reason: its load failed, or it was unloaded by hand."""

    def on_forward_costs(self, forward_s: Mapping[str, float]) -> None:
        """Models that other locations hold, and the extra seconds that a request forwarded there takes."""

    @abstractmethod
    def utility(self, model: ModelProfile, now: float) -> float:
        """What keeping ``model`` is worth; only the order of the numbers matters."""


class Lru(EvictionPolicy):
    """Evicts the model whose last request lies furthest back."""

    def __init__(self, _rng: random.Random) -> None:
        self._clock = 0
        self._last_use: dict[str, int] = {}

    def on_request(self, model: ModelProfile, now: float) -> None:
        self._clock += 1
        self._last_use[model.model_id] = self._clock

    def utility(self, model: ModelProfile, now: float) -> float:
        return self._last_use.get(model.model_id, 0)


class Lfu(EvictionPolicy):
    """Evicts the model with the fewest requests ever."""

    def __init__(self, _rng: random.Random) -> None:
        self._requests: Counter[str] = Counter()

    def on_request(self, model: ModelProfile, now: float) -> None:
        self._requests[model.model_id] += 1

    def utility(self, model: ModelProfile, now: float) -> float:
        return self._requests[model.model_id]


class Gdsf(EvictionPolicy):
    """GreedyDual-Size-Frequency (Cherkasova, HP Labs 1998): age + frequency x load time / size.

    Frequency counts requests since the model was loaded; age is the utility of the last victim.
    """

    def __init__(self, _rng: random.Random) -> None:
        self._age = 0.0
        self._requests: Counter[str] = Counter()
        self._utility: dict[str, float] = {}

    def on_request(self, model: ModelProfile, now: float) -> None:
        self._requests[model.model_id] += 1
        self._utility[model.model_id] = self._age + self._requests[model.model_id] * model.load_s / model.size_bytes

    def on_evict(self, model: ModelProfile, now: float) -> None:
        self._age = max(self._age, self.utility(model, now))
        self.on_unload(model, now)

    def on_unload(self, model: ModelProfile, now: float) -> None:
        self._utility.pop(model.model_id, None)
        del self._requests[model.model_id]

    def utility(self, model: ModelProfile, now: float) -> float:
        return self._utility.get(model.model_id, self._age)


class Random(EvictionPolicy):
    """Evicts any model, each with the same chance."""

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng

    def utility(self, model: ModelProfile, now: float) -> float:
        return self._rng.random()


class BeladyAmOnline(EvictionPolicy):
    """The online form of "Many Models at the Edge" (ACSOS 2021): share of all requests x load time / size."""

    def __init__(self, _rng: random.Random) -> None:
        self._requests: Counter[str] = Counter()

    def on_request(self, model: ModelProfile, now: float) -> None:
        self._requests[model.model_id] += 1

    def utility(self, model: ModelProfile, now: float) -> float:
        # The common divisor, all requests so far, does not change the order.
        return self._requests[model.model_id] * model.load_s / model.size_bytes


class EdgeServe(EvictionPolicy):
    """Seconds saved per second and byte: decayed request rate x cost of losing the model / size.

    Losing a model costs its load, or the forward to the next location that holds it, whichever is less: duplicates
    go before last copies.
    """

    def __init__(self, _rng: random.Random, *, half_life_s: float = 600.0) -> None:
        if half_life_s <= 0:
            raise ValueError(f"half_life_s must be positive, not {half_life_s}")
        self._half_life_s = half_life_s
        self._rates: dict[str, DecayedRate] = {}
        self._forward_s: Mapping[str, float] = {}

    def on_request(self, model: ModelProfile, now: float) -> None:
        if model.model_id not in self._rates:
            self._rates[model.model_id] = DecayedRate(self._half_life_s)
        self._rates[model.model_id].add(now)

    def on_forward_costs(self, forward_s: Mapping[str, float]) -> None:
        self._forward_s = forward_s

    def utility(self, model: ModelProfile, now: float) -> float:
        rate = self._rates.get(model.model_id)
        if rate is None:
            return 0.0
        lost_s = min(model.load_s, self._forward_s.get(model.model_id, model.load_s))
        return rate.per_s(now) * lost_s / model.size_bytes


POLICIES: dict[str, Callable[..., EvictionPolicy]] = {
    "lru": Lru,
    "lfu": Lfu,
    "gdsf": Gdsf,
    "random": Random,
    "belady-am-online": BeladyAmOnline,
    "edgeserve": EdgeServe,
}


def make_policy(name: str, rng: random.Random, **parameters: float) -> EvictionPolicy:
    """A fresh policy by its name in ``POLICIES``.

    Raises:
        ValueError: no such policy, or a parameter that it does not take.
    """
    taken = policy_parameters(name)
    for unknown in sorted(parameters.keys() - set(taken)):
        raise ValueError(f"policy {name!r} does not take {unknown}; it takes {', '.join(taken) or 'no parameters'}")
    return POLICIES[name](rng, **parameters)


def policy_parameters(name: str) -> tuple[str, ...]:
    """The parameters that a policy takes beside its source of chance.

    Raises:
        ValueError: no such policy.
    """
    if name not in POLICIES:
        raise ValueError(f"unknown policy {name!r}; there are {', '.join(POLICIES)}")
    return tuple(inspect.signature(POLICIES[name]).parameters)[1:]
