"""Probes: what the links to other locations are like, and which locations do not answer."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Callable, Iterable

from serve_app.core.links import LinkTable
from serve_app.core.routing.router_view import RouterView
from serve_app.serving.transport.worker_pool import WorkerLost, WorkerPool

logger = logging.getLogger(__name__)


class Prober:
    """Measures the links of one router, and cuts off the locations that do not answer.

    Args:
        pool: the workers.
        view: of the cluster; takes in which locations cannot be reached.
        links: takes the measurements.
        fail_calls: ends the calls under way to replicas that are cut off.
        own_location: of the router; never cut off, because the reports of its workers say more. None: it has none.
        clock: monotonic seconds.
        batch: how many locations are probed at once, in turn.
        timeout_s: how long a probe waits for its answer.
        max_failures: a location that has not answered so many probes in a row is cut off.
        payload_bytes: of every fourth probe of a location, for the bandwidth; the others are empty.
    """

    def __init__(
        self,
        *,
        pool: WorkerPool,
        view: RouterView,
        links: LinkTable,
        fail_calls: Callable[[Iterable[str]], None],
        own_location: str | None,
        clock: Callable[[], float],
        batch: int = 16,
        timeout_s: float = 2.0,
        max_failures: int = 2,
        payload_bytes: int = 65_536,
    ) -> None:
        self._pool = pool
        self._view = view
        self._links = links
        self._fail_calls = fail_calls
        self._own_location = own_location
        self._clock = clock
        self._batch = batch
        self._timeout_s = timeout_s
        self._max_failures = max_failures
        self._payload_bytes = payload_bytes
        self._rounds = 0
        self._probes: Counter[str] = Counter()
        self._failures: Counter[str] = Counter()

    async def probe(self) -> None:
        """Probe some locations, at the next call the next ones."""
        locations = sorted({report.location for report in self._view.cluster.workers.values()})
        if not locations:
            return
        self._rounds += 1
        first = self._rounds * self._batch
        batch = {locations[number % len(locations)] for number in range(first, first + self._batch)}
        await asyncio.gather(*(self._probe(location) for location in batch))

    async def _probe(self, location: str) -> None:
        self._probes[location] += 1
        size_bytes = 0 if self._probes[location] % 4 else self._payload_bytes
        began_s = self._clock()
        try:
            async with asyncio.timeout(self._timeout_s):
                await self._pool.ping(location, bytes(size_bytes))
        except (WorkerLost, TimeoutError):
            self._failed(location)
            return
        self._failures[location] = 0
        self._view.reconnect(location)
        self._links.add(location, size_bytes, self._clock() - began_s)

    def _failed(self, location: str) -> None:
        self._failures[location] += 1
        if self._failures[location] < self._max_failures or location == self._own_location:
            return
        if self._failures[location] == self._max_failures:
            logger.warning("location %s does not answer from here; it gets no requests until it does", location)
        self._fail_calls(self._view.cut_off(location))
