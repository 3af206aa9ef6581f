"""``GET /v1/locations`` and ``GET /metrics``: the state of the cluster, for people and for Prometheus."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from fastapi import Request
from fastapi.responses import PlainTextResponse, Response

from serve_app.serving.api.cluster_status import cluster_status
from serve_app.serving.api.error_responses import JsonResponse
from serve_app.serving.router.router import Router


class MonitoringEndpoints:
    """The handlers of requests about the cluster.

    Args:
        router: knows the cluster.
        scrape: returns the metrics of this node as Prometheus text.
    """

    def __init__(self, router: Router, scrape: Callable[[], Awaitable[str]]) -> None:
        self._router = router
        self._scrape = scrape

    async def locations(self, request: Request) -> Response:
        """The cluster: memory, resident models, rates and outcomes of every location."""
        router = self._router
        return JsonResponse(
            cluster_status(
                await router.cluster_view(),
                router.locations,
                coordinator_up=router.coordinator_up,
                view_age_s=router.view_age_s(),
            )
        )

    async def metrics(self, request: Request) -> Response:
        """Prometheus text with the metrics of this node."""
        return PlainTextResponse(await self._scrape(), media_type="text/plain; version=0.0.4")
