"""The two kinds of load: requests at given times whatever happens, and connections that never pause."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

from loadtests.compare.http import Reply, RequestFailed

FAILED = "failed"
#: Connections of the open loop: more requests than this are hardly ever under way where the load can be borne.
_OPEN_CONNECTIONS = 32


class Connection(Protocol):
    """What a client of a side has: used by one thread."""

    def classify(self, model: str, image: bytes, top_k: int = 5) -> Reply:
        """Have an image classified; raises ``RequestFailed``."""

    def close(self) -> None:
        """The client goes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One request: seconds since the slice began, and what the side reported. ``due_s`` is when it should be sent."""

    model: str
    due_s: float
    done_s: float
    outcome: str
    wait_s: float = 0.0
    queue_s: float = 0.0
    exec_s: float = 0.0
    problem: str = ""

    @property
    def latency_s(self) -> float:
        """From when it was due: a client that falls behind must not hide it."""
        return self.done_s - self.due_s

    @property
    def is_failed(self) -> bool:
        """Whether there was no answer."""
        return self.outcome == FAILED

    @property
    def is_miss(self) -> bool:
        """Whether the model was not in memory when the request came."""
        return self.outcome in ("load", "join")


def closed_loop(
    connect: Callable[[], Connection], models: Iterator[str], image: bytes, *, connections: int, seconds: float
) -> list[Sample]:
    """Every connection sends as soon as its last answer is there; what is under way when time is over is waited for."""
    lock = threading.Lock()
    began_s = time.perf_counter()

    def client() -> list[Sample]:
        connection, samples = connect(), []
        try:
            while (now_s := time.perf_counter() - began_s) < seconds:
                with lock:
                    model = next(models)
                samples.append(_ask(connection, model, image, now_s, began_s))
        finally:
            connection.close()
        return samples

    with ThreadPoolExecutor(connections) as pool:
        clients = [pool.submit(client) for _ in range(connections)]
        return [sample for done in clients for sample in done.result()]


def open_loop(connect: Callable[[], Connection], arrivals: Iterable[tuple[float, str]], image: bytes) -> list[Sample]:
    """Every request is sent at its time, in seconds from the beginning, whether or not others have been answered."""
    due: queue.SimpleQueue[tuple[float, str] | None] = queue.SimpleQueue()
    began_s = time.perf_counter()

    def client() -> list[Sample]:
        connection, samples = connect(), []
        try:
            while (next_one := due.get()) is not None:
                samples.append(_ask(connection, next_one[1], image, next_one[0], began_s))
        finally:
            connection.close()
        return samples

    with ThreadPoolExecutor(_OPEN_CONNECTIONS) as pool:
        clients = [pool.submit(client) for _ in range(_OPEN_CONNECTIONS)]
        try:
            for arrival in arrivals:
                time.sleep(max(0.0, began_s + arrival[0] - time.perf_counter()))
                due.put(arrival)
        finally:
            # Also where we are interrupted: the threads would wait for ever, and we for them.
            for _ in clients:
                due.put(None)
        return [sample for done in clients for sample in done.result()]


def _ask(connection: Connection, model: str, image: bytes, due_s: float, began_s: float) -> Sample:
    try:
        reply = connection.classify(model, image)
    except RequestFailed as error:
        done_s = time.perf_counter() - began_s
        return Sample(model=model, due_s=due_s, done_s=done_s, outcome=FAILED, problem=str(error))
    return Sample(
        model=model,
        due_s=due_s,
        done_s=time.perf_counter() - began_s,
        outcome=reply.outcome,
        wait_s=reply.wait_s,
        queue_s=reply.queue_s,
        exec_s=reply.exec_s,
    )
