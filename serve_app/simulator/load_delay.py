"""Load delay only: the paper's model of time, in which nothing queues and a load for a request is over at once.

A preload takes its time: a request that comes before its end waits for the rest. Each location has a cache of its own;
the caches are independent.
"""

from __future__ import annotations

import heapq
import math
from array import array
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from serve_app.core.cache.decisions import (
    Action,
    Evict,
    Grant,
    Hit,
    Join,
    Load,
    Reject,
    StartExchange,
    StartLoad,
    StartShrink,
    Wait,
)
from serve_app.core.cache.events import TICK, ExchangeEnded, ExchangeSuggested, LoadEnded, ModelsKnown, WaitCanceled
from serve_app.core.cache.model_cache import ModelCache
from serve_app.core.catalog import ModelProfile
from serve_app.core.forms import key_of_tier
from serve_app.core.vocabulary import ModelState
from serve_app.simulator.forms import FormsInMemory
from serve_app.workload.trace import Trace

#: How many requests pass between two reports of progress.
_STRIDE = 20_000


@dataclass(slots=True, kw_only=True)
class LoadDelayResults:
    """The results of a replay. ``rejected`` counts the misses of models that memory has no room for."""

    requests: int = 0
    hits: int = 0
    misses: int = 0
    joins: int = 0
    rejected: int = 0
    preloads: int = 0
    wasted_preloads: int = 0
    evictions: int = 0
    form_changes: int = 0
    #: Seconds of loads for changes of form.
    form_change_s: float = 0.0
    #: Seconds that requests waited for loads, that background loads took, and that executions take.
    load_s: float = 0.0
    preload_s: float = 0.0
    exec_s: float = 0.0
    #: Latency of every request that waited for a load; for the others, how many take so many seconds.
    waited_latency_s: array[float] = field(default_factory=lambda: array("d"))
    at_once: Counter[float] = field(default_factory=Counter)

    def __iadd__(self, other: LoadDelayResults) -> LoadDelayResults:
        for name in self.__slots__:
            setattr(self, name, getattr(self, name) + getattr(other, name))
        return self


def replay(
    trace: Trace,
    profiles: Sequence[ModelProfile],
    make_cache: Callable[[int], ModelCache],
    progress: Callable[[int], None] = lambda _: None,
    make_forms: Callable[[], FormsInMemory] | None = None,
) -> LoadDelayResults:
    """Replay a trace through one cache per location.

    Args:
        trace: the requests.
        profiles: of ``trace.models``, in their order.
        make_cache: a fresh cache for the location of that number.
        progress: called now and then with the number of requests done since.
        make_forms: the forms of a fresh cache; None: every model has one.
    """
    total = LoadDelayResults()
    for number in range(len(trace.locations)):
        location = _Location(make_cache(number), profiles, make_forms and make_forms())
        location.play(*_stream(trace, number), progress)
        total += location.close()
    return total


def _stream(trace: Trace, number: int) -> tuple[Sequence[float], Sequence[int]]:
    if trace.location is None:
        return (trace.arrival_s, trace.model) if number == 0 else ((), ())
    mine = [position for position, location in enumerate(trace.location) if location == number]
    return [trace.arrival_s[position] for position in mine], [trace.model[position] for position in mine]


@dataclass(slots=True)
class _Location:
    cache: ModelCache
    profiles: Sequence[ModelProfile]
    forms: FormsInMemory | None = None
    results: LoadDelayResults = field(default_factory=LoadDelayResults)
    #: Preloads under way, also those that were evicted for a request: when each ends, in order, and the same by model.
    _endings: list[tuple[float, str]] = field(default_factory=list)
    _ends_s: dict[str, float] = field(default_factory=dict)
    #: The forms that models are going over to, by their keys, which are among the endings as well.
    _exchanges: dict[str, ModelProfile] = field(default_factory=dict)
    #: Made once: to make an event costs as much as half of what the cache does with it.
    _load_ended: dict[str, LoadEnded] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._load_ended |= {profile.model_id: LoadEnded(profile.model_id) for profile in self.profiles}

    def play(self, arrival_s: Sequence[float], model: Sequence[int], progress: Callable[[int], None]) -> None:
        cache, profiles, results, endings = self.cache, self.profiles, self.results, self._endings
        request, finish = cache.request, cache.finish
        # A trace may begin at any hour, and the time before it is no absence of requests.
        done, before_s = 0, arrival_s[0] if arrival_s else 0.0
        self._apply(cache.handle(ModelsKnown(profiles), before_s), before_s)
        for now, number in zip(arrival_s, model, strict=True):
            if now >= cache.next_tick_s or (endings and now >= endings[0][0]):
                self._run_background(before_s, now)
            before_s = now
            profile = profiles[number]
            answer = request(profile, now)
            if self.forms is not None:
                self._answer_in_form(profile, answer, now)
            elif isinstance(answer, Hit):
                results.hits += 1
                finish(profile.model_id, now)
            else:
                self._miss(profile, answer, now, profile.exec_s)
            done += 1
            if done % _STRIDE == 0:
                progress(_STRIDE)
        progress(done % _STRIDE)
        results.requests += done
        if self.forms is not None:
            return
        for number, count in Counter(model).items():
            results.exec_s += count * profiles[number].exec_s
            results.at_once[profiles[number].exec_s] += count

    def close(self) -> LoadDelayResults:
        counters = self.cache.counters
        self.results.preloads = counters.preloads
        self.results.wasted_preloads = counters.wasted_preloads
        self.results.evictions = counters.evictions
        self.results.form_changes = counters.form_changes
        return self.results

    def _answer_in_form(self, profile: ModelProfile, answer: Hit | Join | Load | Reject | Wait, now: float) -> None:
        """Answer a request by the form in which its model is, which may be the reason to go over to another one."""
        assert self.forms is not None
        if isinstance(answer, Load):
            self.forms.loaded(profile.model_id)
        present = self.forms.present(profile.model_id)
        self.results.exec_s += present.exec_s
        self.results.at_once[present.exec_s] += 1
        if isinstance(answer, Hit):
            self.results.hits += 1
            self._apply(self.cache.finish(profile.model_id, now), now)
        else:
            self._miss(profile, answer, now, present.exec_s)
        other = self.forms.executed(profile.model_id, present)
        if other is not None:
            self._apply(self.cache.handle(ExchangeSuggested(other), now), now)

    def _miss(self, profile: ModelProfile, answer: Join | Load | Reject | Wait, now: float, exec_s: float) -> None:
        match answer:
            case Load():
                self.results.misses += 1
                for smaller in answer.shrunk:
                    self._start_shrink(smaller, now)
                # A preload of the model that was evicted and is still under way is taken back.
                self._count_wait(self._ends_s.pop(profile.model_id, now + profile.load_s) - now, exec_s)
                for actions in (
                    self.cache.handle(self._load_ended[profile.model_id], now),
                    self.cache.finish(profile.model_id, now),
                ):
                    # Nearly always there are none, and this runs for every miss.
                    if actions:
                        self._apply(actions, now)
            case Join():
                self.results.joins += 1
                self._count_wait(self._ends_s[profile.model_id] - now, exec_s)
                self._apply(self.cache.finish(profile.model_id, now), now)
            case Reject():
                self._count_rejection(profile, exec_s)
            case Wait(ticket=ticket):
                # Only where a joined preload or a change of form fills the memory; nothing queues here.
                self._apply(self.cache.handle(WaitCanceled(ticket), now), now)
                self._count_rejection(profile, exec_s)

    def _count_rejection(self, profile: ModelProfile, exec_s: float) -> None:
        self.results.misses += 1
        self.results.rejected += 1
        self._count_wait(profile.load_s, exec_s)

    def _count_wait(self, wait_s: float, exec_s: float) -> None:
        self.results.load_s += wait_s
        self.results.waited_latency_s.append(wait_s + exec_s)
        self.results.at_once[exec_s] -= 1

    def _run_background(self, before_s: float, now: float) -> None:
        """Let the background work that is due by ``now`` happen, each at its time, and nothing before ``before_s``."""
        while True:
            # It may be in the past: a due tick waits until a preload has ended, or was evicted for a request.
            tick_s = max(self.cache.next_tick_s, before_s)
            ending_s = self._endings[0][0] if self._endings else math.inf
            before_s = min(tick_s, ending_s)
            if before_s > now:
                return
            if ending_s <= tick_s:
                self._end_preload(*heapq.heappop(self._endings))
            else:
                self._apply(self.cache.handle(TICK, tick_s), tick_s)

    def _apply(self, actions: tuple[Action, ...], now: float) -> None:
        """Carry out what the cache has decided; memory is free at once, so that only loads take time."""
        for action in actions:
            match action:
                case Evict():
                    pass
                case StartLoad():
                    assert action.background, "a load for a request is over at once"
                    self._start_preload(action.model, now)
                case StartExchange():
                    self._start_exchange(action.model, now)
                case StartShrink():
                    self._start_shrink(action.model, now)
                case Grant():
                    raise AssertionError("no request waits")

    def _start_preload(self, model: ModelProfile, now: float) -> None:
        if self.forms is not None:
            self.forms.loaded(model.model_id)
        if model.model_id not in self._ends_s:
            self._ends_s[model.model_id] = now + model.load_s
            heapq.heappush(self._endings, (now + model.load_s, model.model_id))
            self.results.preload_s += model.load_s

    def _start_exchange(self, other: ModelProfile, now: float) -> None:
        key = key_of_tier(other.model_id, other.tier)
        self._exchanges[key] = other
        heapq.heappush(self._endings, (now + other.load_s, key))
        self.results.form_change_s += other.load_s

    def _start_shrink(self, smaller: ModelProfile, now: float) -> None:
        assert self.forms is not None
        self.forms.exchanged(smaller)
        self._ends_s[smaller.model_id] = now + smaller.load_s
        heapq.heappush(self._endings, (now + smaller.load_s, smaller.model_id))
        self.results.form_change_s += smaller.load_s

    def _end_preload(self, at_s: float, key: str) -> None:
        if (other := self._exchanges.pop(key, None)) is not None:
            assert self.forms is not None
            self.forms.exchanged(other)
            self._apply(self.cache.handle(ExchangeEnded(other.model_id, succeeded=True), at_s), at_s)
        elif self._ends_s.get(key) == at_s:
            del self._ends_s[key]
            if self.cache.state(key) is ModelState.LOADING:
                self._apply(self.cache.handle(self._load_ended[key], at_s), at_s)
