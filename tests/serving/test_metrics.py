"""The names and labels of the metrics are public: dashboards and alerts depend on them."""

from __future__ import annotations

from typing import Any

import pytest

#: Ray's own, of another library, as it is imported.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

#: Name -> kind, unit and labels.
PUBLIC = {
    "edgeserve_requests_total": ("counter", "requests", {"location", "model", "outcome", "code"}),
    "edgeserve_request_seconds": ("histogram", "seconds", {"location", "outcome"}),
    "edgeserve_forwards_total": ("counter", "requests", {"from_location", "to_location"}),
    "edgeserve_forward_seconds": ("histogram", "seconds", {"from_location", "to_location"}),
    "edgeserve_inflight_requests": ("gauge", "requests", {"location", "replica"}),
    "edgeserve_coordinator_view_age_seconds": ("gauge", "seconds", {"location"}),
    "edgeserve_loads_total": ("counter", "loads", {"location", "model", "result"}),
    "edgeserve_load_seconds": ("histogram", "seconds", {"location", "model"}),
    "edgeserve_evictions_total": ("counter", "unloads", {"location", "model", "reason"}),
    "edgeserve_preloads_total": ("counter", "loads", {"location"}),
    "edgeserve_exec_seconds": ("histogram", "seconds", {"location", "model", "form"}),
    "edgeserve_joined_requests_total": ("counter", "requests", {"location", "model"}),
    "edgeserve_queue_seconds": ("histogram", "seconds", {"location"}),
    "edgeserve_cache_used_bytes": ("gauge", "bytes", {"location", "replica"}),
    "edgeserve_cache_capacity_bytes": ("gauge", "bytes", {"location", "replica"}),
    "edgeserve_worker_workspace_bytes": ("gauge", "bytes", {"location", "replica"}),
    "edgeserve_worker_unaccounted_bytes": ("gauge", "bytes", {"location", "replica"}),
    "edgeserve_worker_base_bytes": ("gauge", "bytes", {"location", "replica"}),
    "edgeserve_resident_models": ("gauge", "models", {"location", "replica"}),
    "edgeserve_worker_rss_bytes": ("gauge", "bytes", {"location", "replica"}),
    "edgeserve_model_rate": ("gauge", "requests per second", {"location", "model"}),
    "edgeserve_model_holders": ("gauge", "workers", {"model"}),
}


def test_names_kinds_units_and_labels_are_the_public_ones() -> None:
    from serve_app.serving.metrics import METRICS

    found = {name: (metric.kind.value, metric.unit, set(metric.labels)) for name, metric in METRICS.items()}
    assert found == PUBLIC


def test_a_unit_in_a_name_is_the_unit_of_the_metric() -> None:
    from serve_app.serving.metrics import METRICS

    for name, metric in METRICS.items():
        for unit in ("seconds", "bytes"):
            assert name.endswith(f"_{unit}") == (metric.unit == unit)
        assert name.endswith("_total") == (metric.kind.value == "counter")


class Recorded:
    """A metric of Ray that remembers how it was made and what it was given."""

    made: dict[str, Recorded]

    def __init__(self, name: str, description: str, tag_keys: tuple[str, ...], boundaries: Any = None) -> None:
        self.labels, self.default = set(tag_keys), {}
        self.given: list[set[str]] = []
        self.made[name] = self

    def set_default_tags(self, tags: dict[str, str]) -> None:
        self.default = tags

    def inc(self, value: float = 1.0, tags: dict[str, str] | None = None) -> None:
        self.given.append(set(self.default) | set(tags or {}))

    def observe(self, value: float, tags: dict[str, str] | None = None) -> None:
        self.inc(value, tags)


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> dict[str, Recorded]:
    from serve_app.serving import metrics

    Recorded.made = {}
    for kind in ("Counter", "Gauge", "Histogram"):
        monkeypatch.setattr(metrics.ray_metrics, kind, Recorded)
    return Recorded.made


def test_every_metric_is_recorded_by_one_class(made: dict[str, Recorded]) -> None:
    from serve_app.serving.metrics import CoordinatorMetrics, RouterMetrics, WorkerMetrics

    RouterMetrics("router-1"), WorkerMetrics("paris", "paris-1"), CoordinatorMetrics()
    assert made.keys() == PUBLIC.keys()


def test_a_worker_gives_every_label_a_value(made: dict[str, Recorded]) -> None:
    from serve_app.serving.metrics import WorkerMetrics

    worker = WorkerMetrics("paris", "paris-1")
    worker.loaded("a", 0.1)
    worker.load_failed("a")
    worker.evicted("a", "space")
    worker.preload_started()
    worker.executed("a", "mapped", 0.0, 0.01)
    recorded = {name: metric for name, metric in made.items() if metric.given}
    assert len(recorded) == 6
    assert all(given == metric.labels for metric in recorded.values() for given in metric.given)
    gauges = [metric for name, metric in made.items() if PUBLIC[name][0] == "gauge"]
    assert all(set(metric.default) == metric.labels for metric in gauges)
