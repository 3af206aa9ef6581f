"""What came of a simulation."""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field

import numpy as np


@dataclass(slots=True, kw_only=True)
class DiscreteEventResults:
    """Counts, seconds and latencies of all locations together; hits, misses, joins and forwards add up to requests.

    A request that is answered by another location counts as a forward, whatever became of it there. A rejected one
    counts among the misses, and is charged a load and an execution after its refusal, as if it were served from
    elsewhere: refusing must not make the figures look better.
    """

    requests: int = 0
    hits: int = 0
    misses: int = 0
    joins: int = 0
    forwards: int = 0
    rejected: int = 0
    #: Times that a request was sent to a location that no longer held its model.
    stale_retries: int = 0
    preloads: int = 0
    wasted_preloads: int = 0
    evictions: int = 0
    #: Models that were unloaded because placement said so; not among the evictions.
    unloads: int = 0
    #: Seconds that requests waited for loads, wherever; that they waited in line for memory or for an execution
    #: slot; that they and their answers were on the way; and that executions take.
    load_s: float = 0.0
    queue_s: float = 0.0
    link_s: float = 0.0
    exec_s: float = 0.0
    #: Seconds and bytes of loads that nobody had asked for.
    preload_s: float = 0.0
    preload_bytes: int = 0
    #: Of every request, in the order of the trace.
    latencies: array[float] = field(default_factory=lambda: array("d"))

    @property
    def load_over_exec(self) -> float:
        """Seconds waited for loads per second of execution."""
        return self.load_s / self.exec_s if self.exec_s else 0.0

    @property
    def mean_latency_s(self) -> float:
        """Mean latency of all requests."""
        return float(np.mean(self.latencies)) if self.latencies else 0.0

    def latency_s(self, quantile: float) -> float:
        """The latency that this share of the requests does not exceed."""
        return float(np.quantile(self.latencies, quantile)) if self.latencies else 0.0
