"""Runs inferences in threads."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Generic, TypeVar
from weakref import WeakSet

from serve_app.core.queue_estimate import QueueEstimate
from serve_app.errors import Unavailable
from serve_app.serving.worker.model_backend import RunnableModel
from serve_app.serving.worker.model_manager import Lease
from serve_app.serving.worker.process_budget import ProcessBudget

Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class ExecutionResult(Generic[Result]):
    """The result of an inference, seconds in the queue for a thread, seconds of execution."""

    result: Result
    queue_s: float
    exec_s: float


class InferenceExecutor:
    """Threads for inferences, and an estimate of how long the next one waits for a thread.

    Args:
        slots: inferences at the same time.
        budget: of the process, which divides workspace among them.
        release: gives a lease back.
        name: of the worker, for errors.
        clock: monotonic seconds.

    Attributes:
        slots: inferences at the same time.
    """

    def __init__(
        self,
        *,
        slots: int,
        budget: ProcessBudget,
        release: Callable[[Lease], None],
        name: str,
        clock: Callable[[], float],
    ) -> None:
        self.slots = slots
        self._budget = budget
        self._release = release
        self._name = name
        self._clock = clock
        self._threads = ThreadPoolExecutor(slots, thread_name_prefix="infer")
        #: The first execution of a model that was loaded may wait for the disk, and must not keep others from a thread.
        self._first_threads = ThreadPoolExecutor(slots, thread_name_prefix="first")
        #: Models that have been executed since they were loaded.
        self._warm: WeakSet[RunnableModel] = WeakSet()
        self._queue = QueueEstimate()

    @property
    def queue_s(self) -> float:
        """Seconds until an inference that is submitted now begins."""
        return self._queue.wait_s(self.slots)

    async def execute(
        self,
        lease: Lease,
        run: Callable[[RunnableModel], Result],
        *,
        expected_s: float,
        workspace_bytes: int,
    ) -> ExecutionResult[Result]:
        """Run an inference and give the lease back.

        Args:
            lease: of the model.
            run: is called with the model, in a thread.
            expected_s: seconds that it probably takes.
            workspace_bytes: memory that it takes.

        Raises:
            Unavailable: no thread can be had.
        """
        submitted_s = self._clock()
        loop = asyncio.get_running_loop()
        done: asyncio.Future[ExecutionResult[Result]] = loop.create_future()

        def execute() -> None:
            try:
                with self._budget.workspace(workspace_bytes):
                    began_s = self._clock()
                    value = run(lease.runnable)
                    result = ExecutionResult(value, began_s - submitted_s, self._clock() - began_s)
            except BaseException as error:
                loop.call_soon_threadsafe(end, error)
            else:
                loop.call_soon_threadsafe(end, result)

        def end(result: ExecutionResult[Result] | BaseException) -> None:
            # In any case: the thread of a canceled request runs on, and its model must stay until it is done.
            self._ended(lease, expected_s)
            if done.cancelled():
                return
            if isinstance(result, BaseException):
                done.set_exception(result)
            else:
                self._warm.add(lease.runnable)
                done.set_result(result)

        self._queue.add(expected_s)
        threads = self._threads if lease.runnable in self._warm else self._first_threads
        try:
            job = threads.submit(execute)
        except RuntimeError as error:
            # The worker is shut down, or the machine has no thread left; another worker may do better.
            self._ended(lease, expected_s)
            raise Unavailable(f"a worker of {self._name} cannot run inferences: {error}") from error
        try:
            return await done
        except asyncio.CancelledError:
            if job.cancel():
                self._ended(lease, expected_s)
            raise

    def shutdown(self) -> None:
        """Take no more inferences, and block until those that run have ended."""
        for threads in (self._threads, self._first_threads):
            threads.shutdown()

    def _ended(self, lease: Lease, expected_s: float) -> None:
        self._queue.remove(expected_s)
        self._release(lease)
