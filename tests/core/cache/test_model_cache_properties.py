"""Whatever happens to a cache, in whatever order: its promises hold after every single step.

The machine keeps its own accounts, by the words of the docstrings and not by the code, and compares.
"""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Iterable
from dataclasses import replace

import pytest
from core_support import assert_accounting_adds_up, cancel_wait, decided, load_failed, unload
from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from serve_app.core.cache.decisions import (
    Action,
    Answer,
    Evict,
    Grant,
    Hit,
    Join,
    Load,
    Reject,
    RejectReason,
    StartExchange,
    StartShrink,
    Wait,
)
from serve_app.core.cache.events import (
    TICK,
    ContentChanged,
    ExchangeEnded,
    ExchangeSuggested,
    ForwardCostsChanged,
    LoadEnded,
    ModelsKnown,
    PreloadSuggested,
    RetryAllowed,
)
from serve_app.core.cache.model_cache import ModelCache
from serve_app.core.catalog import ModelProfile
from serve_app.core.forms import surplus
from serve_app.core.policies.registry import make_policy
from serve_app.core.vocabulary import ModelState
from serve_app.errors import Conflict, NotFound

MODELS = {
    model_id: ModelProfile(model_id=model_id, size_bytes=size, load_s=load_s, exec_s=0.1)
    for model_id, size, load_s in (("a", 10, 1.0), ("b", 20, 0.5), ("c", 40, 3.0), ("d", 50, 1.0), ("e", 100, 9.0))
}
#: What a cache promises does not depend on its policy; these differ in what they remember, whether they repeat, whether
#: they spare small models, what they say of falls, and whether they preload.
POLICIES = ["lru", "gdsf", "random", "modelmesh", "belady-am-online", "edgeserve"]
#: Those that let victims go strictly in order, and to whom to look and to think again changes nothing.
STEADY = ["lru", "gdsf"]
FAILURE_MEMORY_S = 5.0
MAX_STEPS = 1000


class CacheMachine(RuleBasedStateMachine):
    policy_name: str

    @initialize(
        seed=st.integers(0, 3),
        max_loads=st.integers(1, 3),
        max_preloads=st.integers(0, 2),
        max_waiting=st.sampled_from([1, 3, 6]),
        pinned=st.sets(st.sampled_from("ac"), max_size=1),
        capacity=st.sampled_from([60, 100]),
    )
    def make(
        self, seed: int, max_loads: int, max_preloads: int, max_waiting: int, pinned: set[str], capacity: int
    ) -> None:
        self.now = 0.0
        self.max_loads = max_loads
        self.max_preloads = max_preloads
        self.max_waiting = max_waiting
        self.pinned = pinned
        self.capacity = capacity
        self.policy = make_policy(self.policy_name, random.Random(seed))
        self.cache = ModelCache(
            capacity_bytes=capacity,
            policy=self.policy,
            max_loads=max_loads,
            max_preloads=max_preloads,
            max_waiting=max_waiting,
            failure_memory_s=FAILURE_MEMORY_S,
            pinned=pinned,
        )
        self.loading: set[str] = set()
        #: Those of the loading models that the policy or others wanted.
        self.preloading: set[str] = set()
        #: Models without a request since their preload began.
        self.guessed: set[str] = set()
        #: Models whose required preload has not begun.
        self.required: set[str] = set()
        self.ready: set[str] = set()
        self.uses: Counter[str] = Counter()
        #: Forms that models in memory have gone over to, and those that they are going over to.
        self.forms: dict[str, ModelProfile] = {}
        self.incoming: dict[str, ModelProfile] = {}
        #: Forms that models had when they left.
        self.had: dict[str, ModelProfile] = {}
        #: Models that are loaded again in the form that they were in first: loads that take no slot.
        self.shrinking: set[str] = set()
        #: Models in use that are to leave, because their files have changed.
        self.changed: set[str] = set()
        self.waiting: dict[int, str] = {}
        #: Whether a request has waited: then drained models may leave although they need not any more.
        self.any_was_drained = False
        self.tickets: set[int] = set()
        self.failed_until: dict[str, float] = {}
        self.requests = self.loads = self.failures = self.evictions = self.unloads = self.preloads = self.wasted = 0
        self.exchanges = 0

    # What can happen

    @rule(model_id=st.sampled_from(sorted(MODELS)))
    def request(self, model_id: str) -> None:
        self.requests += 1
        self.look_at_worths()
        self.asked(model_id, self.cache.request(MODELS[model_id], self.now))

    @rule(model_id=st.sampled_from(sorted(MODELS)))
    def request_and_use_at_once(self, model_id: str) -> None:
        """What mostly happens: without it the machine would seldom see a full cache."""
        tickets = len(self.tickets)
        self.request(model_id)
        if model_id in self.loading:
            self.end_load(model_id)
        if len(self.tickets) == tickets and self.uses[model_id]:
            self.end_use(model_id)

    @rule(model_id=st.sampled_from(sorted(MODELS)))
    def require(self, model_id: str) -> None:
        self.look_at_worths()
        self.required.add(model_id)
        self.preloads_start(self.cache.handle(PreloadSuggested(MODELS[model_id], required=True), self.now))

    @rule(models=st.sets(st.sampled_from(sorted(MODELS))))
    def know(self, models: set[str]) -> None:
        self.cache.handle(ModelsKnown([MODELS[model_id] for model_id in sorted(models)]), self.now)

    @rule()
    def tick(self) -> None:
        self.preloads_start(self.cache.handle(TICK, self.now))

    @rule(model_id=st.sampled_from(sorted(MODELS)))
    def suggest(self, model_id: str) -> None:
        self.look_at_worths()
        actions = self.cache.handle(PreloadSuggested(MODELS[model_id]), self.now)
        for model, victims, shrunk in decided(actions).preloads:
            # Two policies use randomness and the clock only now; and a model may have been required before.
            if self.policy_name not in ("random", "modelmesh") and model.model_id not in self.required:
                parts = [self.form(victim) for victim in victims]
                parts += [part for smaller in shrunk if (part := surplus(self.forms[smaller.model_id], smaller))]
                assert self.policy.accept_preload(model, parts, self.now) or all(
                    self.policy.utility(part, self.now) < self.worth[model.model_id] for part in parts
                )
        self.preloads_start(actions)

    @precondition(lambda self: self.loading)
    @rule(choice=st.randoms(use_true_random=False))
    def load_ends_well(self, choice: random.Random) -> None:
        self.end_load(choice.choice(sorted(self.loading)))

    @precondition(lambda self: self.loading)
    @rule(choice=st.randoms(use_true_random=False))
    def load_fails(self, choice: random.Random) -> None:
        model_id = choice.choice(sorted(self.loading))
        self.leaves(model_id)
        self.failures += 1
        self.failed_until[model_id] = self.now + FAILURE_MEMORY_S
        self.granted(load_failed(self.cache, model_id, "the disk says no", self.now))

    @precondition(lambda self: self.ready)
    @rule(choice=st.randoms(use_true_random=False), size_bytes=st.sampled_from([1, 20, 45]))
    def suggest_form(self, choice: random.Random, size_bytes: int) -> None:
        self.go_over(choice.choice(sorted(self.ready)), size_bytes)

    @rule(model_id=st.sampled_from("abcd"), added_bytes=st.sampled_from([5, 15]))
    def request_until_in_a_larger_form(self, model_id: str, added_bytes: int) -> None:
        """Or the machine would seldom see a cache that is full of larger forms."""
        self.request_and_use_at_once(model_id)
        if model_id in self.ready:
            self.go_over(model_id, MODELS[model_id].size_bytes + added_bytes)
        if model_id in self.incoming:
            self.end_exchange(model_id, succeeded=True)

    def go_over(self, model_id: str, size_bytes: int) -> None:
        self.look_at_worths()
        form = replace(MODELS[model_id], size_bytes=size_bytes, exec_s=0.05, tier=1)
        actions = self.cache.handle(ExchangeSuggested(form), self.now)
        if actions:
            assert actions[-1] == StartExchange(form)
            self.exchange_starts(actions[:-1], form)

    def exchange_starts(self, room: Iterable[Action], form: ModelProfile) -> None:
        model_id = form.model_id
        assert model_id in self.ready - self.incoming.keys(), "it is in memory, and on its way to no other form"
        assert not self.waiting, "a guess never goes before a request"
        assert len(self.preloading) + len(self.incoming) < self.max_preloads
        for action in room:
            assert isinstance(action, Evict | StartShrink)
            if isinstance(action, StartShrink):
                assert action.model.model_id != model_id
                if self.policy_name in STEADY:
                    assert self.worth[action.model.model_id] < self.worth[model_id]
                self.shrinks(action.model)
                continue
            victim = action.model_id
            assert victim in self.ready | self.guessed
            assert victim != model_id
            assert not self.uses[victim]
            assert victim not in self.pinned
            if self.policy_name in STEADY:
                assert self.worth[victim] < self.worth[model_id], "only what is less useful leaves for it"
            self.leaves(victim)
            self.evictions += 1
        self.incoming[model_id] = form
        self.exchanges += 1

    @precondition(lambda self: self.incoming)
    @rule(choice=st.randoms(use_true_random=False), succeeded=st.booleans())
    def exchange_ends(self, choice: random.Random, succeeded: bool) -> None:
        self.end_exchange(choice.choice(sorted(self.incoming)), succeeded=succeeded)

    @rule(model_id=st.sampled_from(sorted(MODELS)))
    def content_changes(self, model_id: str) -> None:
        if model_id in self.ready:
            self.changed.add(model_id)
        self.settled(self.cache.handle(ContentChanged(model_id), self.now))

    @precondition(lambda self: self.uses.total())
    @rule(choice=st.randoms(use_true_random=False))
    def finish(self, choice: random.Random) -> None:
        self.end_use(choice.choice(sorted(self.uses.elements())))

    @precondition(lambda self: self.waiting)
    @rule(choice=st.randoms(use_true_random=False))
    def cancel(self, choice: random.Random) -> None:
        ticket = choice.choice(sorted(self.waiting))
        del self.waiting[ticket]
        self.granted(cancel_wait(self.cache, ticket, self.now))

    @rule(model_id=st.sampled_from(sorted(MODELS)))
    def unload(self, model_id: str) -> None:
        if model_id not in self.ready | self.loading:
            with pytest.raises(NotFound):
                unload(self.cache, model_id, self.now)
        elif model_id in self.loading | self.pinned | self.incoming.keys() or self.uses[model_id]:
            with pytest.raises(Conflict):
                unload(self.cache, model_id, self.now)
        else:
            self.leaves(model_id)
            self.unloads += 1
            self.granted(unload(self.cache, model_id, self.now))

    @rule(seconds=st.sampled_from([0.1, 1.0, 6.0, 3600.0]))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds

    @rule(holders=st.dictionaries(st.sampled_from(sorted(MODELS)), st.sampled_from([0.001, 0.1, 5.0])))
    def others_hold(self, holders: dict[str, float]) -> None:
        self.cache.handle(ForwardCostsChanged(holders), self.now)

    @rule(model_id=st.sampled_from(sorted(MODELS)))
    def forget_failure(self, model_id: str) -> None:
        self.failed_until.pop(model_id, None)
        self.cache.handle(RetryAllowed(model_id), self.now)

    # What must follow

    def asked(self, model_id: str, answer: Answer | Wait) -> None:
        if isinstance(answer, Wait):
            assert answer.ticket not in self.tickets, "a ticket is used twice"
            assert model_id not in self.loading - self.guessed, "a load under way can be joined at once"
            if model_id in (self.ready | self.loading) - self.changed:
                assert self.waiting, "a hit or join is turned away only in favor of an earlier request"
                assert self.slots_taken() < self.max_loads, "and only if that one waits for nothing but memory"
            assert len(self.waiting) < self.max_waiting
            self.tickets.add(answer.ticket)
            self.waiting[answer.ticket] = model_id
            self.any_was_drained = True
            return
        if isinstance(answer, Load):
            assert not self.waiting, "no waiting request is overtaken by a load"
        self.answered(model_id, answer)

    def granted(self, grants: Iterable[Grant]) -> None:
        for grant in grants:
            assert self.waiting.pop(grant.ticket) == grant.model_id, "answered twice, or after giving up"
            if isinstance(grant.answer, Load):
                assert all(ticket > grant.ticket for ticket in self.waiting), (
                    "no waiting request is overtaken by a load"
                )
            self.answered(grant.model_id, grant.answer)

    def answered(self, model_id: str, answer: Answer) -> None:
        match answer:
            case Hit():
                assert model_id in self.ready
                assert model_id not in self.changed, "what is to leave takes no new requests"
                self.used(model_id)
            case Join():
                assert model_id in self.loading
                self.used(model_id)
            case Load(victims=victims, shrunk=shrunk):
                self.load_starts(model_id, victims, shrunk)
            case Reject(reason=RejectReason.TOO_LARGE):
                assert MODELS[model_id].size_bytes > self.capacity - self.pinned_bytes()
            case Reject(reason=RejectReason.LOAD_FAILED, retry_s=retry_s):
                assert self.failed_until[model_id] - self.now == pytest.approx(retry_s)
                assert retry_s > 0
            case Reject(reason=RejectReason.QUEUE_FULL):
                assert len(self.waiting) == self.max_waiting

    def load_starts(self, model_id: str, victims: tuple[str, ...], shrunk: tuple[ModelProfile, ...]) -> None:
        self.takes_the_place_of(model_id, victims, shrunk)
        self.uses[model_id] += 1
        self.loads += 1

    def preloads_start(self, actions: Iterable[Action]) -> None:
        evicted, grants, preloads = decided(actions)
        assert not evicted
        assert not grants
        for model, victims, shrunk in preloads:
            assert not self.waiting, "a guess never goes before a request"
            assert len(self.preloading) + len(self.incoming) < (self.max_preloads or int(model.model_id in self.pinned))
            self.takes_the_place_of(model.model_id, victims, shrunk)
            self.preloading.add(model.model_id)
            self.guessed.add(model.model_id)
            self.required.discard(model.model_id)
            self.preloads += 1

    def takes_the_place_of(self, model_id: str, victims: tuple[str, ...], shrunk: tuple[ModelProfile, ...]) -> None:
        assert model_id not in self.ready | self.loading, "single flight"
        assert self.failed_until.get(model_id, self.now) <= self.now, "a failure is remembered"
        assert len(set(victims)) == len(victims)
        missing = self.used_bytes() + MODELS[model_id].size_bytes - self.capacity
        freed = [self.form(victim).size_bytes for victim in victims]
        freed += [self.forms[smaller.model_id].size_bytes - smaller.size_bytes for smaller in shrunk]
        assert sum(freed) >= missing, "the victims suffice"
        if self.policy.trim_victims:
            assert all(sum(freed) - size < missing for size in freed), "and not one goes in vain"
        elif not shrunk or not self.any_was_drained:
            assert not freed or sum(freed[:-1]) < missing, "and they go one by one only until there is room"
        displaced = {*victims, *(smaller.model_id for smaller in shrunk)}
        if self.policy_name in STEADY and displaced and not self.any_was_drained:
            assert len(shrunk) <= 1, "a model is lost only if its smaller form does not fit either"
            for victim in victims:
                rest_bytes = min(MODELS[victim].size_bytes, self.form(victim).size_bytes)
                assert victim not in self.forms or shrunk or sum(freed) - rest_bytes < missing or victim != victims[-1]
            others = {other for other in self.ready | self.guessed if not self.uses[other]} - self.pinned - displaced
            others -= self.incoming.keys()
            dearest = max(self.worth[victim] for victim in displaced)
            assert all(self.worth[other] >= dearest for other in others), "the least useful go"
        for victim in victims:
            assert victim in self.ready | self.guessed, "a model that is absent, or loading for a request, is no victim"
            assert not self.uses[victim], "a model in use is no victim"
            assert victim not in self.incoming, "nor one on its way to another form"
            assert victim not in self.pinned, "a pinned model is no victim"
            self.leaves(victim)
            self.evictions += 1
        for smaller in shrunk:
            self.shrinks(smaller)
        self.loading.add(model_id)
        self.failed_until.pop(model_id, None)

    def shrinks(self, smaller: ModelProfile) -> None:
        model_id = smaller.model_id
        assert smaller == MODELS[model_id], "it goes back to the form in which it was loaded"
        assert smaller.size_bytes < self.forms.pop(model_id).size_bytes, "which takes less"
        assert model_id in self.ready
        assert not self.uses[model_id], "a model in use keeps its form"
        assert model_id not in self.incoming
        assert model_id not in self.pinned, "and so does a pinned one"
        self.ready.remove(model_id)
        self.loading.add(model_id)
        self.shrinking.add(model_id)
        self.exchanges += 1

    def look_at_worths(self) -> None:
        """As they are before anything happens."""
        self.worth = {model_id: self.policy.utility(self.form(model_id), self.now) for model_id in MODELS}

    def leaves(self, model_id: str) -> None:
        self.wasted += model_id in self.guessed
        for models in (self.ready, self.loading, self.preloading, self.guessed, self.shrinking, self.changed):
            models.discard(model_id)
        if model_id in self.forms:
            self.had[model_id] = self.forms.pop(model_id)
        del self.uses[model_id]

    def used(self, model_id: str) -> None:
        self.uses[model_id] += 1
        self.guessed.discard(model_id)

    def slots_taken(self) -> int:
        return len(self.loading - self.preloading - self.shrinking)

    def end_load(self, model_id: str) -> None:
        self.look_at_worths()
        was_preload = model_id in self.preloading
        self.loading.remove(model_id)
        self.preloading.discard(model_id)
        self.shrinking.discard(model_id)
        self.ready.add(model_id)
        actions = list(self.cache.handle(LoadEnded(model_id), self.now))
        if not actions or not isinstance(actions[-1], StartExchange):
            self.settled(actions)
            return
        form = actions.pop().model
        assert was_preload, "for a request it would wait until it has paid"
        assert form == self.had[model_id], "it goes back to the form that it had"
        first = next((at for at, action in enumerate(actions) if isinstance(action, Evict | StartShrink)), len(actions))
        self.settled(actions[:first])
        self.exchange_starts(actions[first:], form)

    def end_use(self, model_id: str) -> None:
        self.uses[model_id] -= 1
        self.settled(self.cache.finish(model_id, self.now))

    def end_exchange(self, model_id: str, *, succeeded: bool) -> None:
        form = self.incoming.pop(model_id)
        if succeeded:
            self.forms[model_id] = form
        self.settled(self.cache.handle(ExchangeEnded(model_id, succeeded), self.now))

    def settled(self, actions: Iterable[Action]) -> None:
        """Something has become idle: models that are to leave do so, and requests go on."""
        evicted, grants, preloads = decided(actions)
        assert not preloads
        assert set(evicted) == {
            model_id for model_id in self.changed if not self.uses[model_id] and model_id not in self.incoming
        }, "it leaves as soon as nothing uses it"
        for model_id in evicted:
            self.leaves(model_id)
            self.unloads += 1
        self.granted(grants)

    def form(self, model_id: str) -> ModelProfile:
        """A model as it is in memory, or would be loaded."""
        return self.forms.get(model_id, MODELS[model_id])

    def used_bytes(self) -> int:
        loaded = sum(self.form(model_id).size_bytes for model_id in self.ready | self.loading)
        return loaded + sum(form.size_bytes for form in self.incoming.values())

    def pinned_bytes(self) -> int:
        return sum(self.form(model_id).size_bytes for model_id in (self.ready | self.loading) & self.pinned)

    @invariant()
    def accounts_agree(self) -> None:
        assert_accounting_adds_up(self.cache)
        assert self.cache.used_bytes == self.used_bytes()
        assert {model.model_id: (model.state, model.uses, model.unevictable) for model in self.cache.models()} == {
            model_id: (
                ModelState.LOADING if model_id in self.loading else ModelState.READY,
                self.uses[model_id] + (model_id in self.incoming),
                model_id in self.pinned,
            )
            for model_id in self.ready | self.loading
        }
        assert self.cache.waiting == len(self.waiting) <= self.max_waiting

    @invariant()
    def loads_are_limited(self) -> None:
        assert self.slots_taken() <= self.max_loads
        under_way = len(self.preloading) + len(self.incoming)
        assert under_way <= max(self.max_preloads, len(self.preloading & self.pinned))

    @invariant()
    def reviews_are_announced_only_when_a_preload_may_begin(self) -> None:
        if self.waiting or len(self.preloading) + len(self.incoming) >= (
            self.max_preloads or len(self.required & self.pinned)
        ):
            assert self.cache.next_tick_s == math.inf

    @invariant()
    def counters_add_up(self) -> None:
        counters = self.cache.counters
        counted = (
            counters.requests, counters.loads, counters.load_failures, counters.evictions, counters.unloads,
            counters.preloads, counters.wasted_preloads, counters.form_changes,
        )  # fmt: skip
        assert counted == (
            self.requests, self.loads, self.failures, self.evictions, self.unloads,
            self.preloads, self.wasted, self.exchanges,
        )  # fmt: skip

    @invariant()
    def no_request_waits_for_nothing(self) -> None:
        if self.loading <= self.guessed and not self.uses.total() and not self.incoming:
            assert not self.waiting, "least of all for a guess"

    def teardown(self) -> None:
        if hasattr(self, "cache"):
            self.head_is_served()
            self.all_waiting_are_answered()

    def head_is_served(self) -> None:
        """Although every model in use is asked for again before each of its requests ends, it has its turn."""
        first = min(self.waiting, default=None)
        for _ in range(MAX_STEPS):
            if first not in self.waiting:
                return
            if self.loading:
                self.end_load(min(self.loading))
                continue
            if self.incoming:
                self.end_exchange(min(self.incoming), succeeded=True)
                continue
            for model_id in sorted(set(self.uses.elements())):
                self.request(model_id)
                self.end_use(model_id)
        raise AssertionError("the head of the queue starves")

    def all_waiting_are_answered(self) -> None:
        """When all that is under way ends, no request is left."""
        for _ in range(MAX_STEPS):
            if self.loading:
                self.end_load(min(self.loading))
            elif self.incoming:
                self.end_exchange(min(self.incoming), succeeded=False)
            elif self.uses.total():
                self.end_use(min(self.uses.elements()))
            else:
                break
        self.accounts_agree()
        assert not self.loading
        assert not self.waiting, "a request waits for ever"


@pytest.mark.parametrize("policy_name", POLICIES)
def test_a_cache_keeps_its_promises_whatever_happens(policy_name: str) -> None:
    machine = type("Machine", (CacheMachine,), {"policy_name": policy_name})
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=50,
            stateful_step_count=50,
            deadline=None,
            derandomize=True,
            # A failure shows at once, in up to 50 steps. With Phase.shrink it has a few, minutes later.
            phases=(Phase.generate,),
        ),
    )
