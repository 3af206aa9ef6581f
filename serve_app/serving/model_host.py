"""Carries out what ``ModelCache`` decides: loads in threads, unloads, and lets requests wait their turn.

Everything runs on one event loop; only ``ModelBackend.load`` runs in threads.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import Protocol

from serve_app.core.cache import Answer, Grant, Hit, Join, Load, ModelCache, Reject, RejectReason, Wait
from serve_app.core.catalog import ModelProfile
from serve_app.core.routing import Outcome
from serve_app.errors import DoesNotFit, EdgeServeError, StoreError, Unavailable
from serve_app.serving.messages import FloatArray

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


class HostObserver(Protocol):
    """Is told what happened, for metrics."""

    def loaded(self, model_id: str, seconds: float) -> None:
        """A load has ended well."""

    def load_failed(self, model_id: str) -> None:
        """A load has failed."""

    def evicted(self, model_id: str, reason: str) -> None:
        """A model has been unloaded."""


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
        loaders: threads for loads, at least as many as the cache's ``max_loads``.
        clock: monotonic seconds.
        observer: is told of loads and evictions.
    """

    def __init__(
        self,
        *,
        cache: ModelCache,
        backend: ModelBackend,
        loaders: Executor,
        clock: Callable[[], float],
        observer: HostObserver,
    ) -> None:
        self.cache = cache
        self._backend = backend
        self._loaders = loaders
        self._clock = clock
        self._observer = observer
        self._runnables: dict[str, RunnableModel] = {}
        self._loads: dict[str, asyncio.Task[RunnableModel]] = {}
        self._waiters: dict[int, asyncio.Future[Answer]] = {}

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

    def close(self) -> None:
        """Unload everything that is not being loaded."""
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
        if isinstance(answer, Wait):
            answer = await self._wait(model.model_id, answer.ticket)
        elif isinstance(answer, Load):
            self._start_load(model.model_id, answer)
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
        task = self._loads[model_id]
        try:
            await asyncio.shield(task)
        except asyncio.CancelledError:
            self._finish_after(task, model_id)
            raise

    def _finish_after(self, task: asyncio.Task[RunnableModel], model_id: str) -> None:
        def finish(ended: asyncio.Task[RunnableModel]) -> None:
            if not ended.cancelled() and ended.exception() is None:
                self._finish(model_id)

        task.add_done_callback(finish)

    def _finish(self, model_id: str) -> None:
        self._carry_out(self.cache.finish(model_id, self._clock()))

    def _carry_out(self, grants: Iterable[Grant]) -> None:
        """Act on the answers of those who waited, and wake them."""
        for grant in grants:
            if isinstance(grant.answer, Load):
                self._start_load(grant.model_id, grant.answer)
        for grant in grants:
            waiter = self._waiters.get(grant.ticket)
            if waiter is None or waiter.done():
                self._abandon(grant.model_id, grant.answer)
            else:
                waiter.set_result(grant.answer)

    def _abandon(self, model_id: str, answer: Answer) -> None:
        """Nobody wants this answer any more: give its pin back."""
        match answer:
            case Hit():
                self._finish(model_id)
            case Join() | Load():
                self._finish_after(self._loads[model_id], model_id)
            case Reject():
                pass

    def _start_load(self, model_id: str, load: Load) -> None:
        for victim in load.victims:
            self._drop(victim, "capacity")
        task = asyncio.get_running_loop().create_task(self._load(model_id), name=f"load {model_id}")
        self._loads[model_id] = task

    async def _load(self, model_id: str) -> RunnableModel:
        began_s = self._clock()
        try:
            runnable = await asyncio.get_running_loop().run_in_executor(self._loaders, self._backend.load, model_id)
        except Exception as error:
            detail = str(error) if isinstance(error, EdgeServeError) else f"{type(error).__name__}: {error}"
            logger.exception("loading %s failed", model_id)
            self._observer.load_failed(model_id)
            self._carry_out(self.cache.failed(model_id, detail, self._clock()))
            raise StoreError(f"model {model_id} cannot be loaded: {detail}") from error
        self._runnables[model_id] = runnable
        self._observer.loaded(model_id, self._clock() - began_s)
        self._carry_out(self.cache.loaded(model_id, self._clock()))
        return runnable

    def _drop(self, model_id: str, reason: str) -> None:
        try:
            self._runnables.pop(model_id).unload()
        except Exception:
            # It is out of the books already, and the load or the requests that need its place must go on.
            logger.exception("unloading %s failed", model_id)
        self._loads.pop(model_id, None)
        self._observer.evicted(model_id, reason)


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
