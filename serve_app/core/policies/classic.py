"""The policies of the literature and of other systems, to compare with."""

from __future__ import annotations

import math
import random
from collections import Counter, OrderedDict
from collections.abc import Iterable

from serve_app.core.catalog import ModelProfile
from serve_app.core.policies.base import EvictionPolicy


class Fifo(EvictionPolicy):
    """Evicts the model that was loaded first."""

    def __init__(self, _rng: random.Random) -> None:
        self._clock = 0
        self._loaded: dict[str, int] = {}

    def on_load(self, model: ModelProfile, now: float) -> None:
        self._clock += 1
        self._loaded[model.model_id] = self._clock

    def on_evict(self, model: ModelProfile, now: float) -> None:
        self.on_unload(model, now)

    def on_unload(self, model: ModelProfile, now: float) -> None:
        self._loaded.pop(model.model_id, None)

    def utility(self, model: ModelProfile, now: float) -> float:
        return self._loaded.get(model.model_id, 0)


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


class ModelMesh(Lru):
    """LRU that lets no model go within ``churn_age_s`` of its load while an older one can go instead.

    After KServe ModelMesh (``min_churn_age_ms``, ten minutes by default), whose cache may not turn over faster than
    that. ModelMesh refuses the load that would make it do so; here a request is never refused for it.
    """

    def __init__(self, rng: random.Random, *, churn_age_s: float = 600.0) -> None:
        if churn_age_s <= 0:
            raise ValueError(f"churn_age_s must be positive, not {churn_age_s}")
        super().__init__(rng)
        self._churn_age_s = churn_age_s
        self._guarded: OrderedDict[str, float] = OrderedDict()

    def on_load(self, model: ModelProfile, now: float) -> None:
        self._guarded[model.model_id] = now + self._churn_age_s
        self._guarded.move_to_end(model.model_id)

    def on_evict(self, model: ModelProfile, now: float) -> None:
        self.on_unload(model, now)

    def on_unload(self, model: ModelProfile, now: float) -> None:
        self._guarded.pop(model.model_id, None)

    def utility(self, model: ModelProfile, now: float) -> float:
        # Far above the number of requests that a cache ever sees, yet exact with any of them added.
        guard = 2.0**52 if model.model_id in self._guarded else 0.0
        return guard + super().utility(model, now)

    def lowered(self, now: float) -> Iterable[str]:
        lowered = []
        while self._guarded and next(iter(self._guarded.values())) <= now:
            lowered.append(self._guarded.popitem(last=False)[0])
        return lowered


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

    Frequency counts requests since the model was loaded; age is the utility of the last victim. Victims go before the
    new model is ranked, with the age that they leave behind: a serving cache cannot refuse what it is asked for.
    """

    def __init__(self, _rng: random.Random) -> None:
        self._age = 0.0
        self._requests: Counter[str] = Counter()
        self._utility: dict[str, float] = {}

    def on_request(self, model: ModelProfile, now: float) -> None:
        self._requests[model.model_id] += 1
        self._rise(model)

    def on_load(self, model: ModelProfile, now: float) -> None:
        # The victims that made room for it have raised the age since its request.
        self._rise(model)

    def on_evict(self, model: ModelProfile, now: float) -> None:
        self._age = max(self._age, self.utility(model, now))
        self.on_unload(model, now)

    def on_unload(self, model: ModelProfile, now: float) -> None:
        self._utility.pop(model.model_id, None)
        del self._requests[model.model_id]

    def utility(self, model: ModelProfile, now: float) -> float:
        return self._utility.get(model.model_id, self._age)

    def _rise(self, model: ModelProfile) -> None:
        self._utility[model.model_id] = self._age + self._requests[model.model_id] * model.load_s / model.size_bytes


class Random(EvictionPolicy):
    """Evicts any model, each with the same probability.

    Every model lives for a time that is drawn from the exponential distribution, and the first to die is evicted. What
    is left of such a life has the same distribution at every moment, however long it has lasted: all have the same
    probability, whenever they came.
    """

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng
        self._clock = 0.0
        self._dies: dict[str, float] = {}

    def on_request(self, model: ModelProfile, now: float) -> None:
        # It was spared when its time came because it was in use.
        if self._dies.get(model.model_id, math.inf) < self._clock:
            self.on_load(model, now)

    def on_load(self, model: ModelProfile, now: float) -> None:
        self._dies[model.model_id] = self._clock + self._rng.expovariate(1.0)

    def on_evict(self, model: ModelProfile, now: float) -> None:
        self._clock = max(self._clock, self.utility(model, now))
        self.on_unload(model, now)

    def on_unload(self, model: ModelProfile, now: float) -> None:
        self._dies.pop(model.model_id, None)

    def utility(self, model: ModelProfile, now: float) -> float:
        return self._dies.get(model.model_id, 0.0)


class LoadTime(EvictionPolicy):
    """Evicts the model that is loaded again soonest."""

    def __init__(self, _rng: random.Random) -> None:
        pass

    def utility(self, model: ModelProfile, now: float) -> float:
        return model.load_s


class BeladyAmOnline(EvictionPolicy):
    """The online form of "Many Models at the Edge" (ACSOS 2021): share of all requests x load time / size."""

    trim_victims = True

    def __init__(self, _rng: random.Random) -> None:
        self._requests: Counter[str] = Counter()

    def on_request(self, model: ModelProfile, now: float) -> None:
        self._requests[model.model_id] += 1

    def utility(self, model: ModelProfile, now: float) -> float:
        # The common divisor, all requests so far, does not change the order.
        return self._requests[model.model_id] * model.load_s / model.size_bytes
