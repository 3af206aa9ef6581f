"""Runs inferences in threads: alone on all cores, side by side, or several requests in one execution."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from weakref import WeakSet

from serve_app.core.execution_threads import is_long, threads_for
from serve_app.core.joined_executions import Joinable, added_s, count_joined
from serve_app.core.queue_estimate import QueueEstimate
from serve_app.errors import Unavailable
from serve_app.serving.worker.execution import Executed, Execution, run_alone, run_joined
from serve_app.serving.worker.machine import runnable_threads
from serve_app.serving.worker.model_backend import RunnableModel
from serve_app.serving.worker.model_manager import Lease
from serve_app.serving.worker.process_budget import ProcessBudget

logger = logging.getLogger(__name__)

#: What two waiting requests must have in common to be executed together.
_Key = tuple[RunnableModel, tuple[int, ...]]


@dataclass(frozen=True, slots=True, kw_only=True)
class ExecutionResult:
    """The result of an inference.

    Attributes:
        result: outputs or answer.
        queue_s: seconds in the queue for a thread.
        exec_s: seconds of execution.
        times_longer: how many times longer that takes than an execution of the least sizes.
        share: of the request in the execution; below 1 where it was executed together with others.
        requests: that were executed together.
    """

    result: Executed
    queue_s: float
    exec_s: float
    times_longer: float
    share: float = 1.0
    requests: int = 1


@dataclass(slots=True, kw_only=True, eq=False)
class _Job:
    """A request that waits for a slot, or runs."""

    lease: Lease
    execution: Execution
    times_longer: float
    expected_s: float
    workspace_bytes: int
    joinable: Joinable | None
    submitted_s: float
    loop: asyncio.AbstractEventLoop
    done: asyncio.Future[ExecutionResult]
    #: What it counts with in the estimate of the queue.
    added_s: float = 0.0
    #: By a thread, or by its cancellation.
    taken: bool = False
    key: _Key | None = field(default=None)


class InferenceExecutor:
    """Threads for inferences, and an estimate of how long the next one waits for a thread.

    Args:
        slots: inferences at the same time.
        budget: of the process, which divides workspace among them.
        release: gives a lease back.
        name: of the worker, for errors.
        clock: monotonic seconds.
        cores: for one inference where nothing else runs.
        machine_others: counts what else runs on the machine.

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
        cores: int = 1,
        machine_others: Callable[[], int] = runnable_threads,
    ) -> None:
        self.slots = slots
        self._budget = budget
        self._release = release
        self._name = name
        self._clock = clock
        self._cores = cores
        self._machine_others = machine_others
        self._threads = ThreadPoolExecutor(slots, thread_name_prefix="infer")
        #: The first execution of a model that was loaded may wait for the disk, and must not keep others from a thread.
        self._first_threads = ThreadPoolExecutor(slots, thread_name_prefix="first")
        #: Models that have been executed since they were loaded.
        self._warm: WeakSet[RunnableModel] = WeakSet()
        self._queue = QueueEstimate()
        #: Of what follows, which threads change too.
        self._lock = threading.Lock()
        self._waiting: deque[_Job] = deque()
        self._rows_waiting: dict[_Key, int] = {}
        self._not_ended = 0

    @property
    def queue_s(self) -> float:
        """Seconds until an inference that is submitted now begins."""
        return self._queue.wait_s(self.slots)

    async def execute(
        self,
        lease: Lease,
        execution: Execution,
        *,
        least_s: float,
        times_longer: float,
        workspace_bytes: int,
        joinable: Joinable | None = None,
    ) -> ExecutionResult:
        """Run an inference and give the lease back.

        Args:
            lease: of the model.
            execution: of the request.
            least_s: seconds that an execution of the least sizes probably takes.
            times_longer: how many times longer this one takes.
            workspace_bytes: memory that it takes.
            joinable: it may be executed together with requests that wait as well.

        Raises:
            Unavailable: no thread can be had.
        """
        loop = asyncio.get_running_loop()
        job = _Job(
            lease=lease,
            execution=execution,
            times_longer=times_longer,
            expected_s=least_s * times_longer,
            workspace_bytes=workspace_bytes,
            joinable=joinable,
            submitted_s=self._clock(),
            loop=loop,
            done=loop.create_future(),
        )
        try:
            self._submit(job)
        except RuntimeError as error:
            # The worker is shut down, or the machine has no thread left; another worker may do better.
            self._cancel(job)
            raise Unavailable(f"a worker of {self._name} cannot run inferences: {error}") from error
        try:
            return await job.done
        except asyncio.CancelledError:
            self._cancel(job)
            raise

    def shutdown(self) -> None:
        """Take no more inferences, and block until those that run have ended."""
        for threads in (self._threads, self._first_threads):
            threads.shutdown()

    def _submit(self, job: _Job) -> None:
        is_warm = job.lease.runnable in self._warm
        job.added_s = job.expected_s
        with self._lock:
            self._not_ended += 1
            if is_warm:
                self._waiting.append(job)
                if job.joinable is not None:
                    key = job.key = job.lease.runnable, job.joinable.kind
                    before = self._rows_waiting.get(key, 0)
                    self._rows_waiting[key] = before + job.joinable.rows
                    if before:
                        job.added_s = added_s(job.joinable, before)
        self._queue.add(job.added_s)
        if is_warm:
            self._threads.submit(self._run_next)
        else:
            self._first_threads.submit(self._run_first, job)

    def _cancel(self, job: _Job) -> None:
        """End a request whose execution has not begun; one that runs ends by itself."""
        with self._lock:
            if job.taken:
                return
            self._take(job)
        self._ended([job])

    def _take(self, job: _Job) -> None:
        """Take a request out of those that wait; the caller holds the lock."""
        job.taken = True
        if job.key is not None and job.joinable is not None:
            left = self._rows_waiting[job.key] - job.joinable.rows
            if left:
                self._rows_waiting[job.key] = left
            else:
                del self._rows_waiting[job.key]

    # In threads

    def _run_first(self, job: _Job) -> None:
        with self._lock:
            if job.taken:
                return
            job.taken = True
            others = self._not_ended - 1
        self._run([job], others)

    def _run_next(self) -> None:
        """Run the request that waits longest, if others have not been executed together with it."""
        with self._lock:
            jobs = self._next()
            others = self._not_ended - len(jobs)
        if jobs:
            self._run(jobs, others)

    def _next(self) -> list[_Job]:
        while self._waiting:
            job = self._waiting.popleft()
            if not job.taken:
                break
        else:
            return []
        jobs = [job]
        if job.joinable is not None and job.key is not None and self._rows_waiting[job.key] > job.joinable.rows:
            jobs += [each for each in self._waiting if each.key == job.key and not each.taken]
            candidates = [each.joinable for each in jobs if each.joinable is not None]
            jobs = jobs[: count_joined(candidates, self._clock(), self._budget.workspace_bytes)]
        for each in jobs:
            self._take(each)
        return jobs

    def _run(self, jobs: Sequence[_Job], others: int) -> None:
        if len(jobs) > 1:
            unanswered = dict(enumerate(jobs))
            try:
                self._run_together(jobs, others, unanswered)
            except BaseException as error:
                # Perhaps the fault of one: then only that one fails. Foreign code may also call sys.exit.
                logger.info("%d requests are executed one by one: %s", len(unanswered), error)
                for job in unanswered.values():
                    self._run([job], others)
            return
        job = jobs[0]
        result: ExecutionResult | BaseException
        try:
            with self._budget.workspace(job.workspace_bytes):
                began_s = self._clock()
                executed = run_alone(job.lease.runnable, job.execution, self._threads_for(job.expected_s, others))
                result = ExecutionResult(
                    result=executed,
                    queue_s=began_s - job.submitted_s,
                    exec_s=self._clock() - began_s,
                    times_longer=job.times_longer,
                )
        except BaseException as error:
            result = error
        job.loop.call_soon_threadsafe(self._answer, [(job, result)])

    def _run_together(self, jobs: Sequence[_Job], others: int, unanswered: dict[int, _Job]) -> None:
        """Execute the model once, and answer each; what is not answered is left in ``unanswered``."""
        members = [job.joinable for job in jobs if job.joinable is not None]
        first, rows = members[0], [each.rows for each in members]
        sizes = first.of_rows(sum(rows))
        times_longer = first.model.times_longer(sizes)
        with self._budget.workspace(first.model.cost(sizes).workspace_bytes):
            threads, began_s = self._threads_for(first.least_s * times_longer, others), self._clock()
            for step in run_joined(jobs[0].lease.runnable, [job.execution for job in jobs], threads):
                exec_s = self._clock() - began_s
                results: list[tuple[_Job, ExecutionResult | BaseException]] = []
                for index, executed in step.items():
                    job = unanswered.pop(index)
                    if isinstance(executed, Exception):
                        results.append((job, executed))
                        continue
                    result = ExecutionResult(
                        result=executed,
                        queue_s=began_s - job.submitted_s,
                        exec_s=exec_s,
                        times_longer=times_longer,
                        share=rows[index] / sum(rows),
                        requests=len(jobs),
                    )
                    results.append((job, result))
                jobs[0].loop.call_soon_threadsafe(self._answer, results)

    def _threads_for(self, expected_s: float, others: int) -> int:
        if self._cores == 1 or others or not is_long(expected_s):
            return 0
        return threads_for(expected_s, others=others, machine_others=self._machine_others(), cores=self._cores)

    # On the event loop

    def _answer(self, results: Sequence[tuple[_Job, ExecutionResult | BaseException]]) -> None:
        # In any case: the thread of a canceled request runs on, and its model must stay until it is done.
        self._ended([job for job, _ in results])
        for job, result in results:
            if job.done.cancelled():
                continue
            if isinstance(result, BaseException):
                job.done.set_exception(result)
            else:
                self._warm.add(job.lease.runnable)
                job.done.set_result(result)

    def _ended(self, jobs: Sequence[_Job]) -> None:
        with self._lock:
            self._not_ended -= len(jobs)
        for job in jobs:
            self._queue.remove(job.added_s)
            self._release(job.lease)
