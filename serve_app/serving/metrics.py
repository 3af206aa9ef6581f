"""Every metric of the system, by its name; Ray puts ``ray_`` in front when they are scraped."""

from __future__ import annotations

from ray.util.metrics import Counter, Gauge, Histogram

_SECONDS = [0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0]


class RouterMetrics:
    """What a router counts."""

    def __init__(self, replica: str) -> None:
        self.requests = Counter(
            "edgeserve_requests_total",
            description="Requests by outcome and HTTP status.",
            tag_keys=("location", "model", "outcome", "code"),
        )
        self.request_seconds = Histogram(
            "edgeserve_request_seconds",
            description="Time from the parsed request to its answer.",
            boundaries=_SECONDS,
            tag_keys=("location", "outcome"),
        )
        self.forwards = Counter(
            "edgeserve_forwards_total",
            description="Requests that ran at another location.",
            tag_keys=("from_location", "to_location"),
        )
        self.forward_seconds = Histogram(
            "edgeserve_forward_seconds",
            description="What a forward added: the call less its time at the worker.",
            boundaries=_SECONDS,
            tag_keys=("from_location", "to_location"),
        )
        self.inflight = Gauge(
            "edgeserve_inflight_requests",
            description="Requests under way.",
            tag_keys=("location", "replica"),
        )
        self.inflight.set_default_tags({"replica": replica})
        self.view_age_seconds = Gauge(
            "edgeserve_coordinator_view_age_seconds",
            description="Time since the coordinator was last heard.",
            tag_keys=("location",),
        )


class WorkerMetrics:
    """What a worker counts."""

    def __init__(self, location: str, replica: str) -> None:
        self._location = {"location": location}
        where = {"location": location, "replica": replica}
        self._loads = Counter(
            "edgeserve_loads_total", description="Loads by result.", tag_keys=("location", "model", "result")
        )
        self._load_seconds = Histogram(
            "edgeserve_load_seconds",
            description="Time of a load.",
            boundaries=_SECONDS,
            tag_keys=("location", "model"),
        )
        self._evictions = Counter(
            "edgeserve_evictions_total", description="Unloads by reason.", tag_keys=("location", "model", "reason")
        )
        self._preloads = Counter(
            "edgeserve_preloads_total", description="Loads that no request asked for.", tag_keys=("location",)
        )
        self._exec_seconds = Histogram(
            "edgeserve_exec_seconds",
            description="Time of an inference.",
            boundaries=_SECONDS,
            tag_keys=("location", "model"),
        )
        self._queue_seconds = Histogram(
            "edgeserve_queue_seconds",
            description="Time spent waiting for memory or a thread.",
            boundaries=_SECONDS,
            tag_keys=("location",),
        )
        self.used_bytes = _gauge("edgeserve_cache_used_bytes", "Bytes of all models in memory.", where)
        self.capacity_bytes = _gauge(
            "edgeserve_cache_capacity_bytes", "Bytes for models, workspace and what is unaccounted for.", where
        )
        self.workspace_bytes = _gauge("edgeserve_worker_workspace_bytes", "Bytes set aside for executions.", where)
        self.unaccounted_bytes = _gauge(
            "edgeserve_worker_unaccounted_bytes", "Bytes held back: the process has grown beyond its books.", where
        )
        self.base_bytes = _gauge("edgeserve_worker_base_bytes", "Resident memory before the first model.", where)
        self.resident_models = _gauge("edgeserve_resident_models", "Models in memory.", where)
        self.rss_bytes = _gauge("edgeserve_worker_rss_bytes", "Resident memory of the process.", where)

    def loaded(self, model_id: str, seconds: float) -> None:
        """A load has ended well."""
        self._loads.inc(tags={**self._location, "model": model_id, "result": "ok"})
        self._load_seconds.observe(seconds, tags={**self._location, "model": model_id})

    def load_failed(self, model_id: str) -> None:
        """A load has failed."""
        self._loads.inc(tags={**self._location, "model": model_id, "result": "failed"})

    def evicted(self, model_id: str, reason: str) -> None:
        """A model has been unloaded, or its background load given up."""
        self._evictions.inc(tags={**self._location, "model": model_id, "reason": reason})

    def preload_started(self) -> None:
        """A load that no request has asked for begins."""
        self._preloads.inc(tags=self._location)

    def executed(self, model_id: str, queue_s: float, exec_s: float) -> None:
        """An inference has ended."""
        self._exec_seconds.observe(exec_s, tags={**self._location, "model": model_id})
        self._queue_seconds.observe(queue_s, tags=self._location)


class CoordinatorMetrics:
    """What the coordinator knows."""

    def __init__(self) -> None:
        self.model_rate = Gauge(
            "edgeserve_model_rate",
            description="Decayed requests per second.",
            tag_keys=("location", "model"),
        )
        self.model_holders = Gauge(
            "edgeserve_model_holders",
            description="Workers that hold a model.",
            tag_keys=("model",),
        )


def _gauge(name: str, description: str, tags: dict[str, str]) -> Gauge:
    gauge = Gauge(name, description=description, tag_keys=tuple(tags))
    gauge.set_default_tags(tags)
    return gauge
