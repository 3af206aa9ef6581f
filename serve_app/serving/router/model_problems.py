"""Why models cannot be served, as far as the reports of workers say, before a request finds out."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from serve_app.core.catalog import PublishedModel
from serve_app.core.cluster.reports import WorkerReport


def problem_of(models: Sequence[PublishedModel], workers: Iterable[WorkerReport]) -> str | None:
    """Return why none of these models can be served: no worker can load them, or has memory for them."""
    reports = tuple(workers)
    if not reports:
        return "no worker is known; try again later"
    reasons = [
        report.unusable.get(model.model_id) or f"no worker has memory for {model.model_id}"
        for model in models
        for report in reports
        if model.model_id in report.unusable or not report.can_hold(model.profile)
    ]
    return reasons[0] if len(reasons) == len(models) * len(reports) else None


def unusable_reason(model: PublishedModel, workers: Iterable[WorkerReport]) -> str | None:
    """Return why no worker can load a model; None if one can, as far as is known."""
    reasons = [report.unusable.get(model.model_id) for report in workers]
    return reasons[0] if reasons and all(reasons) else None
