"""EdgeServe's own policy: keep what is about to save the most time per byte, and fetch it before it is asked for."""

from __future__ import annotations

import heapq
import math
import random
from collections.abc import Iterable, Mapping, Sequence

from serve_app.core.catalog import ModelProfile
from serve_app.core.lazy_heap import HeapEntry, LazyHeap
from serve_app.core.policies.base import EvictionPolicy
from serve_app.core.policies.rate_forecast import History, RateForecast


class _Known(History):
    """What the policy keeps of one model besides; ``worth`` is in seconds saved per second and byte."""

    __slots__ = ("asked", "due_s", "entry_s", "model", "resident", "valued_s", "worth", "worth_per_rate")

    def __init__(self, model: ModelProfile, now: float) -> None:
        super().__init__(now)
        self.model = model
        self.worth = 0.0
        self.worth_per_rate = 0.0
        self.resident = False
        #: When its worth was found, and whether it has been asked for since.
        self.valued_s = now
        self.asked = True
        #: When the worth is to be looked at again, and the time of its entry in the agenda, which may be earlier.
        self.due_s = math.inf
        self.entry_s = math.inf


class EdgeServe(EvictionPolicy):
    """Seconds saved per second and byte: predicted request rate x cost of absence / size.

    The rate is that of ``RateForecast``, at its highest within the time that it takes to bring a model in. The cost of
    absence is a load, or the forward to the next location that holds the model, whichever is less: duplicates go before
    last copies.

    Args:
        short_s: half-life of the short memory of request rates; what a session is.
        long_s: half-life of the long memory.
        margin: an absent model is preloaded when it is worth this many times what must go for it.
        review_every_s: the least time between two rounds of preloads.
    """

    spares_small = True

    #: For how long it is remembered whether the background was busy.
    BUSY_MEMORY_S = 600.0
    #: A model that is expected to be asked for more often than this while it loads is not preloaded: the first request
    #: comes at once and fetches it as well.
    ASKED_FOR_MEANWHILE = 3.0

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
        self._next_use: RateForecast | None = None
        self._known: dict[str, _Known] = {}
        self._forward_s: Mapping[str, float] = {}
        #: Absent models, the most worthwhile first. A worth that has fallen is seen when the model surfaces.
        self._absent = LazyHeap(lambda model, now: -self.utility(model, now))
        #: Absent models that are not worth what must go for them, and the most useful of what must go. They are wished
        #: for again when they rise, when a resident is worth less than that, or when there is more free memory than at
        #: the last wish.
        self._refused: dict[str, HeapEntry] = {}
        self._refused_above = 0.0
        self._free_bytes = 0
        #: What was wished for last and has not been judged: it is wished for again.
        self._held_up: dict[str, HeapEntry] = {}
        #: No resident that can go is worth less, as far as is known: a wish is refused without looking for victims.
        self._floor = 0.0
        self._judged = False
        #: When wishes were last asked for.
        self._asked_s = 0.0
        #: What has happened since it last counted: residents that were asked for or loaded count when a victim is
        #: sought, absent models that were asked for, met or displaced not before the next round of preloads.
        self._news_of_residents: dict[str, _Known] = {}
        self._news_of_absent: dict[str, _Known] = {}
        #: When to look at which model again though nothing happens to it. Of several entries for one model, that of its
        #: ``entry_s`` counts.
        self._agenda: list[tuple[float, str]] = []
        #: In order; told once, however often they fell.
        self._fallen: dict[str, None] = {}
        self.review_s = math.inf

    # What happens

    def on_catalog(self, models: Iterable[ModelProfile], now: float) -> None:
        for model in models:
            self._meet(model, now)
        self._review_at(now)

    def on_request(self, model: ModelProfile, now: float) -> None:
        known = self._known.get(model.model_id) or self._meet(model, now)
        if known.model is not model:
            self._profile(known, model)
        (self._next_use or self._predictor(now)).request(known, now)
        known.asked = True
        if known.resident:
            self._news_of_residents[model.model_id] = known
        else:
            self._news_of_absent[model.model_id] = known
        self._review_at(now + self._review_every_s)

    def on_load(self, model: ModelProfile, now: float) -> None:
        known = self._known.get(model.model_id) or self._meet(model, now)
        known.resident = True
        self._absent.take(model.model_id)
        self._refused.pop(model.model_id, None)
        self._held_up.pop(model.model_id, None)
        self._news_of_absent.pop(model.model_id, None)
        self._news_of_residents[model.model_id] = known
        self._floor = min(self._floor, self.utility(model, now))
        if known.worth < self._refused_above:
            self._reconsider()

    def on_evict(self, model: ModelProfile, now: float) -> None:
        self.on_unload(model, now)

    def on_unload(self, model: ModelProfile, now: float) -> None:
        known = self._known.get(model.model_id) or self._meet(model, now)
        known.resident = False
        self._news_of_residents.pop(model.model_id, None)
        self._news_of_absent[model.model_id] = known
        self._review_at(now + self._review_every_s)

    def on_forward_costs(self, forward_s: Mapping[str, float]) -> None:
        before, self._forward_s = self._forward_s, dict(forward_s)
        for model_id in before.keys() | forward_s.keys():
            known = self._known.get(model_id)
            if known is not None and before.get(model_id) != forward_s.get(model_id):
                known.worth_per_rate = self._worth_per_rate(known.model)
                self._value(known, known.counted_s)

    # What it is worth

    def utility(self, model: ModelProfile, now: float) -> float:
        known = self._known.get(model.model_id)
        if known is None:
            return 0.0
        if known.asked or now - known.valued_s > self._review_every_s:
            self._value(known, now)
        return known.worth

    def fallen(self, now: float) -> Iterable[str]:
        self._review(now)
        if not self._fallen:
            return ()
        fallen, self._fallen = self._fallen, {}
        return fallen

    def wishes(self, now: float, free_bytes: int) -> Iterable[ModelProfile]:
        self._see_how_busy(now)
        self._review(now)
        self._take_in_absent(now)
        if free_bytes > self._free_bytes:
            self._reconsider()
        self._free_bytes = free_bytes
        self.review_s = max(now + self._review_every_s, self._agenda[0][0]) if self._agenda else math.inf
        while (best := self._absent.pop(now)) is not None:
            model, worth = best.model, -best.key
            if worth <= 0:
                self._absent.put_back(best)
                return
            displaced_bytes = max(0, model.size_bytes - free_bytes)
            if worth * model.size_bytes <= self._margin * self._floor * displaced_bytes:
                self._refuse(best, self._floor)
                return
            self._held_up[model.model_id] = best
            if worth * model.size_bytes > self.ASKED_FOR_MEANWHILE:
                continue
            self._judged = False
            yield model
            # One judgement a round is enough; a wish that could not even be judged must not hold up the others.
            if self._judged:
                return

    def worthwhile(self, model: ModelProfile, victims: Sequence[ModelProfile], now: float) -> bool:
        gain = self.utility(model, now) * model.size_bytes
        worths = [self.utility(victim, now) for victim in victims]
        loss = sum(worth * victim.size_bytes for worth, victim in zip(worths, victims, strict=True))
        self._judged = True
        if gain <= self._margin * loss:
            self._floor = min(worths, default=0.0)
            if (wish := self._held_up.pop(model.model_id, None)) is not None:
                self._refuse(wish, max(worths, default=0.0))
            return False
        self.review_s = now
        return True

    # How it is kept up to date

    def _take_in_absent(self, now: float) -> None:
        """Rank the absent models that there is news of, and again those that could not be judged."""
        for model_id, known in self._news_of_absent.items():
            self._refused.pop(model_id, None)
            self._held_up.pop(model_id, None)
            self._absent.add(known.model, now)
            self._schedule(known, now)
        self._news_of_absent.clear()
        for ranked in self._held_up.values():
            self._absent.put_back(ranked)
        self._held_up.clear()

    def _see_how_busy(self, now: float) -> None:
        """Rely on fetching models again only as far as the background keeps up.

        It was busy from when this policy wanted to be asked until it was.
        """
        passed_s = now - self._asked_s
        if passed_s <= 0:
            return
        idle = 1 - min(1.0, max(0.0, now - self.review_s) / passed_s)
        predictor = self._next_use or self._predictor(now)
        predictor.age_weight += (idle - predictor.age_weight) * (1 - math.exp(-passed_s / self.BUSY_MEMORY_S))
        self._asked_s = now

    def _review(self, now: float) -> None:
        """Look again at every resident that there is news of, and at every model whose time has come."""
        if self._news_of_residents:
            for known in self._news_of_residents.values():
                if known.asked:
                    self._value(known, now)
                self._schedule(known, now)
            self._news_of_residents.clear()
        agenda = self._agenda
        while agenda and agenda[0][0] <= now:
            at_s, model_id = heapq.heappop(agenda)
            known = self._known[model_id]
            if known.entry_s != at_s:
                continue
            known.entry_s = math.inf
            if known.due_s <= now:
                self._value(known, now)
                self._schedule(known, now)
            elif known.due_s < math.inf:
                self._enter(known)

    def _schedule(self, known: _Known, now: float) -> None:
        """Decide when to look again: when the worth of a resident may fall, or that of an absent model rise."""
        predictor = self._next_use or self._predictor(now)
        if known.resident:
            known.due_s = due_s = predictor.next_fall_s(known, now)
        else:
            known.due_s = due_s = predictor.next_rise_s(known, now)
        # An entry that is too early costs less than one that is out of date: most requests only postpone.
        if due_s < known.entry_s:
            self._enter(known)

    def _enter(self, known: _Known) -> None:
        known.entry_s = due_s = known.due_s
        heapq.heappush(self._agenda, (due_s, known.model.model_id))
        if due_s < self.review_s:
            self.review_s = due_s

    def _value(self, known: _Known, now: float) -> None:
        before = known.worth
        rate = (self._next_use or self._predictor(now)).rate(known, known.lead_s, now)
        known.worth = worth = rate * known.worth_per_rate
        known.valued_s, known.asked = now, False
        if known.resident:
            if worth < before:
                self._fallen[known.model.model_id] = None
                if worth < self._floor:
                    self._floor = worth
                if worth < self._refused_above:
                    self._reconsider()
        elif worth > before:
            model_id = known.model.model_id
            if (refused := self._refused.pop(model_id, None)) is not None:
                self._absent.put_back(refused)
            self._absent.renew(model_id, now)

    def _refuse(self, ranked: HeapEntry, in_favour_of: float) -> None:
        self._refused[ranked.model.model_id] = ranked
        self._refused_above = max(self._refused_above, in_favour_of)

    def _reconsider(self) -> None:
        """Wish again for what was refused."""
        for ranked in self._refused.values():
            self._absent.put_back(ranked)
        self._refused.clear()
        self._refused_above = 0.0

    def _meet(self, model: ModelProfile, now: float) -> _Known:
        known = self._known.get(model.model_id)
        if known is None:
            known = self._known[model.model_id] = self._news_of_absent[model.model_id] = _Known(model, now)
            self._profile(known, model)
        return known

    def _profile(self, known: _Known, model: ModelProfile) -> None:
        known.model = model
        # It takes a load to bring it in, and up to a round until somebody looks.
        known.lead_s = model.load_s + self._review_every_s
        known.worth_per_rate = self._worth_per_rate(model)

    def _worth_per_rate(self, model: ModelProfile) -> float:
        """Seconds per byte that each request of an absent model would cost."""
        return min(model.load_s, self._forward_s.get(model.model_id, model.load_s)) / model.size_bytes

    def _predictor(self, now: float) -> RateForecast:
        if self._next_use is None:
            self._next_use = RateForecast(short_s=self._short_s, long_s=self._long_s, now=now)
            self._next_use.age_weight = 1.0 if self.preloading else 0.0
        return self._next_use

    def _review_at(self, at_s: float) -> None:
        if at_s < self.review_s:
            self.review_s = at_s
