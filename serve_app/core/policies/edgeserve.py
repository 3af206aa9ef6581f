"""EdgeServe's own policy: keep what is about to save the most time per byte, and load it before the first request."""

from __future__ import annotations

import heapq
import math
import random
from collections.abc import Iterable, Mapping

from serve_app.core.catalog import ModelProfile
from serve_app.core.forms import Surplus, surplus
from serve_app.core.policies.absent_models import AbsentModels
from serve_app.core.policies.base import EvictionPolicy, PreloadCandidates
from serve_app.core.policies.rate_forecast import RateForecast, RequestHistory


class _TrackedModel(RequestHistory):
    """What the policy keeps of one model besides; ``utility`` is in seconds saved per second and byte.

    ``utility`` is that of ``model``, the form in which it is loaded.
    """

    __slots__ = (
        "due_s", "entry_s", "form", "model", "per_rate", "rate", "requested", "resident", "updated_s", "utility",
        "utility_per_rate",
    )  # fmt: skip

    def __init__(self, model: ModelProfile, now: float) -> None:
        super().__init__(now)
        self.model = model
        self.utility = 0.0
        self.utility_per_rate = 0.0
        #: Requests per second as of ``updated_s``.
        self.rate = 0.0
        #: The form that it has in memory, if that is another one, and the least that any part of that is worth.
        self.form: ModelProfile | None = None
        self.per_rate = 0.0
        self.resident = False
        #: When the utility was computed, and whether a request has come since.
        self.updated_s = now
        self.requested = True
        #: When the utility is to be computed again, and the time of its entry in the schedule, which may be earlier.
        self.due_s = math.inf
        self.entry_s = math.inf


class EdgeServe(EvictionPolicy):
    """Seconds saved per second and byte: predicted request rate x cost of absence / size.

    The rate is that of ``RateForecast``, at its highest within the time that a load takes. The cost of absence is a
    load, or the forward to the next location that holds the model, whichever is less: duplicates leave before last
    copies. ``AbsentModels`` chooses the preloads.

    The surplus of a faster form over the form in which a model is loaded saves what its executions are shorter.

    Args:
        short_s: half-life of the short-term request rate; the length of a session.
        long_s: half-life of the long-term request rate.
        margin: an absent model is preloaded when it is worth this many times what must leave for it.
        review_every_s: the least time between two rounds of preloads.
    """

    trim_victims = True

    #: Time constant of the share of time in which background loads kept up.
    BUSY_MEMORY_S = 600.0

    def __init__(
        self,
        _rng: random.Random,
        *,
        short_s: float = 60.0,
        long_s: float = 86400.0,
        margin: float = 2.0,
        review_every_s: float = 4.0,
    ) -> None:
        for name, value in (("short_s", short_s), ("long_s", long_s), ("review_every_s", review_every_s)):
            if value <= 0:
                raise ValueError(f"{name} must be positive, not {value}")
        if margin < 1:
            raise ValueError(f"margin must be at least 1, not {margin}")
        self._short_s, self._long_s = short_s, long_s
        self._margin = margin
        self._review_every_s = review_every_s
        self._preloads = True
        self._forecast: RateForecast | None = None
        self._tracked: dict[str, _TrackedModel] = {}
        self._forward_s: Mapping[str, float] = {}
        self._absent = AbsentModels(self.utility, margin)
        #: When preload candidates were last asked for.
        self._last_round_s = 0.0
        #: Changes that have not been taken in: residents that were requested or loaded count when a victim is sought,
        #: absent models that were requested, met or displaced not before the next round of preloads.
        self._changed_residents: dict[str, _TrackedModel] = {}
        self._changed_absent: dict[str, _TrackedModel] = {}
        #: When to compute which utility again though nothing happens to the model. Of several entries for one model,
        #: that of its ``entry_s`` counts.
        self._schedule: list[tuple[float, str]] = []
        #: Residents of lower utility, in order; named once, however often they fell.
        self._lowered: dict[str, None] = {}
        self.next_review_s = math.inf

    # Hooks

    def on_start(self, *, preloads: bool) -> None:
        self._preloads = preloads

    def on_catalog(self, models: Iterable[ModelProfile], now: float) -> None:
        for model in models:
            self._meet(model, now)
        self._review_by(now)

    def on_request(self, model: ModelProfile, now: float) -> None:
        tracked = self._tracked.get(model.model_id) or self._meet(model, now)
        if tracked.model is not model:
            self._set_profile(tracked, model)
        (self._forecast or self._make_forecast(now)).request(tracked, now)
        tracked.requested = True
        if tracked.resident:
            self._changed_residents[model.model_id] = tracked
        else:
            self._changed_absent[model.model_id] = tracked
        self._review_by(now + self._review_every_s)

    def on_load(self, model: ModelProfile, now: float) -> None:
        tracked = self._tracked.get(model.model_id) or self._meet(model, now)
        tracked.resident, tracked.form, tracked.per_rate = True, None, tracked.utility_per_rate
        self._changed_absent.pop(model.model_id, None)
        self._changed_residents[model.model_id] = tracked
        self._absent.remove(model, now)

    def on_exchange(self, model: ModelProfile, other: ModelProfile, now: float) -> None:
        tracked = self._tracked.get(model.model_id) or self._meet(model, now)
        tracked.form = other if other.tier else None
        self._set_per_rate(tracked)
        if tracked.resident:
            self._absent.resident_lowered(tracked.rate * tracked.per_rate)

    def on_evict(self, model: ModelProfile, now: float) -> None:
        self.on_unload(model, now)

    def on_unload(self, model: ModelProfile, now: float) -> None:
        tracked = self._tracked.get(model.model_id) or self._meet(model, now)
        tracked.resident, tracked.form = False, None
        self._changed_residents.pop(model.model_id, None)
        self._changed_absent[model.model_id] = tracked
        self._review_by(now + self._review_every_s)

    def on_forward_costs(self, forward_s: Mapping[str, float]) -> None:
        before, self._forward_s = self._forward_s, dict(forward_s)
        for model_id in before.keys() | forward_s.keys():
            tracked = self._tracked.get(model_id)
            if tracked is not None and before.get(model_id) != forward_s.get(model_id):
                self._set_per_rate(tracked)
                self._update(tracked, tracked.counted_s)

    def on_succession(self, model: ModelProfile, successor: ModelProfile, now: float) -> None:
        before, after = self._meet(model, now), self._meet(successor, now)
        if not before.requests:
            return
        (self._forecast or self._make_forecast(now)).hand_over(before, after, now)
        for tracked in (before, after):
            tracked.requested = True
            changed = self._changed_residents if tracked.resident else self._changed_absent
            changed[tracked.model.model_id] = tracked
        self._review_by(now)

    # Utility

    def utility(self, model: ModelProfile, now: float) -> float:
        tracked = self._tracked.get(model.model_id)
        if tracked is None:
            return 0.0
        if tracked.requested or now - tracked.updated_s > self._review_every_s:
            self._update(tracked, now)
        return tracked.utility if not model.tier else tracked.rate * self._utility_per_rate(model, tracked.model)

    def lowered(self, now: float) -> Iterable[str]:
        self._take_in_residents(now)
        if not self._lowered:
            return ()
        lowered, self._lowered = self._lowered, {}
        return lowered

    # Preloads

    def preload_candidates(self, now: float, free_bytes: int) -> PreloadCandidates:
        self._weigh_ages(now)
        self._take_in_residents(now)
        for tracked in self._changed_absent.values():
            self._absent.add(tracked.model, now)
            self._reschedule(tracked, now)
        self._changed_absent.clear()
        self._absent.begin_round(free_bytes)
        self.next_review_s = max(now + self._review_every_s, self._schedule[0][0]) if self._schedule else math.inf
        if (yield from self._absent.candidates(now, free_bytes)):
            self.next_review_s = now

    def accept_preload(self, model: ModelProfile, victims: Iterable[ModelProfile], now: float) -> bool:
        gain = self.utility(model, now) * model.size_bytes
        loss = sum(self.utility(victim, now) * victim.size_bytes for victim in victims)
        return gain > self._margin * loss

    def accept_exchange(
        self, model: ModelProfile, other: ModelProfile, victims: Iterable[ModelProfile], now: float
    ) -> bool:
        tracked = self._tracked.get(model.model_id)
        if tracked is None:
            return False
        self._update(tracked, now)
        gain = tracked.rate * (model.exec_s - other.exec_s)
        return gain > sum(self.utility(victim, now) * victim.size_bytes for victim in victims)

    def _weigh_ages(self, now: float) -> None:
        """Rely on loading models again only as far as background loads keep up.

        They did not between the time at which this policy wanted a round and the time at which it came.
        """
        passed_s = now - self._last_round_s
        if passed_s <= 0:
            return
        idle = 1 - min(1.0, max(0.0, now - self.next_review_s) / passed_s)
        forecast = self._forecast or self._make_forecast(now)
        forecast.age_weight += (idle - forecast.age_weight) * (1 - math.exp(-passed_s / self.BUSY_MEMORY_S))
        self._last_round_s = now

    # Updates

    def _take_in_residents(self, now: float) -> None:
        """Compute the utility of every changed resident again, and of every model whose time has come."""
        if self._changed_residents:
            for tracked in self._changed_residents.values():
                if tracked.requested:
                    self._update(tracked, now)
                self._reschedule(tracked, now)
            self._changed_residents.clear()
        schedule = self._schedule
        while schedule and schedule[0][0] <= now:
            at_s, model_id = heapq.heappop(schedule)
            tracked = self._tracked[model_id]
            if tracked.entry_s != at_s:
                continue
            tracked.entry_s = math.inf
            if tracked.due_s <= now:
                self._update(tracked, now)
                self._reschedule(tracked, now)
            elif tracked.due_s < math.inf:
                self._enter(tracked)

    def _reschedule(self, tracked: _TrackedModel, now: float) -> None:
        """Decide when a resident may be worth less, or an absent model more, though no request comes."""
        forecast = self._forecast or self._make_forecast(now)
        if tracked.resident:
            tracked.due_s = due_s = forecast.next_fall_s(tracked, now)
        else:
            tracked.due_s = due_s = forecast.next_rise_s(tracked, now)
        # An entry that is too early costs less than one that is out of date: most requests only postpone.
        if due_s < tracked.entry_s:
            self._enter(tracked)

    def _enter(self, tracked: _TrackedModel) -> None:
        tracked.entry_s = due_s = tracked.due_s
        heapq.heappush(self._schedule, (due_s, tracked.model.model_id))
        if due_s < self.next_review_s:
            self.next_review_s = due_s

    def _update(self, tracked: _TrackedModel, now: float) -> None:
        """Compute the utility of a model as of ``now``."""
        before = tracked.utility
        rate = (self._forecast or self._make_forecast(now)).rate(tracked, tracked.lead_s, now)
        tracked.rate = rate
        tracked.utility = utility = rate * tracked.utility_per_rate
        tracked.updated_s, tracked.requested = now, False
        if tracked.resident:
            if utility < before:
                self._lowered[tracked.model.model_id] = None
                self._absent.resident_lowered(utility if tracked.form is None else rate * tracked.per_rate)
        elif utility > before:
            self._absent.raised(tracked.model.model_id, now)

    def _meet(self, model: ModelProfile, now: float) -> _TrackedModel:
        tracked = self._tracked.get(model.model_id)
        if tracked is None:
            tracked = self._tracked[model.model_id] = self._changed_absent[model.model_id] = _TrackedModel(model, now)
            self._set_profile(tracked, model)
        return tracked

    def _set_profile(self, tracked: _TrackedModel, model: ModelProfile) -> None:
        tracked.model = model
        # A preload takes a load, and up to a round until it begins.
        tracked.lead_s = model.load_s + self._review_every_s
        self._set_per_rate(tracked)

    def _set_per_rate(self, tracked: _TrackedModel) -> None:
        model, form = tracked.model, tracked.form
        tracked.utility_per_rate = tracked.per_rate = self._utility_per_rate(model, model)
        if form is not None:
            parts = (surplus(form, model) or form, form)
            tracked.per_rate = min(tracked.per_rate, *(self._utility_per_rate(part, model) for part in parts))

    def _utility_per_rate(self, part: ModelProfile, model: ModelProfile) -> float:
        """Seconds per byte that each request would cost without a part of a model, which is loaded as ``model``."""
        if isinstance(part, Surplus):
            return part.saved_s / part.size_bytes
        absence_s = min(model.load_s, self._forward_s.get(model.model_id, model.load_s))
        if part.tier:
            absence_s += max(0.0, model.exec_s - part.exec_s)
        return absence_s / part.size_bytes

    def _make_forecast(self, now: float) -> RateForecast:
        if self._forecast is None:
            self._forecast = RateForecast(short_s=self._short_s, long_s=self._long_s, now=now)
            self._forecast.age_weight = 1.0 if self._preloads else 0.0
        return self._forecast

    def _review_by(self, at_s: float) -> None:
        if at_s < self.next_review_s:
            self.next_review_s = at_s
