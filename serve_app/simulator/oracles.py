"""The policies that know the future, against which all others are measured."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from serve_app.core.catalog import ModelProfile
from serve_app.core.policies.base import EvictionPolicy


def next_uses(models: Sequence[int]) -> list[float]:
    """Return for every request of a stream of model numbers the position of the next for its model, or infinity."""
    following: dict[int, float] = {}
    found = [math.inf] * len(models)
    for position in range(len(models) - 1, -1, -1):
        model = models[position]
        found[position] = following.get(model, math.inf)
        following[model] = position
    return found


class _Oracle(EvictionPolicy):
    """Knows at every request when the model is requested next.

    Args:
        next_use: for every request to this cache, in order; see ``next_uses``.
    """

    def __init__(self, next_use: Sequence[float]) -> None:
        self._upcoming = enumerate(next_use)
        self._position = 0
        self._next_use: dict[str, float] = {}

    def on_request(self, model: ModelProfile, now: float) -> None:
        self._position, self._next_use[model.model_id] = next(self._upcoming)


class Belady(_Oracle):
    """Evicts the model whose next use lies furthest ahead (Belady, IBM Systems Journal 1966)."""

    def __init__(self, next_use: Sequence[float]) -> None:
        super().__init__(next_use)
        self._requested: list[str] = []

    def on_request(self, model: ModelProfile, now: float) -> None:
        super().on_request(model, now)
        self._requested.append(model.model_id)

    def utility(self, model: ModelProfile, now: float) -> float:
        return -self._next_use.get(model.model_id, math.inf)

    def lowered(self, now: float) -> Iterable[str]:
        requested, self._requested = self._requested, []
        return requested


class BeladyAm(_Oracle):
    """BeladyAM, "Belady amortized" ("Many Models at the Edge", ACSOS 2021, b = c = 1): load time / size / distance.

    The distance is the number of requests until the next use. As it shrinks for all models at once, their order
    changes all the time, and each decision looks at every resident model.
    """

    trim_victims = True

    def __init__(self, next_use: Sequence[float]) -> None:
        super().__init__(next_use)
        self._resident: dict[str, None] = {}

    def on_load(self, model: ModelProfile, now: float) -> None:
        self._resident[model.model_id] = None

    def on_evict(self, model: ModelProfile, now: float) -> None:
        self.on_unload(model, now)

    def on_unload(self, model: ModelProfile, now: float) -> None:
        self._resident.pop(model.model_id, None)

    def utility(self, model: ModelProfile, now: float) -> float:
        distance = self._next_use.get(model.model_id, math.inf) - self._position
        return model.load_s / model.size_bytes / max(1.0, distance)

    def lowered(self, now: float) -> Iterable[str]:
        return tuple(self._resident)
