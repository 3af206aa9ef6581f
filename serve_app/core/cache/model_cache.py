"""The memory-bounded model cache of one worker: which models are resident, which load, which leave.

``ModelCache`` decides and counts; it loads and unloads nothing. The caller carries out the actions that it returns.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import assert_never

from serve_app.core.cache.decisions import Action, Answer, Evict, EvictionReason, Reject, Wait
from serve_app.core.cache.entries import CacheEntry
from serve_app.core.cache.events import (
    CapacityChanged,
    CatalogChanged,
    ContentChanged,
    Event,
    ExchangeEnded,
    ExchangeSuggested,
    ForwardCostsChanged,
    IdleChecked,
    LoadEnded,
    LoadFailed,
    LoadImpossible,
    ModelsKnown,
    PolicyChanged,
    PreloadSuggested,
    PreloadTick,
    ProtectedChanged,
    RetryAllowed,
    UnaccountedChanged,
    UnloadRequested,
    WaitCanceled,
    WithdrawSuggested,
)
from serve_app.core.cache.preload_queue import PreloadQueue
from serve_app.core.cache.residents import CacheCounters, Residents
from serve_app.core.cache.wait_queue import WaitQueue
from serve_app.core.catalog import ModelProfile
from serve_app.core.policies.base import EvictionPolicy
from serve_app.core.vocabulary import ModelState, ResidentModel
from serve_app.errors import Conflict, NotFound


class ModelCache:
    """Decides what is resident in ``capacity_bytes`` of memory.

    | state   | event                                      | next    |
    |---------|--------------------------------------------|---------|
    | absent  | ``request`` -> ``Load``                    | LOADING |
    | absent  | ``StartLoad`` in the background            | LOADING |
    | LOADING | ``request`` -> ``Join``                    | LOADING |
    | LOADING | ``LoadEnded``                              | READY   |
    | LOADING | ``LoadFailed``                             | absent  |
    | LOADING | ``Evict`` (a preload that nothing joined)  | absent  |
    | READY   | ``request`` -> ``Hit``                     | READY   |
    | READY   | ``Evict``, or ``victims`` of a ``Load``    | absent  |
    | READY   | ``StartExchange``, ``ExchangeEnded``       | READY   |
    | READY   | ``StartShrink``, or ``shrunk`` of a        | LOADING |
    |         | ``Load``: goes over to a smaller form      |         |

    ``request`` and ``finish`` are methods because they run for every request; all else comes in by ``handle``. The
    caller does three things: it carries out the actions that ``finish`` and ``handle`` return, and those of a ``Load``,
    in their order; it reports the end of each load that was not evicted meanwhile, and of each exchange; and it sends a
    ``PreloadTick`` at ``next_tick_s``, which any call may have moved.

    A preload that no request has joined may be evicted while it loads, so that no request waits for memory that was
    taken on a guess. A request whose victims are all in use waits; see ``WaitQueue``.

    Args:
        capacity_bytes: what the worker may take: models, and the workspace of executions.
        workspace_bytes: what of it is set aside for executions.
        policy: ranks the models; see ``policies/registry.py``.
        max_loads: loads for requests under way at the same time.
        max_preloads: background loads under way at the same time, beside the others.
        max_waiting: requests that may wait; more are rejected.
        failure_memory_s: how long a failed load is answered from memory.
        pinned: models that are never victims.
    """

    def __init__(
        self,
        *,
        capacity_bytes: int,
        workspace_bytes: int = 0,
        policy: EvictionPolicy,
        max_loads: int = 2,
        max_preloads: int = 1,
        max_waiting: int = 256,
        failure_memory_s: float = 5.0,
        pinned: Collection[str] = (),
    ) -> None:
        _require_capacity(capacity_bytes, workspace_bytes)
        if max_loads < 1:
            raise ValueError(f"max_loads must be at least 1, not {max_loads}")
        if max_preloads < 0:
            raise ValueError(f"max_preloads must not be negative, not {max_preloads}")
        self._workspace_bytes = workspace_bytes
        self._policy = policy
        policy.on_start(preloads=max_preloads > 0)
        self._residents = Residents(capacity_bytes - workspace_bytes, policy, pinned, failure_memory_s)
        self._accounting = self._residents.accounting
        self._wait_queue = WaitQueue(self._residents, max_loads=max_loads, max_waiting=max_waiting)
        self._preload_queue = PreloadQueue(self._residents, self._wait_queue.waiting, max_preloads=max_preloads)
        self.counters: CacheCounters = self._residents.counters
        #: The same objects as in the parts: every request goes through them.
        self._entries = self._residents.entries
        self._waiting = self._wait_queue.waiting
        self._answer_resident = self._wait_queue.answer_resident
        self._forward_costs = ForwardCostsChanged({})
        #: Whether a model that becomes idle may have to leave at once.
        self._may_owe_evictions = False

    def request(self, model: ModelProfile, now: float) -> Answer | Wait:
        """Answer a request for ``model``. ``Hit``, ``Join`` and ``Load`` pin it until ``finish``."""
        self.counters.requests += 1
        self._policy.on_request(model, now)
        return self._answer_resident(model.model_id, now) or self._wait_queue.answer_absent(model, now)

    def finish(self, model_id: str, now: float) -> tuple[Action, ...]:
        """End one use of a model, by a request that was answered ``Hit``, ``Join`` or ``Load``.

        Raises:
            ValueError: it is not in use.
        """
        entry = self._entries.get(model_id)
        if entry is None or entry.uses < 1:
            raise ValueError(f"{model_id} is finished more often than it was requested")
        entry.uses -= 1
        entry.used_s = now
        return self._settle(now) if entry.uses == 0 and (self._waiting or self._may_owe_evictions) else ()

    def handle(self, event: Event, now: float) -> tuple[Action, ...]:
        """Take in an event; returns what the caller is to do, in this order."""
        # Patterns without attributes: positional ones cost several times as much, and a load ends with every miss.
        match event:
            case LoadEnded():
                self._residents.load_ended(event.model_id)
                actions = self._settle(now) if self._waiting or self._may_owe_evictions else ()
                if self._residents.former_forms:
                    actions += self._preload_queue.resume_form(event.model_id, now)
                return actions
            case PreloadTick():
                return self._preload_queue.start(now)
            case LoadFailed():
                self._residents.load_failed(event.model_id, event.detail, now)
                return self._settle(now)
            case PreloadSuggested():
                self._preload_queue.suggest(event.model, now, required=event.required)
                return self._preload_queue.start(now)
            case ExchangeSuggested():
                return self._preload_queue.exchange(event.model, now)
            case ExchangeEnded():
                self._residents.end_exchange(event.model_id, event.succeeded, now)
                return self._settle(now)
            case UnloadRequested() | WithdrawSuggested() | ContentChanged() | IdleChecked():
                return self._unload(event, now)
            case WaitCanceled():
                self._wait_queue.cancel(event.ticket, now)
                return self._settle(now)
            case CapacityChanged() | UnaccountedChanged() | CatalogChanged() | ProtectedChanged():
                return self._change_capacity(event, now)
            case _:
                self._take_in(event, now)
                return ()

    # Queries

    @property
    def next_tick_s(self) -> float:
        """When a ``PreloadTick`` is due though nothing else has happened; it may lie in the past; infinite if never."""
        queue = self._preload_queue
        if self._waiting or (self._residents.preloading >= queue.max_preloads and not queue.may_load_pinned):
            return math.inf
        return -math.inf if queue.required or queue.suggested else self._policy.next_review_s

    @property
    def failures(self) -> dict[str, str]:
        """Why models could not be loaded of which no load has worked since, by model."""
        return self._residents.failures

    @property
    def capacity_bytes(self) -> int:
        """What the worker may take: models, and the workspace of executions."""
        return self._accounting.model_capacity_bytes + self._workspace_bytes

    @property
    def workspace_bytes(self) -> int:
        """What of the capacity is set aside for executions."""
        return self._workspace_bytes

    @property
    def model_capacity_bytes(self) -> int:
        """What all models, resident and loading, may take together."""
        return self._accounting.model_capacity_bytes

    @property
    def unaccounted_bytes(self) -> int:
        """What of the capacity is left to what no accounting covers."""
        return self._accounting.unaccounted_bytes

    @property
    def used_bytes(self) -> int:
        """Bytes of all models, resident and loading."""
        return self._accounting.used_bytes

    @property
    def max_loads(self) -> int:
        """Loads for requests that may be under way at the same time."""
        return self._wait_queue.max_loads

    @property
    def waiting(self) -> int:
        """Requests that wait for memory."""
        return len(self._waiting)

    def state(self, model_id: str) -> ModelState | None:
        """The state of a model, None when it is absent."""
        entry = self._entries.get(model_id)
        return entry.state if entry else None

    def rejection(self, model: ModelProfile, now: float) -> Reject | None:
        """Why no request for a model that is absent could be served now; None where one could."""
        return self._residents.rejection(model, now)

    def models(self) -> tuple[ResidentModel, ...]:
        """Every model that takes memory."""
        return tuple(
            ResidentModel(
                model_id=model_id,
                state=entry.state,
                size_bytes=entry.size_bytes,
                uses=entry.uses,
                unevictable=entry.unevictable,
                protected=entry.protected,
            )
            for model_id, entry in self._entries.items()
        )

    # Events

    def _unload(
        self, event: UnloadRequested | WithdrawSuggested | ContentChanged | IdleChecked, now: float
    ) -> tuple[Action, ...]:
        residents, entries = self._residents, self._entries
        match event:
            case UnloadRequested(model_id):
                residents.unload_by_operator(self._unloadable(model_id), now)
                return (Evict(model_id, "unload"), *self._settle(now))
            case WithdrawSuggested(model_id):
                entry = entries.get(model_id)
                if entry is None or not _is_spare(entry):
                    return ()
                residents.withdraw(entry, now)
                return (Evict(model_id, "placement"), *self._settle(now))
            case ContentChanged(model_id):
                entry = entries.get(model_id)
                if entry is None or entry.state is not ModelState.READY:
                    return ()
                residents.changed.add(model_id)
                self._may_owe_evictions = True
                return self._settle(now)
            case IdleChecked(since_s):
                unused = [entry for entry in entries.values() if entry.used_s <= since_s and _is_spare(entry)]
                for entry in unused:
                    residents.withdraw(entry, now)
                evictions = (Evict(entry.model.model_id, "idle") for entry in unused)
                return (*evictions, *self._settle(now)) if unused else ()

    def _unloadable(self, model_id: str) -> CacheEntry:
        entry = self._entries.get(model_id)
        if entry is None:
            raise NotFound(f"model {model_id} is not loaded here; nothing to unload")
        if entry.pinned:
            raise Conflict(f"model {model_id} is pinned; unpin it in the catalog before unloading it")
        if entry.protected:
            raise Conflict(f"model {model_id} has no copies to spare; lower its min_copies before unloading it")
        if entry.state is ModelState.LOADING or entry.uses:
            raise Conflict(f"model {model_id} is in use; unload it when its requests have ended")
        return entry

    def _change_capacity(
        self, event: CapacityChanged | UnaccountedChanged | CatalogChanged | ProtectedChanged, now: float
    ) -> tuple[Action, ...]:
        accounting = self._accounting
        match event:
            case CapacityChanged(capacity_bytes, workspace_bytes):
                _require_capacity(capacity_bytes, workspace_bytes)
                model_capacity_bytes = capacity_bytes - workspace_bytes
                if model_capacity_bytes < accounting.pinned_bytes:
                    raise ValueError(
                        f"{model_capacity_bytes} bytes are less than the {accounting.pinned_bytes} of pinned models"
                    )
                accounting.model_capacity_bytes, self._workspace_bytes = model_capacity_bytes, workspace_bytes
                accounting.limit_protected(0, now)
                return self._evict_due("reconfigure", now)
            case UnaccountedChanged(unaccounted_bytes):
                if unaccounted_bytes < 0:
                    raise ValueError(f"unaccounted_bytes must not be negative, not {unaccounted_bytes}")
                accounting.unaccounted_bytes = unaccounted_bytes
                return self._evict_due("memory", now)
            case CatalogChanged(models, pinned, successors):
                catalog = self._residents.set_catalog(models, pinned, successors, now)
                self._policy.on_catalog(tuple(catalog.values()), now)
                for model_id, successor in successors.items():
                    self._policy.on_succession(catalog[model_id], catalog[successor], now)
                return self._evict_due("reconfigure", now)
            case ProtectedChanged(model_ids):
                room_bytes = accounting.model_capacity_bytes - accounting.pinned_bytes
                largest_bytes = max((model.size_bytes for model in self._waiting.values()), default=0)
                accounting.protect(model_ids, room_bytes // 2, room_bytes - largest_bytes, now)
                return self._settle(now)

    def _take_in(
        self,
        event: LoadImpossible | RetryAllowed | ModelsKnown | PolicyChanged | ForwardCostsChanged,
        now: float,
    ) -> None:
        residents = self._residents
        match event:
            case LoadImpossible(model_id, detail):
                residents.remember_failure(model_id, detail, now)
            case RetryAllowed(model_id):
                residents.forget_failure(model_id)
            case ModelsKnown(models):
                residents.add_known(models)
                self._policy.on_catalog(models, now)
            case ForwardCostsChanged(forward_s):
                self._forward_costs = event
                self._policy.on_forward_costs(forward_s)
            case PolicyChanged(policy):
                policy.on_start(preloads=self._preload_queue.max_preloads > 0)
                policy.on_catalog(tuple(residents.catalog.values()), now)
                policy.on_forward_costs(self._forward_costs.forward_s)
                for entry in sorted(self._entries.values(), key=lambda entry: entry.used_s):
                    policy.on_load(entry.smaller or entry.model, now)
                    if entry.smaller is not None:
                        policy.on_exchange(entry.smaller, entry.model, now)
                self._policy = residents.policy = policy
                self._accounting.victims.set_policy(policy, now)
            case _:
                assert_never(event)

    def _settle(self, now: float) -> tuple[Action, ...]:
        """Let requests go on with what has become free, and evict what should have left as soon as it was idle."""
        actions = self._unload_removed(now) if self._may_owe_evictions else ()
        if self._waiting:
            actions += tuple(self._wait_queue.advance(now))
        if self._may_owe_evictions:
            if self._residents.has_due_evictions:
                actions += self._evict_due("memory" if self._accounting.unaccounted_bytes else "reconfigure", now)
            self._may_owe_evictions = self._residents.may_owe_evictions
        return actions

    def _evict_due(self, reason: EvictionReason, now: float) -> tuple[Action, ...]:
        """Evict what is idle of the models that are to leave, and of those beyond the capacity."""
        actions = self._unload_removed(now) + tuple(self._wait_queue.evict_excess(reason, now))
        self._may_owe_evictions = self._residents.may_owe_evictions
        return actions

    def _unload_removed(self, now: float) -> tuple[Action, ...]:
        """Unload what is idle of the models that are to leave, even a protected one: it is not what it was."""
        actions: list[Action] = []
        for entry in self._residents.removed:
            if _is_settled(entry):
                model_id = entry.model.model_id
                actions.append(Evict(model_id, "changed" if model_id in self._residents.changed else "reconfigure"))
                self._residents.unload(entry, now)
        return tuple(actions)


def _is_spare(entry: CacheEntry) -> bool:
    return _is_settled(entry) and not entry.unevictable


def _is_settled(entry: CacheEntry) -> bool:
    return entry.state is ModelState.READY and not entry.uses


def _require_capacity(capacity_bytes: int, workspace_bytes: int) -> None:
    if workspace_bytes < 0:
        raise ValueError(f"workspace_bytes must not be negative, not {workspace_bytes}")
    if capacity_bytes <= workspace_bytes:
        more = f"more than workspace_bytes={workspace_bytes}" if workspace_bytes else "positive"
        raise ValueError(f"capacity_bytes must be {more}, not {capacity_bytes}")
