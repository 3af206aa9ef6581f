"""Loads that no request waits for: what others suggest, and what the policy finds worth it."""

from __future__ import annotations

from collections import deque
from collections.abc import Sized
from dataclasses import dataclass

from serve_app.core.cache.decisions import Action, StartExchange, StartLoad
from serve_app.core.cache.entries import idle
from serve_app.core.cache.residents import Residents
from serve_app.core.catalog import ModelProfile
from serve_app.core.lazy_heap import HeapEntry
from serve_app.core.policies.base import PreloadCandidates, PreloadVerdict


@dataclass(frozen=True, slots=True)
class _Suggestion:
    model: ModelProfile
    until_s: float


class PreloadQueue:
    """Begins background loads: required ones first, then the policy's candidates, then suggestions.

    A preload displaces idle models only, and never while a request waits. Where ``max_preloads`` is 0, only required
    preloads of pinned models begin, one at a time.

    Args:
        residents: the models in memory.
        waiting: the requests that wait.
        max_preloads: background loads under way at the same time.
    """

    #: Suggestions wait for background loads that are under way, but no longer than this.
    SUGGESTION_S = 10.0

    def __init__(self, residents: Residents, waiting: Sized, *, max_preloads: int) -> None:
        self._residents = residents
        self._accounting = residents.accounting
        self._waiting = waiting
        self.max_preloads = max_preloads
        self.required: deque[_Suggestion] = deque()
        self.suggested: deque[_Suggestion] = deque()

    @property
    def may_load_pinned(self) -> bool:
        """Whether a pinned model is to load now though nothing else is ever preloaded."""
        return not self.max_preloads and bool(self.required) and not self._residents.preloading

    def suggest(self, model: ModelProfile, now: float, *, required: bool) -> None:
        """Take a suggestion in, for the next ``start``."""
        if not self.max_preloads and not (required and self._residents.is_pinned(model.model_id)):
            return
        (self.required if required else self.suggested).append(_Suggestion(model, now + self.SUGGESTION_S))

    def start(self, now: float) -> tuple[Action, ...]:
        """Begin as many background loads as may be under way and are worth it."""
        actions: list[Action] = []
        while not self._waiting and (self._residents.preloading < self.max_preloads or self.may_load_pinned):
            started = (
                (self.required and self._first_possible(self.required, now, required=True))
                or (self.max_preloads and self._best_candidate(now))
                or (self.suggested and self._first_possible(self.suggested, now, required=False))
            )
            if not started:
                break
            actions += started
        return tuple(actions)

    def exchange(self, model: ModelProfile, now: float) -> tuple[Action, ...]:
        """Begin to load another form of a model in memory, if the policy accepts what must leave for it."""
        if self._waiting or self._residents.preloading >= self.max_preloads:
            return ()
        if not self._residents.may_exchange(model):
            return ()
        own = self._residents.entries[model.model_id]
        victims = self._accounting.victims.choose(
            self._accounting.excess_bytes + model.size_bytes, now, lambda entry: entry is not own and idle(entry)
        )
        if victims is None:
            return ()
        parts = [victim.model for victim in victims]
        if not self._residents.policy.accept_exchange(own.model, model, parts, now):
            self._accounting.victims.spare(victims, now)
            return ()
        displaced = self._residents.begin_exchange(model, victims, now)
        return (*displaced.actions("preload"), StartExchange(model))

    def resume_form(self, model_id: str, now: float) -> tuple[Action, ...]:
        """Have a model that was preloaded go back to the form that it had when it was displaced, if that is worth it.

        For a request it would change when its executions have lost enough again. But a preload comes before them.
        """
        form = self._residents.former_forms.pop(model_id, None)
        entry = self._residents.entries.get(model_id)
        return self.exchange(form, now) if form is not None and entry is not None and entry.preload else ()

    def _first_possible(self, suggestions: deque[_Suggestion], now: float, *, required: bool) -> list[Action]:
        while suggestions:
            suggestion = suggestions.popleft()
            if now > suggestion.until_s:
                continue
            model = suggestion.model
            victims = self._victims(model, now, required=required)
            if victims is None:
                continue
            if required or self._is_more_useful(model, victims, now):
                return self._load(model, victims, now)
            self._accounting.victims.spare(victims, now)
        return []

    def _best_candidate(self, now: float) -> list[Action]:
        """Let the policy name candidates until one is accepted; the policy is sent the verdict on each."""
        policy = self._residents.policy
        candidates = policy.preload_candidates(now, -self._accounting.excess_bytes)
        verdict: PreloadVerdict | None = None
        while (model := _next_candidate(candidates, verdict)) is not None:
            victims = self._victims(model, now, required=False)
            if victims is None:
                verdict = None
                continue
            displaced = tuple(victim.model for victim in victims)
            verdict = PreloadVerdict(policy.accept_preload(model, displaced, now), displaced)
            if verdict.accepted:
                _next_candidate(candidates, verdict)
                return self._load(model, victims, now)
            self._accounting.victims.spare(victims, now)
        return []

    def _victims(self, model: ModelProfile, now: float, *, required: bool) -> list[HeapEntry] | None:
        """What must leave for a preload; None where it may not begin, or something in use would have to leave."""
        if not self._residents.may_preload(model.model_id, required=required, now=now):
            return None
        # Unaccounted bytes do not yield to a preload, which would have to leave again at once.
        return self._accounting.victims.choose(self._accounting.excess_bytes + model.size_bytes, now, idle)

    def _is_more_useful(self, model: ModelProfile, victims: list[HeapEntry], now: float) -> bool:
        utility = self._residents.policy.utility
        own = utility(model, now)
        return all(utility(victim.model, now) < own for victim in victims)

    def _load(self, model: ModelProfile, victims: list[HeapEntry], now: float) -> list[Action]:
        displaced = self._residents.admit(model, victims, now, uses=0, preload=True)
        return [*displaced.actions("preload"), StartLoad(model, background=True)]


def _next_candidate(candidates: PreloadCandidates, verdict: PreloadVerdict | None) -> ModelProfile | None:
    try:
        return candidates.send(verdict)
    except StopIteration:
        return None
