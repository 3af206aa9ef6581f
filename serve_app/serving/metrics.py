"""Every metric of EdgeServe: declared in ``METRICS``, made by the three classes that record them.

Ray adds the prefix ``ray_`` to the names when Prometheus scrapes them.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Any, Final

from ray.util import metrics as ray_metrics

#: Upper bounds of the buckets of every histogram, in seconds.
_BUCKETS_S: Final = [0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0]


class Kind(Enum):
    """The kinds of Prometheus."""

    COUNTER = "counter"
    GAUGE = "gauge"
    HISTOGRAM = "histogram"


@dataclass(frozen=True, slots=True, kw_only=True)
class Metric:
    """One metric. ``help`` is its description for Prometheus, ``unit`` what one of it is."""

    name: str
    kind: Kind
    unit: str
    labels: tuple[str, ...]
    help: str


def _counter(name: str, unit: str, labels: tuple[str, ...], text: str) -> Metric:
    return Metric(name=name, kind=Kind.COUNTER, unit=unit, labels=labels, help=text)


def _gauge(name: str, unit: str, labels: tuple[str, ...], text: str) -> Metric:
    return Metric(name=name, kind=Kind.GAUGE, unit=unit, labels=labels, help=text)


def _seconds(name: str, labels: tuple[str, ...], text: str) -> Metric:
    return Metric(name=name, kind=Kind.HISTOGRAM, unit="seconds", labels=labels, help=text)


_LOCATION = ("location",)
_MODEL = ("location", "model")
_LINK = ("from_location", "to_location")
_REPLICA = ("location", "replica")

_ROUTER = (
    _counter(
        "edgeserve_requests_total",
        "requests",
        ("location", "model", "outcome", "code"),
        "Requests by outcome and HTTP status.",
    ),
    _seconds("edgeserve_request_seconds", ("location", "outcome"), "Time from the parsed request to its response."),
    _counter("edgeserve_forwards_total", "requests", _LINK, "Requests that ran at another location."),
    _seconds("edgeserve_forward_seconds", _LINK, "Time of a forwarded call outside its worker."),
    _gauge("edgeserve_inflight_requests", "requests", _REPLICA, "Requests in progress."),
    _gauge(
        "edgeserve_coordinator_view_age_seconds", "seconds", _LOCATION, "Time since the last answer of the coordinator."
    ),
)
_WORKER = (
    _counter("edgeserve_loads_total", "loads", (*_MODEL, "result"), "Loads by result."),
    _seconds("edgeserve_load_seconds", _MODEL, "Time of a load."),
    _counter("edgeserve_evictions_total", "unloads", (*_MODEL, "reason"), "Unloads by reason."),
    _counter("edgeserve_preloads_total", "loads", _LOCATION, "Loads that no request asked for."),
    _seconds("edgeserve_exec_seconds", (*_MODEL, "form"), "Time of an inference, by the form that ran."),
    _counter("edgeserve_joined_requests_total", "requests", _MODEL, "Requests that were executed with others at once."),
    _seconds("edgeserve_queue_seconds", _LOCATION, "Time of waiting for memory or a thread."),
    _gauge("edgeserve_cache_used_bytes", "bytes", _REPLICA, "Bytes of all models in memory."),
    _gauge(
        "edgeserve_cache_capacity_bytes",
        "bytes",
        _REPLICA,
        "Configured memory: bytes for models, for workspace, and held back for unaccounted growth of the process.",
    ),
    _gauge("edgeserve_worker_workspace_bytes", "bytes", _REPLICA, "Bytes set aside for executions."),
    _gauge(
        "edgeserve_worker_unaccounted_bytes",
        "bytes",
        _REPLICA,
        "Bytes held back because the process has grown by more than its models and workspace.",
    ),
    _gauge("edgeserve_worker_base_bytes", "bytes", _REPLICA, "Resident memory before the first model."),
    _gauge("edgeserve_resident_models", "models", _REPLICA, "Models in memory."),
    _gauge("edgeserve_worker_rss_bytes", "bytes", _REPLICA, "Resident memory of the process."),
)
_COORDINATOR = (
    _gauge("edgeserve_model_rate", "requests per second", _MODEL, "Exponentially decayed rate of requests."),
    _gauge("edgeserve_model_holders", "workers", ("model",), "Workers that hold the model."),
)

#: Every metric by its name.
METRICS: Final = {metric.name: metric for metric in (*_ROUTER, *_WORKER, *_COORDINATOR)}


class RouterMetrics:
    """What a router records."""

    def __init__(self, replica: str) -> None:
        self.requests = _make("edgeserve_requests_total")
        self.request_seconds = _make("edgeserve_request_seconds")
        self.forwards = _make("edgeserve_forwards_total")
        self.forward_seconds = _make("edgeserve_forward_seconds")
        self.inflight = _make("edgeserve_inflight_requests", replica=replica)
        self.view_age_seconds = _make("edgeserve_coordinator_view_age_seconds")


class WorkerMetrics:
    """What a worker records; also the observer of its ``ModelManager``."""

    def __init__(self, location: str, replica: str) -> None:
        self._location = {"location": location}
        self._loads = _make("edgeserve_loads_total")
        self._load_seconds = _make("edgeserve_load_seconds")
        self._evictions = _make("edgeserve_evictions_total")
        self._preloads = _make("edgeserve_preloads_total")
        self._exec_seconds = _make("edgeserve_exec_seconds")
        self._queue_seconds = _make("edgeserve_queue_seconds")
        self._joined = _make("edgeserve_joined_requests_total")
        own = {"location": location, "replica": replica}
        self.used_bytes = _make("edgeserve_cache_used_bytes", **own)
        self.capacity_bytes = _make("edgeserve_cache_capacity_bytes", **own)
        self.workspace_bytes = _make("edgeserve_worker_workspace_bytes", **own)
        self.unaccounted_bytes = _make("edgeserve_worker_unaccounted_bytes", **own)
        self.base_bytes = _make("edgeserve_worker_base_bytes", **own)
        self.resident_models = _make("edgeserve_resident_models", **own)
        self.rss_bytes = _make("edgeserve_worker_rss_bytes", **own)

    def loaded(self, model_id: str, seconds: float) -> None:
        """Record a load that has succeeded."""
        self._loads.inc(tags={**self._location, "model": model_id, "result": "ok"})
        self._load_seconds.observe(seconds, tags={**self._location, "model": model_id})

    def load_failed(self, model_id: str) -> None:
        """Record a load that has failed."""
        self._loads.inc(tags={**self._location, "model": model_id, "result": "failed"})

    def evicted(self, model_id: str, reason: str) -> None:
        """Record that a model was unloaded, or its load in the background abandoned."""
        self._evictions.inc(tags={**self._location, "model": model_id, "reason": reason})

    def preload_started(self) -> None:
        """Record the begin of a load that no request asked for."""
        self._preloads.inc(tags=self._location)

    def executed(self, model_id: str, form: str, queue_s: float, exec_s: float, requests: int = 1) -> None:
        """Record an inference: its form, its times in the queue and of execution, and how many requests shared that."""
        if requests > 1:
            self._joined.inc(tags={**self._location, "model": model_id})
        self._exec_seconds.observe(exec_s, tags={**self._location, "model": model_id, "form": form})
        self._queue_seconds.observe(queue_s, tags=self._location)


class CoordinatorMetrics:
    """What the coordinator records."""

    def __init__(self) -> None:
        self.model_rate = _make("edgeserve_model_rate")
        self.model_holders = _make("edgeserve_model_holders")


def _make(name: str, **defaults: str) -> Any:
    """Make a declared metric with Ray; ``defaults`` are the labels that have the same value every time."""
    metric = METRICS[name]
    arguments: dict[str, Any] = {"description": metric.help, "tag_keys": metric.labels}
    match metric.kind:
        case Kind.COUNTER:
            made = ray_metrics.Counter(name, **arguments)
        case Kind.GAUGE:
            made = ray_metrics.Gauge(name, **arguments)
        case Kind.HISTOGRAM:
            made = ray_metrics.Histogram(name, boundaries=_BUCKETS_S, **arguments)
    if defaults:
        made.set_default_tags(defaults)
    return made
