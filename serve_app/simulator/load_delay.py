"""Load delay only: the paper's model of time, in which nothing queues and a load for a request is over at once.

A preload takes its time: a request that comes before it has ended waits for the rest. Several locations are so many
caches that know nothing of each other.
"""

from __future__ import annotations

import heapq
import math
from array import array
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from serve_app.core.cache.decisions import Hit, Join, Load, Reject, Wait
from serve_app.core.cache.model_cache import ModelCache
from serve_app.core.catalog import ModelProfile
from serve_app.core.vocabulary import ModelState
from serve_app.workload.trace import Trace

#: How many requests pass between two reports of progress.
_STRIDE = 20_000


@dataclass(slots=True, kw_only=True)
class LoadDelayResults:
    """What came of a replay. ``rejected`` counts the misses of models that memory has no room for."""

    requests: int = 0
    hits: int = 0
    misses: int = 0
    joins: int = 0
    rejected: int = 0
    preloads: int = 0
    wasted_preloads: int = 0
    evictions: int = 0
    #: Seconds that requests waited for loads, that background loads took, and that executions take.
    load_s: float = 0.0
    preload_s: float = 0.0
    exec_s: float = 0.0
    #: Latency of every request that waited for a load, and how many of the others take so many seconds.
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
) -> LoadDelayResults:
    """Replay a trace through one cache per location.

    Args:
        trace: the requests.
        profiles: of ``trace.models``, in their order.
        make_cache: a fresh cache for the location of that number.
        progress: is told now and then how many more requests are done.
    """
    total = LoadDelayResults()
    for number in range(len(trace.locations)):
        location = _Location(make_cache(number), profiles)
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
    tally: LoadDelayResults = field(default_factory=LoadDelayResults)
    #: Preloads under way, those that gave way to a request included: when each ends, in order, and the same by model.
    _endings: list[tuple[float, str]] = field(default_factory=list)
    _ends_s: dict[str, float] = field(default_factory=dict)

    def play(self, arrival_s: Sequence[float], model: Sequence[int], progress: Callable[[int], None]) -> None:
        cache, profiles, tally, endings = self.cache, self.profiles, self.tally, self._endings
        request, finish = cache.request, cache.finish
        # A trace may begin at any hour, and what was not observed is no absence of requests.
        done, before_s = 0, arrival_s[0] if arrival_s else 0.0
        cache.know(profiles, before_s)
        for now, number in zip(arrival_s, model, strict=True):
            if now >= cache.review_s or (endings and now >= endings[0][0]):
                self._until(before_s, now)
            before_s = now
            profile = profiles[number]
            answer = request(profile, now)
            if isinstance(answer, Hit):
                tally.hits += 1
                finish(profile.model_id, now)
            else:
                self._not_there(profile, answer, now)
            done += 1
            if done % _STRIDE == 0:
                progress(_STRIDE)
        progress(done % _STRIDE)
        tally.requests += done
        for number, count in Counter(model).items():
            tally.exec_s += count * profiles[number].exec_s
            tally.at_once[profiles[number].exec_s] += count

    def close(self) -> LoadDelayResults:
        counters = self.cache.counters
        self.tally.preloads = counters.preloads
        self.tally.wasted_preloads = counters.wasted_preloads
        self.tally.evictions = counters.evictions
        return self.tally

    def _not_there(self, profile: ModelProfile, answer: Join | Load | Reject | Wait, now: float) -> None:
        match answer:
            case Load():
                self.tally.misses += 1
                # A preload of it that gave way and is still under way is taken back.
                self._waited(profile, self._ends_s.pop(profile.model_id, now + profile.load_s) - now)
                self.cache.loaded(profile.model_id, now)
                self.cache.finish(profile.model_id, now)
            case Join():
                self.tally.joins += 1
                self._waited(profile, self._ends_s[profile.model_id] - now)
                self.cache.finish(profile.model_id, now)
            case Reject():
                self._rejected(profile)
            case Wait(ticket=ticket):
                # Only where a preload that was joined fills the memory; nothing queues in this model of time.
                self.cache.give_up(ticket, now)
                self._rejected(profile)

    def _rejected(self, profile: ModelProfile) -> None:
        self.tally.misses += 1
        self.tally.rejected += 1
        self._waited(profile, profile.load_s)

    def _waited(self, profile: ModelProfile, wait_s: float) -> None:
        self.tally.load_s += wait_s
        self.tally.waited_latency_s.append(wait_s + profile.exec_s)
        self.tally.at_once[profile.exec_s] -= 1

    def _until(self, before_s: float, now: float) -> None:
        """Let the background work happen that is due by ``now``, each at its time, and nothing before ``before_s``."""
        while True:
            # It may be in the past: a review that was due waits until a preload has ended, or given way to a request.
            review_s = max(self.cache.review_s, before_s)
            ending_s = self._endings[0][0] if self._endings else math.inf
            before_s = min(review_s, ending_s)
            if before_s > now:
                return
            if ending_s <= review_s:
                self._ended(*heapq.heappop(self._endings))
                continue
            while (preload := self.cache.next_preload(review_s)) is not None:
                self._started(preload.model, review_s)

    def _started(self, model: ModelProfile, now: float) -> None:
        if model.model_id not in self._ends_s:
            self._ends_s[model.model_id] = now + model.load_s
            heapq.heappush(self._endings, (now + model.load_s, model.model_id))
            self.tally.preload_s += model.load_s

    def _ended(self, at_s: float, model_id: str) -> None:
        if self._ends_s.get(model_id) == at_s:
            del self._ends_s[model_id]
            if self.cache.state(model_id) is ModelState.LOADING:
                self.cache.loaded(model_id, at_s)
