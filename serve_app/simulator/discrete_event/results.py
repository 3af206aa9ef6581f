"""The results of a simulation."""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field

import numpy as np


@dataclass(slots=True, kw_only=True)
class DiscreteEventResults:
    """Counts, seconds and latencies of all locations together; hits, misses, joins and forwards add up to requests.

    A request answered by another location counts as a forward, whatever its outcome there. A rejected request counts
    among the misses, and is charged a load and an execution after its rejection, as if it were served from elsewhere:
    rejecting must not make the figures look better.
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
    #: Models that were unloaded by commands of placement; not among the evictions.
    unloads: int = 0
    #: Seconds that requests waited for loads; that they queued for memory or for an execution slot; that they and
    #: their answers were on links; and that executions take.
    load_s: float = 0.0
    queue_s: float = 0.0
    link_s: float = 0.0
    exec_s: float = 0.0
    #: Seconds and bytes of loads without a request.
    preload_s: float = 0.0
    preload_bytes: int = 0
    #: Models that went over to another form, and the seconds of the loads for it.
    form_changes: int = 0
    form_change_s: float = 0.0
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
        """The given quantile of the latencies."""
        return float(np.quantile(self.latencies, quantile)) if self.latencies else 0.0
