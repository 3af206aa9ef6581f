"""Carries out what ``ModelCache`` decides: loads in threads, unloads, and lets requests wait their turn.

Everything runs on one event loop; only ``ModelBackend.load`` runs in threads. Background loads are asked for by a timer
and have threads of their own, so that no request ever waits for a thread that works on a guess.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Callable, Iterable
from concurrent.futures import Executor, Future
from dataclasses import dataclass

from serve_app.core.cache.decisions import (
    Action,
    Answer,
    Evict,
    EvictionReason,
    Grant,
    Hit,
    Join,
    Load,
    Reject,
    RejectReason,
    StartExchange,
    StartLoad,
    StartShrink,
    Wait,
)
from serve_app.core.cache.events import (
    TICK,
    Event,
    ExchangeEnded,
    LoadEnded,
    LoadFailed,
    LoadImpossible,
    PreloadSuggested,
    RetryAllowed,
    WaitCanceled,
)
from serve_app.core.cache.model_cache import ModelCache
from serve_app.core.catalog import ModelProfile
from serve_app.core.forms import key_of_tier
from serve_app.core.vocabulary import ModelState, Outcome
from serve_app.errors import DoesNotFit, EdgeServeError, StoreError, Unavailable
from serve_app.serving.worker.model_backend import ModelBackend, ModelObserver, RunnableModel, Timer

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Loading:
    """The load that brings, or has brought, a model in: what runs in the thread, and what then happens here."""

    job: Future[RunnableModel]
    task: asyncio.Task[None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Lease:
    """A model pinned in memory for one request, until ``ModelManager.release``."""

    model_id: str
    runnable: RunnableModel
    outcome: Outcome
    wait_s: float
    load_s: float
    evicted: tuple[str, ...]


class ModelManager:
    """The models of one worker.

    Args:
        cache: decides; only this manager changes it.
        backend: loads models.
        loaders: threads for loads that requests wait for, at least as many as the cache's ``max_loads``.
        preloaders: threads for background loads, as many as the cache's ``max_preloads``. A load that was evicted for a
            request holds its thread, and memory beyond the accounting, until it ends; more threads would be more of
            those.
        clock: monotonic seconds.
        call_at: calls a function at a time of ``clock``; an event loop's own.
        observer: records loads and evictions.
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
        observer: ModelObserver,
    ) -> None:
        self.cache = cache
        self._backend = backend
        self._loaders = loaders
        self._preloaders = preloaders
        self._clock = clock
        self._call_at = call_at
        self._observer = observer
        self._runnables: dict[str, RunnableModel] = {}
        #: How many leases use what is in memory, which is two forms of a model while one takes the place of the other.
        self._leases: dict[RunnableModel, int] = {}
        #: Forms whose place another one has taken, until nothing uses them any more.
        self._former: dict[RunnableModel, asyncio.Future[None]] = {}
        self._exchanges: set[asyncio.Task[None]] = set()
        self._loads: dict[str, _Loading] = {}
        #: Background loads that were evicted for a request and whose threads still run.
        self._abandoned: dict[str, _Loading] = {}
        #: Models whose last load failed, which has been logged.
        self._failed_last: set[str] = set()
        #: Models that no load could bring in when they were looked at last.
        self._impossible: set[str] = set()
        self._timer: Timer | None = None
        self._timer_s = math.inf
        self._is_closed = False
        self._waiters: dict[int, asyncio.Future[Answer]] = {}

    @property
    def own_bytes(self) -> int:
        """What of the memory of models is no page of a file; all of those that are being loaded may be."""
        loading = (model.size_bytes for model in self.cache.models() if model.state is ModelState.LOADING)
        return sum(runnable.own_bytes for runnable in (*self._runnables.values(), *self._former)) + sum(loading)

    def handle(self, event: Event) -> None:
        """Let the cache take in an event, and carry out what it decides; raises what ``ModelCache.handle`` raises."""
        self._apply(self.cache.handle(event, self._clock()))

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
        self.handle(RetryAllowed(model.model_id))
        self.release(await self.acquire(model))

    async def preload(self, model: ModelProfile) -> None:
        """Bring a model into memory by a required preload, and wait until it is there.

        Raises:
            DoesNotFit: it is larger than the memory that can ever be free.
            Unavailable: it cannot be loaded in the background now.
            StoreError: it cannot be loaded.
        """
        self._check(model.model_id)
        self.handle(PreloadSuggested(model, required=True))
        loading = self._loads.get(model.model_id)
        if loading is None:
            rejection = self.cache.rejection(model, self._clock())
            if rejection is not None:
                raise _error(rejection)
            raise Unavailable(f"there is no room now to preload model {model.model_id} of {model.size_bytes} bytes")
        await asyncio.shield(loading.task)

    def release(self, lease: Lease) -> None:
        """The request no longer uses the model."""
        left = self._leases[lease.runnable] - 1
        if left:
            self._leases[lease.runnable] = left
        else:
            del self._leases[lease.runnable]
            if self._former and (unused := self._former.pop(lease.runnable, None)) is not None:
                unused.set_result(None)
        self._finish(lease.model_id)

    def recheck(self, model_ids: Iterable[str]) -> None:
        """Look, in microseconds each, whether loads of these models could work, and of those that could not before."""
        for model_id in {*model_ids, *self._impossible}:
            try:
                self._backend.check(model_id)
            except StoreError as error:
                if model_id not in self._impossible:
                    self._impossible.add(model_id)
                    self.handle(LoadImpossible(model_id, str(error)))
            else:
                if model_id in self._impossible:
                    self._impossible.discard(model_id)
                    self.handle(RetryAllowed(model_id))

    def close(self) -> None:
        """Unload everything that is not being loaded for a request, and preload no more."""
        self._is_closed = True
        if self._timer is not None:
            self._timer.cancel()
        for model in self.cache.models():
            if model.state is ModelState.LOADING and not model.uses:
                self._cancel_load(model.model_id)
        for model_id in list(self._runnables):
            self._runnables.pop(model_id).unload()

    def _check(self, model_id: str) -> None:
        """Find out that a load cannot work before good models are displaced for it."""
        if self.cache.state(model_id) is None:
            try:
                self._backend.check(model_id)
            except StoreError as error:
                self._impossible.add(model_id)
                self.handle(LoadImpossible(model_id, str(error)))

    async def _lease(self, model: ModelProfile, answer: Answer | Wait) -> Lease:
        asked_s = self._clock()
        if isinstance(answer, Wait):
            self._set_timer()
            answer = await self._wait(model.model_id, answer.ticket)
        else:
            self._apply(answer.actions(model) if isinstance(answer, Load) else ())
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
        runnable = self._runnables[model.model_id]
        self._leases[runnable] = self._leases.get(runnable, 0) + 1
        return Lease(
            model_id=model.model_id,
            runnable=runnable,
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
                self._release_unclaimed(model_id, waiter.result())
            else:
                self.handle(WaitCanceled(ticket))
            raise
        finally:
            self._waiters.pop(ticket, None)

    async def _loaded(self, model_id: str) -> None:
        """Wait for the load under way. A request that is canceled meanwhile gives its pin back when it ends."""
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
        self._apply(self.cache.finish(model_id, self._clock()))

    def _apply(self, actions: tuple[Action, ...]) -> None:
        """Carry out what the cache has decided, in order, and wake the requests that it answers."""
        unclaimed = []
        for action in actions:
            match action:
                case Evict(model_id, reason):
                    self._evict(model_id, reason)
                case StartLoad(model, background):
                    self._start_load(model.model_id, background)
                case StartExchange(model):
                    self._start_exchange(model)
                case StartShrink(model):
                    self._start_shrink(model.model_id)
                case Grant(ticket, model_id, answer):
                    waiter = self._waiters.get(ticket)
                    if waiter is None or waiter.done():
                        unclaimed.append((model_id, answer))
                    else:
                        waiter.set_result(answer)
        for model_id, answer in unclaimed:
            self._release_unclaimed(model_id, answer)
        self._set_timer()

    def _release_unclaimed(self, model_id: str, answer: Answer) -> None:
        """Give back the pin of a request that was canceled before its answer came."""
        match answer:
            case Hit():
                self._finish(model_id)
            case Join() | Load():
                self._finish_after(self._loads[model_id].task, model_id)
            case Reject():
                pass

    def _set_timer(self) -> None:
        """Have ``_tick`` called when it is due. A timer that goes off too early is left: it sets itself again."""
        due_s = self.cache.next_tick_s
        if due_s < self._timer_s and not self._is_closed:
            if self._timer is not None:
                self._timer.cancel()
            self._timer, self._timer_s = self._call_at(due_s, self._tick), due_s

    def _tick(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer, self._timer_s = None, math.inf
        if self.cache.next_tick_s <= self._clock() and not self._is_closed:
            self.handle(TICK)
        else:
            self._set_timer()

    def _start_load(self, model_id: str, background: bool) -> None:
        if background:
            self._observer.preload_started()
        # An abandoned load of this model that still runs will do: the backend must not run two at a time.
        if model_id in self._abandoned:
            self._loads[model_id] = self._abandoned.pop(model_id)
        else:
            self._loads[model_id] = self._begin(model_id, background=background)

    def _begin(self, model_id: str, *, background: bool) -> _Loading:
        job: Future[RunnableModel]
        try:
            job = (self._preloaders if background else self._loaders).submit(self._backend.load, model_id)
        except RuntimeError as error:
            # No thread could be started. The cache counts on this load, so this must come out where failed loads do.
            job = Future()
            job.set_exception(error)
        task = asyncio.get_running_loop().create_task(self._load(model_id, job, background), name=f"load {model_id}")
        # No request may wait for it, and then nothing else looks at its failure.
        task.add_done_callback(lambda ended: ended.cancelled() or ended.exception())
        return _Loading(job, task)

    async def _load(self, model_id: str, job: Future[RunnableModel], background: bool) -> None:
        began_s = self._clock()
        try:
            runnable = await asyncio.wrap_future(job)
        except Exception as error:
            raise self._failed(model_id, error, background) from error
        self._failed_last.discard(model_id)
        self._observer.loaded(model_id, self._clock() - began_s)
        if self._abandoned.pop(model_id, None) is not None:
            _unload(model_id, runnable)
            return
        self._runnables[model_id] = runnable
        self.handle(LoadEnded(model_id))

    def _start_shrink(self, model_id: str) -> None:
        """Load the form in which a model was loaded first in the place of the one in memory, which nothing uses."""
        if self._is_closed:
            return
        _unload(model_id, self._runnables.pop(model_id))
        # Requests may join it, so it must not wait for a thread that works on a guess.
        self._loads[model_id] = self._begin(model_id, background=False)

    def _start_exchange(self, model: ModelProfile) -> None:
        key = key_of_tier(model.model_id, model.tier)
        task = asyncio.get_running_loop().create_task(self._exchange(model.model_id, key), name=f"exchange {key}")
        self._exchanges.add(task)
        task.add_done_callback(self._exchanges.discard)

    async def _exchange(self, model_id: str, key: str) -> None:
        """Load another form of a model beside the one in memory, and let it take that one's place."""
        try:
            job = self._preloaders.submit(self._backend.load, key)
            runnable = await asyncio.wrap_future(job)
        except Exception as error:
            # The model goes on in the form that it has.
            logger.warning("model %s stays in its form: %s", model_id, error)
            self.handle(ExchangeEnded(model_id, succeeded=False))
            return
        if self._is_closed:
            _unload(model_id, runnable)
            return
        former, self._runnables[model_id] = self._runnables[model_id], runnable
        if former in self._leases:
            unused = self._former[former] = asyncio.get_running_loop().create_future()
            await unused
        _unload(model_id, former)
        self.handle(ExchangeEnded(model_id, succeeded=True))

    def _failed(self, model_id: str, error: Exception, background: bool) -> StoreError:
        detail = str(error) if isinstance(error, EdgeServeError) else f"{type(error).__name__}: {error}"
        if not background or model_id not in self._failed_last:
            # The policy may preload the same model again and again: one line says it all.
            logger.error("loading %s failed", model_id, exc_info=error)
        self._failed_last.add(model_id)
        self._observer.load_failed(model_id)
        if self._abandoned.pop(model_id, None) is None:
            self.handle(LoadFailed(model_id, detail))
        return StoreError(f"model {model_id} cannot be loaded: {detail}")

    def _evict(self, model_id: str, reason: EvictionReason) -> None:
        runnable = self._runnables.pop(model_id, None)
        if runnable is None:
            self._cancel_load(model_id)
        else:
            del self._loads[model_id]
            _unload(model_id, runnable)
        self._observer.evicted(model_id, reason)

    def _cancel_load(self, model_id: str) -> None:
        """Cancel a background load that no request has joined; one that runs already is unloaded when it ends."""
        loading = self._loads.pop(model_id)
        if not loading.task.done() and not loading.job.cancel():
            self._abandoned[model_id] = loading


def _unload(model_id: str, runnable: RunnableModel) -> None:
    try:
        runnable.unload()
    except Exception:
        # The cache counts it no more, and the load or the requests that need its place must go on.
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
