"""The order in which requests get memory: which is answered at once, which waits, and what lets it go on."""

from __future__ import annotations

from collections import OrderedDict

from serve_app.core.cache.decisions import (
    HIT,
    JOIN,
    Action,
    Answer,
    EvictionReason,
    Grant,
    Hit,
    Join,
    Load,
    Reject,
    RejectReason,
    Wait,
)
from serve_app.core.cache.entries import evictable, idle
from serve_app.core.cache.residents import Residents
from serve_app.core.catalog import ModelProfile
from serve_app.core.lazy_heap import HeapEntry
from serve_app.core.vocabulary import ModelState


class WaitQueue:
    """Answers requests in order of arrival; a request whose victims are all in use waits.

    The models that the head of the queue will displace are drained: they take no new requests until the head has its
    place, so that a large model cannot starve. When the capacity has shrunk, the excess models are drained in the same
    way, without a waiting request. A request further back overtakes only if its own model is resident and stays.

    Args:
        residents: the models in memory.
        max_loads: loads for requests under way at the same time.
        max_waiting: requests that may wait; more are rejected.
    """

    def __init__(self, residents: Residents, *, max_loads: int, max_waiting: int) -> None:
        self._residents = residents
        self._accounting = residents.accounting
        self._entries = residents.entries
        self.max_loads = max_loads
        self._max_waiting = max_waiting
        #: The models that requests wait for, by ticket, in order of arrival.
        self.waiting: OrderedDict[int, ModelProfile] = OrderedDict()
        self._tickets = 0

    def answer_resident(self, model_id: str, now: float) -> Hit | Join | None:
        """Let a request use its model, if that is in memory and takes requests."""
        entry = self._entries.get(model_id)
        if entry is None:
            return None
        if entry.draining:
            if self.waiting or self._accounting.excess_bytes > 0:
                return None
            # The load that it was drained for has come to nothing.
            self._accounting.victims.drain(())
        if self._residents.changed and model_id in self._residents.changed:
            return None
        entry.uses += 1
        entry.used_s = now
        entry.speculative = False
        return HIT if entry.state is ModelState.READY else JOIN

    def answer_absent(self, model: ModelProfile, now: float) -> Load | Reject | Wait:
        """Load the model of a request, reject the request, or let it wait."""
        answer: Load | Reject | None = self._residents.rejection(model, now)
        if answer is None and not self.waiting:
            answer = self._load(model, now)
        return answer or self._enqueue(model, now)

    def cancel(self, ticket: int, now: float) -> None:
        """Remove a request that waits no longer; unknown tickets are ignored."""
        if ticket in self.waiting:
            self._leave(ticket, now)

    def advance(self, now: float) -> list[Action]:
        """Answer all requests that can be answered now, in order of arrival."""
        actions: list[Action] = []
        while self.waiting:
            ticket, model = next(iter(self.waiting.items()))
            answer = (
                self.answer_resident(model.model_id, now)
                or self._residents.rejection(model, now)
                or self._load(model, now)
            )
            if answer is None:
                self._drain_victims_for_head(now)
                actions += self._grant_resident(now)
                break
            self._grant(actions, ticket, model, answer, now)
        return actions

    def evict_excess(self, reason: EvictionReason, now: float) -> list[Action]:
        """Evict what is idle of the models beyond the capacity, drain the rest, and let requests go on."""
        excess_bytes = self._accounting.excess_bytes
        victims = self._accounting.victims.take_least_useful(excess_bytes, now, idle)
        victims = self._accounting.victims.without_rest(victims, excess_bytes)
        displaced = self._residents.displace(victims, now)
        if self._accounting.excess_bytes > 0:
            self._drain_victims_for_head(now)
        elif not self.waiting:
            # Memory was taken away and given back before the drained models were idle.
            self._accounting.victims.drain(())
        return [*displaced.actions(reason), *self.advance(now)]

    def _enqueue(self, model: ModelProfile, now: float) -> Wait | Reject:
        if len(self.waiting) >= self._max_waiting:
            return Reject(RejectReason.QUEUE_FULL, f"{len(self.waiting)} requests already wait for memory", 1.0)
        self._tickets += 1
        self.waiting[self._tickets] = model
        if len(self.waiting) == 1:
            self._drain_victims_for_head(now)
        return Wait(self._tickets)

    def _load(self, model: ModelProfile, now: float) -> Load | None:
        """Begin a load if there is, or can be, enough room now."""
        if self._residents.loading >= self.max_loads or model.model_id in self._entries:
            return None
        self._accounting.limit_protected(model.size_bytes, now)
        victims = self._accounting.victims.choose(self._accounting.missing_bytes(model.size_bytes), now, idle)
        if victims is None:
            return None
        displaced = self._residents.admit(model, victims, now, uses=1, preload=False)
        return Load(displaced.evicted, displaced.shrunk)

    def _drain_victims_for_head(self, now: float) -> None:
        """Let no new request onto the models that are to be evicted, but onto all others.

        The head of the queue will displace them, or they exceed the capacity.
        """
        accounting = self._accounting
        head = next(iter(self.waiting.values()), None)
        victims: list[HeapEntry] = []
        # A resident model that is itself drained displaces nothing: it stays if memory has become enough meanwhile.
        if head is not None and head.model_id not in self._entries:
            if self._residents.loading >= self.max_loads:
                # The head would wait with every byte free: nothing is gained by turning hits away meanwhile.
                return
            victims = accounting.victims.choose(accounting.missing_bytes(head.size_bytes), now, evictable) or []
        if not victims and accounting.excess_bytes > 0:
            victims = accounting.victims.take_least_useful(accounting.excess_bytes, now, evictable)
        accounting.victims.spare(victims, now)
        accounting.victims.drain(victims)

    def _grant_resident(self, now: float) -> list[Action]:
        """Answer the requests further back whose own model is resident and stays."""
        actions: list[Action] = []
        for ticket, model in list(self.waiting.items()):
            answer = self.answer_resident(model.model_id, now)
            if answer is not None:
                self._grant(actions, ticket, model, answer, now)
        return actions

    def _grant(self, actions: list[Action], ticket: int, model: ModelProfile, answer: Answer, now: float) -> None:
        self._leave(ticket, now)
        if isinstance(answer, Load):
            actions += answer.actions(model)
        actions.append(Grant(ticket, model.model_id, answer))

    def _leave(self, ticket: int, now: float) -> None:
        """Remove a request from the queue; what was drained for the head takes requests again."""
        was_head = ticket == next(iter(self.waiting))
        del self.waiting[ticket]
        if was_head:
            self._accounting.victims.drain([])
            if self._accounting.excess_bytes > 0:
                self._drain_victims_for_head(now)
