"""The HTTP application of one router: its routes, its errors and its authorization."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

from fastapi.responses import Response
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from serve_app import __version__
from serve_app.errors import EdgeServeError
from serve_app.serving.api.auth import AuthorizationMiddleware, require_token
from serve_app.serving.api.classification import ClassificationEndpoints
from serve_app.serving.api.embeddings import EmbeddingEndpoints
from serve_app.serving.api.error_responses import on_any_error, on_disconnect, on_error, on_fault, on_http_error
from serve_app.serving.api.fast_path import FastPath, FastPathApp
from serve_app.serving.api.inference import InferenceEndpoints
from serve_app.serving.api.monitoring import MonitoringEndpoints
from serve_app.serving.api.openapi import described
from serve_app.serving.api.predict import PredictionEndpoints
from serve_app.serving.api.repository import RepositoryEndpoints
from serve_app.serving.api.request_reader import HttpSettings, RequestReader
from serve_app.serving.router.router import Router

Handler = Callable[[Any], Awaitable[Response]]

_MODEL_PATHS = ("/v2/models/{model}", "/v2/models/{model}/versions/{version}")


def build_http_app(router: Router, settings: HttpSettings, scrape: Callable[[], Awaitable[str]]) -> FastPathApp:
    """Build the ASGI application of one router.

    Args:
        router: serves the requests.
        settings: of the HTTP interface.
        scrape: returns the metrics of this node as Prometheus text.
    """
    reader = RequestReader(router, settings)
    inference = InferenceEndpoints(router, reader, settings.limits.batch)
    authorize = require_token(settings.token)
    app = FastPathApp(
        FastPath(infer=inference.infer, authorize=authorize, on_error=on_any_error),
        title="EdgeServe",
        version=__version__,
        description="Many models from edge locations with little memory.",
    )
    classification, prediction = ClassificationEndpoints(router, reader), PredictionEndpoints(router, reader)
    # Serve matches every request with the routes from the first one on, to label its metrics: the frequent ones lead.
    routes: list[tuple[str, str, Handler]] = [
        *(("POST", f"{path}/infer", inference.infer) for path in _MODEL_PATHS),
        ("POST", "/v1/predict", prediction.predict),
        ("POST", "/v1/classify", classification.classify),
        ("POST", "/v1/embeddings", EmbeddingEndpoints(router, reader).embeddings),
        *_other_routes(RepositoryEndpoints(router, reader), MonitoringEndpoints(router, scrape)),
    ]
    for method, path, handler in routes:
        app.add_api_route(path, handler, methods=[method], response_class=Response, openapi_extra=described(path))
    app.add_exception_handler(EdgeServeError, on_error)
    app.add_exception_handler(HTTPException, on_http_error)
    app.add_exception_handler(ClientDisconnect, on_disconnect)
    app.add_exception_handler(Exception, on_fault)
    if settings.token is not None:
        app.add_middleware(AuthorizationMiddleware, authorize=authorize)
    return app


def _other_routes(repository: RepositoryEndpoints, monitoring: MonitoringEndpoints) -> list[tuple[str, str, Handler]]:
    routes: list[tuple[str, str, Handler]] = [
        ("GET", "/v2", repository.server),
        ("GET", "/v2/health/live", repository.live),
        ("GET", "/v2/health/ready", repository.ready),
        ("GET", "/v1/locations", monitoring.locations),
        ("GET", "/metrics", monitoring.metrics),
        ("POST", "/v2/repository/index", repository.repository_index),
        ("POST", "/v2/repository/models/{model}/load", repository.load),
        ("POST", "/v2/repository/models/{model}/unload", repository.unload),
    ]
    for path in _MODEL_PATHS:
        routes += [("GET", path, repository.model), ("GET", f"{path}/ready", repository.model_ready)]
    return routes
