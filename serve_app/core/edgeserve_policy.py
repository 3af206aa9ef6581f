"""EdgeServe's own policy: keep what is about to save the most time per byte, and fetch it before it is asked for."""

from __future__ import annotations

import heapq
import math
import random
from collections.abc import Iterable, Mapping, Sequence

from serve_app.core.catalog import ModelProfile
from serve_app.core.eviction_policy import EvictionPolicy
from serve_app.core.next_use import History, NextUse
from serve_app.core.ranking import Ranking


class _Known:
    """What the policy keeps of one model; ``worth`` is in seconds saved per second and byte."""

    __slots__ = ("due_s", "history", "model", "resident", "worth")

    def __init__(self, model: ModelProfile, now: float) -> None:
        self.model = model
        self.history = History(now)
        self.worth = 0.0
        self.resident = False
        #: When the worth is to be looked at again.
        self.due_s = math.inf


class EdgeServe(EvictionPolicy):
    """Seconds saved per second and byte: predicted request rate x cost of absence / size.

    The rate is that of ``NextUse``, at its highest within the time that a load takes. The cost of absence is a load,
    or the forward to the next location that holds the model, whichever is less: duplicates go before last copies.

    Args:
        short_s: half-life of the short memory of request rates; what a session is.
        long_s: half-life of the long memory.
        margin: an absent model is preloaded when it is worth this many times what must go for it.
        review_every_s: the least time between two rounds of preloads.
    """

    spares_small = True

    def __init__(
        self,
        _rng: random.Random,
        *,
        short_s: float = 100.0,
        long_s: float = 86400.0,
        margin: float = 1.5,
        review_every_s: float = 1.0,
    ) -> None:
        for name, value in (("short_s", short_s), ("long_s", long_s), ("review_every_s", review_every_s)):
            if value <= 0:
                raise ValueError(f"{name} must be positive, not {value}")
        if margin < 1:
            raise ValueError(f"margin must be at least 1, not {margin}")
        self._short_s, self._long_s = short_s, long_s
        self._margin = margin
        self._review_every_s = review_every_s
        self._next_use: NextUse | None = None
        self._known: dict[str, _Known] = {}
        self._forward_s: Mapping[str, float] = {}
        self._absent = Ranking(lambda model, now: -self.utility(model, now))
        #: When to look at which model again. Of several entries for one model, that with its ``due_s`` counts.
        self._agenda: list[tuple[float, str]] = []
        self._fallen: list[str] = []
        self.review_s = math.inf

    # What happens

    def on_catalog(self, models: Iterable[ModelProfile], now: float) -> None:
        for model in models:
            self._look_at(self._meet(model, now), now)

    def on_request(self, model: ModelProfile, now: float) -> None:
        known = self._known.get(model.model_id) or self._meet(model, now)
        self._predictor(now).request(known.history, now)
        self._look_at(known, now)

    def on_load(self, model: ModelProfile, now: float) -> None:
        known = self._known.get(model.model_id) or self._meet(model, now)
        known.resident = True
        self._absent.take(model.model_id)

    def on_evict(self, model: ModelProfile, now: float) -> None:
        self.on_unload(model, now)

    def on_unload(self, model: ModelProfile, now: float) -> None:
        known = self._known.get(model.model_id) or self._meet(model, now)
        known.resident = False
        self._absent.add(model, now)
        self._review_at(now + self._review_every_s)

    def on_forward_costs(self, forward_s: Mapping[str, float]) -> None:
        before, self._forward_s = self._forward_s, dict(forward_s)
        for model_id in before.keys() | forward_s.keys():
            known = self._known.get(model_id)
            if known is not None and before.get(model_id) != forward_s.get(model_id):
                self._value(known, known.worth * known.model.size_bytes / max(_cost_s(known.model, before), 1e-12))

    # What it is worth

    def utility(self, model: ModelProfile, now: float) -> float:
        known = self._known.get(model.model_id)
        return known.worth if known else 0.0

    def fallen(self, now: float) -> Iterable[str]:
        self._review(now)
        fallen, self._fallen = self._fallen, []
        return fallen

    def wishes(self, now: float) -> Iterable[ModelProfile]:
        self._review(now)
        self.review_s = math.inf
        if self._agenda:
            self._review_at(max(now + self._review_every_s, self._agenda[0][0]))
        best = self._absent.pop(now)
        if best is None:
            return ()
        self._absent.put_back(best)
        return (best.model,) if best.key < 0 else ()

    def worthwhile(self, model: ModelProfile, victims: Sequence[ModelProfile], now: float) -> bool:
        gain = self.utility(model, now) * model.size_bytes
        loss = sum(self.utility(victim, now) * victim.size_bytes for victim in victims)
        if gain <= self._margin * loss:
            return False
        self.review_s = now
        return True

    # How it is kept up to date

    def _review(self, now: float) -> None:
        """Look again at every model whose time has come."""
        agenda = self._agenda
        while agenda and agenda[0][0] <= now:
            at_s, model_id = heapq.heappop(agenda)
            known = self._known[model_id]
            if known.due_s == at_s:
                self._look_at(known, now)

    def _look_at(self, known: _Known, now: float) -> None:
        model = known.model
        rate, due_s = self._predictor(now).look(known.history, model.load_s, now)
        self._value(known, rate)
        known.due_s = due_s
        if due_s < math.inf:
            heapq.heappush(self._agenda, (due_s, model.model_id))
            if due_s < self.review_s:
                self.review_s = due_s

    def _value(self, known: _Known, rate: float) -> None:
        before, known.worth = known.worth, rate * _cost_s(known.model, self._forward_s) / known.model.size_bytes
        if known.resident:
            if known.worth < before:
                self._fallen.append(known.model.model_id)
        elif known.worth > before:
            self._absent.renew(known.model.model_id, known.history.counted_s)

    def _meet(self, model: ModelProfile, now: float) -> _Known:
        known = self._known.get(model.model_id)
        if known is None:
            known = self._known[model.model_id] = _Known(model, now)
            self._absent.add(model, now)
        return known

    def _predictor(self, now: float) -> NextUse:
        if self._next_use is None:
            self._next_use = NextUse(short_s=self._short_s, long_s=self._long_s, now=now)
        return self._next_use

    def _review_at(self, at_s: float) -> None:
        self.review_s = min(self.review_s, at_s)


def _cost_s(model: ModelProfile, forward_s: Mapping[str, float]) -> float:
    return min(model.load_s, forward_s.get(model.model_id, model.load_s))
