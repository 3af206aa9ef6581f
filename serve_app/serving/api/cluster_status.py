"""The cluster as JSON: ``GET /v1/locations``, ``edgeserve status --json``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from serve_app.core.cluster.cluster_view import ClusterView
from serve_app.core.cluster.reports import OutcomeCounts, WorkerReport


def cluster_status(
    view: ClusterView, locations: Sequence[str], *, coordinator_up: bool, view_age_s: float | None
) -> Any:
    """Return every location with its resident models and the outcomes of its users' requests."""
    outcomes: dict[str, OutcomeCounts] = {}
    for report in view.workers.values():
        for origin, counts in report.outcomes.items():
            outcomes[origin] = outcomes.get(origin, OutcomeCounts()) + counts
    return {
        "locations": [_location(view, name, outcomes.get(name, OutcomeCounts())) for name in locations],
        "coordinator": {
            "up": coordinator_up,
            "view_age_s": None if view_age_s is None else round(view_age_s, 3),
            "version": view.version,
            "epoch": view.epoch,
        },
    }


def _location(view: ClusterView, name: str, counts: OutcomeCounts) -> dict[str, Any]:
    reports = [view.workers[replica] for replica in view.replicas_at(name)]
    return {
        "name": name,
        "replicas": len(reports),
        "capacity_bytes": sum(report.capacity_bytes for report in reports),
        "used_bytes": sum(report.used_bytes for report in reports),
        "workspace_bytes": sum(report.workspace_bytes for report in reports),
        "unaccounted_bytes": sum(report.unaccounted_bytes for report in reports),
        "base_bytes": sum(report.base_bytes for report in reports),
        "rss_bytes": sum(report.rss_bytes for report in reports),
        "inflight": sum(report.inflight for report in reports),
        "unusable": {key: reason for report in reports for key, reason in report.unusable.items()},
        "resident": [resident for report in reports for resident in _resident(view, name, report)],
        "requests": counts.requests,
        "hits": counts.hits,
        "joins": counts.joins,
        "loads": counts.loads,
        "forwards": counts.forwards,
        "evictions": sum(report.evictions for report in reports),
        "preloads": sum(report.preloads for report in reports),
        "wasted_preloads": sum(report.wasted_preloads for report in reports),
        "model_loads": sum(report.loads for report in reports),
        "load_failures": sum(report.load_failures for report in reports),
    }


def _resident(view: ClusterView, location: str, report: WorkerReport) -> list[dict[str, Any]]:
    return [
        {
            "model": model.model_id,
            "state": model.state.value,
            "bytes": model.size_bytes,
            "pinned": model.unevictable,
            "in_use": model.uses,
            "rate_per_s": round(view.rate(location, model.model_id), 4),
            "replica": report.replica,
        }
        for model in report.models.values()
    ]
