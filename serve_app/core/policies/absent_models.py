"""Which absent models EdgeServe's policy would load before any request, and which it has ruled out until later."""

from __future__ import annotations

from collections.abc import Callable, Generator

from serve_app.core.catalog import ModelProfile
from serve_app.core.lazy_heap import HeapEntry, LazyHeap
from serve_app.core.policies.base import PreloadVerdict


class AbsentModels:
    """Ranks absent models by utility, and remembers which of them are not worth their victims.

    Args:
        utility: of a model now, in seconds saved per second and byte.
        margin: an absent model is preloaded when it is worth this many times what must leave for it.
    """

    #: A model that is expected to be requested more often than this while it loads is not preloaded: the first request
    #: comes at once and loads it as well.
    REQUESTS_DURING_LOAD = 3.0

    def __init__(self, utility: Callable[[ModelProfile, float], float], margin: float) -> None:
        self._utility = utility
        self._margin = margin
        #: The most useful model on top. A utility that has fallen is seen when the model surfaces.
        self._heap = LazyHeap(lambda model, now: -utility(model, now))
        #: Not worth what must leave for them; and the most useful model that would have to leave. They are candidates
        #: again when they rise, when a resident model is worth less than that, or when more memory is free.
        self._refused: dict[str, HeapEntry] = {}
        self._refused_above = 0.0
        self._free_bytes = 0
        #: Candidates on which no verdict has come: they are candidates again in the next round.
        self._undecided: dict[str, HeapEntry] = {}
        #: As far as is known, no evictable resident model is worth less: a candidate below is refused without a search
        #: for victims.
        self._lowest_resident = 0.0

    def add(self, model: ModelProfile, now: float) -> None:
        """Rank an absent model by its utility now."""
        self._refused.pop(model.model_id, None)
        self._undecided.pop(model.model_id, None)
        self._heap.push(model, now)

    def remove(self, model: ModelProfile, now: float) -> None:
        """Rank a model no more: it is resident from now on."""
        self._heap.remove(model.model_id)
        self._refused.pop(model.model_id, None)
        self._undecided.pop(model.model_id, None)
        self.resident_lowered(self._utility(model, now))

    def raised(self, model_id: str, now: float) -> None:
        """Take in that an absent model is worth more than before."""
        if (refused := self._refused.pop(model_id, None)) is not None:
            self._heap.push_back(refused)
        self._heap.decrease_key(model_id, now)

    def resident_lowered(self, utility: float) -> None:
        """Take in that a resident model is worth no more than this now."""
        if utility < self._lowest_resident:
            self._lowest_resident = utility
        if utility < self._refused_above:
            self._reconsider()

    def begin_round(self, free_bytes: int) -> None:
        """Make the undecided models candidates again, and the refused ones where more memory is free than before."""
        for entry in self._undecided.values():
            self._heap.push_back(entry)
        self._undecided.clear()
        if free_bytes > self._free_bytes:
            self._reconsider()
        self._free_bytes = free_bytes

    def candidates(self, now: float, free_bytes: int) -> Generator[ModelProfile, PreloadVerdict | None, bool]:
        """Yield candidates, the most useful first, until a verdict comes on one; returns whether it was accepted."""
        while (best := self._heap.pop(now)) is not None:
            model, utility = best.model, -best.key
            if utility <= 0:
                self._heap.push_back(best)
                return False
            displaced_bytes = max(0, model.size_bytes - free_bytes)
            if utility * model.size_bytes <= self._margin * self._lowest_resident * displaced_bytes:
                self._refuse(best, self._lowest_resident)
                return False
            self._undecided[model.model_id] = best
            if utility * model.size_bytes > self.REQUESTS_DURING_LOAD:
                continue
            verdict = yield model
            # One verdict a round is enough; a candidate that could not be judged must not hold up the others.
            if verdict is not None:
                if not verdict.accepted:
                    self._refused_for(model, verdict, now)
                return verdict.accepted
        return False

    def _refused_for(self, model: ModelProfile, verdict: PreloadVerdict, now: float) -> None:
        utilities = [self._utility(victim, now) for victim in verdict.victims]
        self._lowest_resident = min(utilities, default=0.0)
        if (entry := self._undecided.pop(model.model_id, None)) is not None:
            self._refuse(entry, max(utilities, default=0.0))

    def _refuse(self, entry: HeapEntry, in_favor_of: float) -> None:
        self._refused[entry.model.model_id] = entry
        self._refused_above = max(self._refused_above, in_favor_of)

    def _reconsider(self) -> None:
        for entry in self._refused.values():
            self._heap.push_back(entry)
        self._refused.clear()
        self._refused_above = 0.0
