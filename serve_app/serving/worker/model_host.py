"""Carries out what ``ModelCache`` decides: loads in threads, unloads, and lets requests wait their turn.

Everything runs on one event loop; only ``ModelBackend.load`` runs in threads. Background loads are asked for by a timer
and have threads of their own, so that no request ever waits for a thread that works on a guess.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from concurrent.futures import Executor, Future
from dataclasses import dataclass
from typing import Literal, Protocol

from serve_app.core.cache.decisions import Answer, Grant, Hit, Join, Load, Reject, RejectReason, Shed, Wait
from serve_app.core.cache.model_cache import ModelCache
from serve_app.core.catalog import ModelProfile
from serve_app.core.policies.base import EvictionPolicy
from serve_app.core.vocabulary import ModelState, Outcome
from serve_app.errors import DoesNotFit, EdgeServeError, StoreError, Unavailable
from serve_app.serving.transport.messages import FloatArray

logger = logging.getLogger(__name__)


class RunnableModel(Protocol):
    """A model in memory."""

    def infer(self, batch: FloatArray) -> FloatArray:
        """Logits ``[N, classes]`` of a batch ``[N, 3, H, W]``."""

    def unload(self) -> None:
        """Give its memory back."""


class ModelBackend(Protocol):
    """Brings models into memory."""

    def check(self, model_id: str) -> None:
        """Look, in microseconds, whether a load could work; raises ``StoreError`` if not."""

    def load(self, model_id: str) -> RunnableModel:
        """Load one model; called in a thread, for several models at a time."""


#: What made a model leave: room for a request's load, room for a background load, an order by hand, an order of
#: placement, that nobody asked for it, another configuration, or that the process has grown by something else.
EvictionReason = Literal["capacity", "preload", "unload", "placement", "idle", "reconfigure", "memory"]


class HostObserver(Protocol):
    """Is told what happened, for metrics."""

    def preloading(self) -> None:
        """A load that nobody asked for begins."""

    def loaded(self, model_id: str, seconds: float) -> None:
        """A load has ended well."""

    def load_failed(self, model_id: str) -> None:
        """A load has failed."""

    def evicted(self, model_id: str, reason: EvictionReason) -> None:
        """A model has been unloaded, or its background load given up."""


class Timer(Protocol):
    """Something that will be done later."""

    def cancel(self) -> None:
        """Do not do it."""


@dataclass(frozen=True, slots=True)
class _Loading:
    """The load that brings, or has brought, a model in: what runs in the thread, and what then happens here."""

    job: Future[RunnableModel]
    task: asyncio.Task[None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Lease:
    """A model pinned in memory for one request, until ``ModelHost.release``."""

    model_id: str
    runnable: RunnableModel
    outcome: Outcome
    wait_s: float
    load_s: float
    evicted: tuple[str, ...]


class ModelHost:
    """The models of one worker.

    Args:
        cache: the books; nobody else may change them.
        backend: loads models.
        loaders: threads for loads that requests wait for, at least as many as the cache's ``max_loads``.
        preloaders: threads for background loads, as many as the cache's ``max_preloads``. One that was given up for a
            request holds its thread, and memory beyond the books, until it ends; more threads would be more of those.
        clock: monotonic seconds.
        call_at: calls a function at a time of ``clock``; an event loop's own.
        observer: is told of loads and evictions.
    """

    def __init__(
        self,
        *,
        cache: ModelCache,
        backend: ModelBackend,
        loaders: Executor,
        preloaders: Executor,
        clock: Callable[[], float],
        call_at: Callable[[float, Callable[[], None]], Timer],
        observer: HostObserver,
    ) -> None:
        self.cache = cache
        self._backend = backend
        self._loaders = loaders
        self._preloaders = preloaders
        self._clock = clock
        self._call_at = call_at
        self._observer = observer
        self._runnables: dict[str, RunnableModel] = {}
        self._loads: dict[str, _Loading] = {}
        #: Background loads that gave way to a request and whose threads still run.
        self._given_up: dict[str, _Loading] = {}
        #: Models whose last load failed, which has been logged.
        self._broken: set[str] = set()
        self._timer: Timer | None = None
        self._timer_s = math.inf
        self._is_closed = False
        self._waiters: dict[int, asyncio.Future[Answer]] = {}

    def know(self, models: Iterable[ModelProfile]) -> None:
        """These models can be asked for, and preloaded."""
        self.cache.know(models, self._clock())
        self._set_timer()

    def forward_costs(self, forward_s: Mapping[str, float]) -> None:
        """What a forward to the next holder of a model costs; see ``ModelCache.forward_costs``."""
        self.cache.forward_costs(forward_s)
        self._set_timer()

    async def acquire(self, model: ModelProfile) -> Lease:
        """Bring a user's model into memory and pin it.

        Raises:
            DoesNotFit: it is larger than the memory that can ever be free.
            Unavailable: too many requests wait for memory already.
            StoreError: it cannot be loaded.
        """
        self._check(model.model_id)
        return await self._lease(model, self.cache.request(model, self._clock()))

    async def load(self, model: ModelProfile) -> None:
        """Bring a model into memory by hand, whatever failed before; counts as a request; raises like ``acquire``."""
        self.cache.forget_failure(model.model_id)
        self.release(await self.acquire(model))

    async def preload(self, model: ModelProfile) -> None:
        """Bring a model into memory that nobody has asked for; raises like ``acquire``."""
        self._check(model.model_id)
        self.release(await self._lease(model, self.cache.preload(model, self._clock())))

    def release(self, lease: Lease) -> None:
        """The request no longer uses the model."""
        self._finish(lease.model_id)

    def unload(self, model_id: str) -> None:
        """Take a model out of memory by hand; raises ``NotFound`` or ``Conflict``."""
        grants = self.cache.unload(model_id, self._clock())
        self._drop(model_id, "unload")
        self._carry_out(grants)

    def advise(self, model: ModelProfile, *, insist: bool = False) -> None:
        """Bring a model in when the background has time for it, and it is worth it; see ``ModelCache.advise``."""
        self.cache.advise(model, self._clock(), insist=insist)
        self._review()

    def withdraw(self, model_id: str) -> bool:
        """Take a model out on the advice of placement; whether that was possible now."""
        grants = self.cache.withdraw(model_id, self._clock())
        if grants is None:
            return False
        self._drop(model_id, "placement")
        self._carry_out(grants)
        return True

    def withdraw_unused(self, unused_s: float) -> None:
        """Take out every model that nobody has asked for in so many seconds."""
        now = self._clock()
        self._shed(self.cache.withdraw_unused(now - unused_s, now), "idle")

    def protect(self, model_ids: Sequence[str]) -> None:
        """Pin the copies that the cluster cannot spare; see ``ModelCache.keep``."""
        self.cache.protect(model_ids, self._clock())

    def resize(self, capacity_bytes: int) -> None:
        """Give the models more memory, or less; raises ``ValueError`` if the pinned ones need more."""
        self._shed(self.cache.resize(capacity_bytes, self._clock()), "reconfigure")

    def reserve(self, reserved_bytes: int) -> None:
        """Leave so much of the memory to what is no model; see ``ModelCache.reserve``."""
        self._shed(self.cache.reserve(reserved_bytes, self._clock()), "memory")

    def use(self, policy: EvictionPolicy) -> None:
        """Rank by another policy from now on."""
        self.cache.use(policy, self._clock())
        self._set_timer()

    def offer(self, models: Iterable[ModelProfile], pinned: Collection[str]) -> None:
        """The catalogue is now this one; what it no longer has leaves when it is idle."""
        self._shed(self.cache.offer(models, pinned, self._clock()), "reconfigure")

    def close(self) -> None:
        """Unload everything that is not being loaded for a request, and preload no more."""
        self._is_closed = True
        if self._timer is not None:
            self._timer.cancel()
        for model in self.cache.models():
            if model.state is ModelState.LOADING and not model.uses:
                self._give_up(model.model_id)
        for model_id in list(self._runnables):
            self._runnables.pop(model_id).unload()

    def _check(self, model_id: str) -> None:
        """Find out that a load cannot work before good models are displaced for it."""
        if self.cache.state(model_id) is None:
            try:
                self._backend.check(model_id)
            except StoreError as error:
                self.cache.cannot_load(model_id, str(error), self._clock())

    async def _lease(self, model: ModelProfile, answer: Answer | Wait) -> Lease:
        asked_s = self._clock()
        self._set_timer()
        if isinstance(answer, Wait):
            answer = await self._wait(model.model_id, answer.ticket)
        elif isinstance(answer, Load):
            self._start(model.model_id, answer.victims, "capacity")
        began_s = self._clock()
        match answer:
            case Hit():
                return self._lease_of(model, Outcome.HIT, began_s - asked_s)
            case Join():
                await self._loaded(model.model_id)
                return self._lease_of(model, Outcome.JOIN, began_s - asked_s, self._clock() - began_s)
            case Load(victims=victims):
                await self._loaded(model.model_id)
                return self._lease_of(model, Outcome.LOAD, began_s - asked_s, self._clock() - began_s, victims)
            case Reject():
                raise _error(answer)

    def _lease_of(
        self, model: ModelProfile, outcome: Outcome, wait_s: float, load_s: float = 0.0, evicted: tuple[str, ...] = ()
    ) -> Lease:
        return Lease(
            model_id=model.model_id,
            runnable=self._runnables[model.model_id],
            outcome=outcome,
            wait_s=wait_s,
            load_s=load_s,
            evicted=evicted,
        )

    async def _wait(self, model_id: str, ticket: int) -> Answer:
        waiter: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        self._waiters[ticket] = waiter
        try:
            return await waiter
        except asyncio.CancelledError:
            if waiter.done() and not waiter.cancelled():
                self._abandon(model_id, waiter.result())
            else:
                self._carry_out(self.cache.give_up(ticket, self._clock()))
            raise
        finally:
            self._waiters.pop(ticket, None)

    async def _loaded(self, model_id: str) -> None:
        """Wait for the load under way. A request that is cancelled meanwhile gives its pin back when it ends."""
        task = self._loads[model_id].task
        try:
            await asyncio.shield(task)
        except asyncio.CancelledError:
            self._finish_after(task, model_id)
            raise

    def _finish_after(self, task: asyncio.Task[None], model_id: str) -> None:
        def finish(ended: asyncio.Task[None]) -> None:
            if not ended.cancelled() and ended.exception() is None:
                self._finish(model_id)

        task.add_done_callback(finish)

    def _finish(self, model_id: str) -> None:
        self._carry_out(self.cache.finish(model_id, self._clock()))
        if self.cache.must_shed:
            self._shed_rest()

    def _shed_rest(self) -> None:
        """What was in use when its memory was taken away may be idle now."""
        self._shed(self.cache.shed(self._clock()), "memory" if self.cache.reserved_bytes else "reconfigure")

    def _shed(self, shed: Shed, reason: EvictionReason) -> None:
        for victim in shed.victims:
            self._drop(victim, reason)
        self._carry_out(shed.grants)

    def _carry_out(self, grants: Iterable[Grant]) -> None:
        """Act on the answers of those who waited, and wake them."""
        for grant in grants:
            if isinstance(grant.answer, Load):
                self._start(grant.model_id, grant.answer.victims, "capacity")
        for grant in grants:
            waiter = self._waiters.get(grant.ticket)
            if waiter is None or waiter.done():
                self._abandon(grant.model_id, grant.answer)
            else:
                waiter.set_result(grant.answer)
        self._set_timer()

    def _abandon(self, model_id: str, answer: Answer) -> None:
        """Nobody wants this answer any more: give its pin back."""
        match answer:
            case Hit():
                self._finish(model_id)
            case Join() | Load():
                self._finish_after(self._loads[model_id].task, model_id)
            case Reject():
                pass

    def _set_timer(self) -> None:
        """Have ``_review`` called when it is due. A timer that goes off too early is left: it sets itself anew."""
        due_s = self.cache.review_s
        if due_s < self._timer_s and not self._is_closed:
            if self._timer is not None:
                self._timer.cancel()
            self._timer, self._timer_s = self._call_at(due_s, self._review), due_s

    def _review(self) -> None:
        """Begin the background loads that the cache now wants."""
        if self._timer is not None:
            self._timer.cancel()
        self._timer, self._timer_s = None, math.inf
        now = self._clock()
        if self.cache.review_s <= now and not self._is_closed:
            while (preload := self.cache.next_preload(now)) is not None:
                self._observer.preloading()
                self._start(preload.model.model_id, preload.victims, "preload")
        self._set_timer()

    def _start(self, model_id: str, victims: Iterable[str], reason: EvictionReason) -> None:
        for victim in victims:
            self._drop(victim, reason)
        # A load of this model that was given up and still runs will do: the backend must not run two at a time.
        if model_id in self._given_up:
            self._loads[model_id] = self._given_up.pop(model_id)
        else:
            self._loads[model_id] = self._begin(model_id, background=reason == "preload")

    def _begin(self, model_id: str, *, background: bool) -> _Loading:
        job: Future[RunnableModel]
        try:
            job = (self._preloaders if background else self._loaders).submit(self._backend.load, model_id)
        except RuntimeError as error:
            # No thread could be started. The model is in the books, so this must come out where failed loads do.
            job = Future()
            job.set_exception(error)
        task = asyncio.get_running_loop().create_task(self._load(model_id, job, background), name=f"load {model_id}")
        # Nobody may be waiting for it, and then nobody but us looks at its failure.
        task.add_done_callback(lambda ended: ended.cancelled() or ended.exception())
        return _Loading(job, task)

    async def _load(self, model_id: str, job: Future[RunnableModel], background: bool) -> None:
        began_s = self._clock()
        try:
            runnable = await asyncio.wrap_future(job)
        except Exception as error:
            raise self._failed(model_id, error, background) from error
        self._broken.discard(model_id)
        self._observer.loaded(model_id, self._clock() - began_s)
        if self._given_up.pop(model_id, None) is not None:
            _unload(model_id, runnable)
            return
        self._runnables[model_id] = runnable
        self._carry_out(self.cache.loaded(model_id, self._clock()))
        if self.cache.must_shed:
            # Whoever has asked for it uses it already, so only a load that nobody asked for may have come in vain.
            self._shed_rest()

    def _failed(self, model_id: str, error: Exception, background: bool) -> StoreError:
        detail = str(error) if isinstance(error, EdgeServeError) else f"{type(error).__name__}: {error}"
        if not background or model_id not in self._broken:
            # The policy may wish for the same model again and again: one line says it all.
            logger.error("loading %s failed", model_id, exc_info=error)
        self._broken.add(model_id)
        self._observer.load_failed(model_id)
        if self._given_up.pop(model_id, None) is None:
            self._carry_out(self.cache.failed(model_id, detail, self._clock()))
        return StoreError(f"model {model_id} cannot be loaded: {detail}")

    def _drop(self, model_id: str, reason: EvictionReason) -> None:
        runnable = self._runnables.pop(model_id, None)
        if runnable is None:
            self._give_up(model_id)
        else:
            del self._loads[model_id]
            _unload(model_id, runnable)
        self._observer.evicted(model_id, reason)

    def _give_up(self, model_id: str) -> None:
        """Let a background load that nobody has joined run out, and what it brings in be dropped."""
        loading = self._loads.pop(model_id)
        if not loading.job.cancel():
            self._given_up[model_id] = loading


def _unload(model_id: str, runnable: RunnableModel) -> None:
    try:
        runnable.unload()
    except Exception:
        # It is out of the books already, and the load or the requests that need its place must go on.
        logger.exception("unloading %s failed", model_id)


def _error(reject: Reject) -> EdgeServeError:
    match reject.reason:
        case RejectReason.TOO_LARGE:
            return DoesNotFit(f"{reject.detail}; give the location more memory")
        case RejectReason.QUEUE_FULL:
            return Unavailable(f"{reject.detail}; try again later", reject.retry_s)
        case RejectReason.LOAD_FAILED:
            return StoreError(
                f"the model cannot be loaded, and is not tried for {reject.retry_s:.1f} s: {reject.detail}"
            )
