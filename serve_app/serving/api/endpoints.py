"""HTTP at the rim of a router: reads requests, calls ``Router``, writes answers and errors."""

from __future__ import annotations

import asyncio
import contextlib
import re
from collections.abc import Awaitable, Callable, Iterator, Mapping
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any

from fastapi import Request
from fastapi.responses import PlainTextResponse, Response
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from serve_app import __version__
from serve_app.config.edge import LimitSettings
from serve_app.core.catalog import PublishedModel
from serve_app.core.vocabulary import Forwarding, ModelState
from serve_app.errors import (
    EdgeServeError,
    InvalidRequest,
    NotFound,
    PayloadTooLarge,
    UnsupportedMediaType,
)
from serve_app.serving import oip
from serve_app.serving.api.auth import TokenGate, require_token
from serve_app.serving.api.cluster_status import cluster_status
from serve_app.serving.api.error_responses import (
    JsonResponse,
    on_any_error,
    on_disconnect,
    on_error,
    on_fault,
    on_http_error,
)
from serve_app.serving.api.fast_path import BareResponse, FastPath, Incoming
from serve_app.serving.router.request import InferenceRequest, InferenceResponse
from serve_app.serving.router.router import Router
from serve_app.tasks.image_classification import top_k

#: JSON bodies above this size are parsed in a thread: numbers as text take milliseconds.
_LARGE_JSON_BYTES = 32 * 1024

_MAX_TOP_K = 1000

#: Bodies above this size are checked in a thread: looking at every number takes milliseconds.
_LARGE_BODY_BYTES = 2 * 2**20

_JSON_LENGTH = oip.JSON_LENGTH_HEADER.lower()
#: So much memory is taken before a body has arrived, on its word that it will be as long; the rest when it comes.
_PREPARED_BYTES = 2**20

_INFER_TYPES = frozenset({"", "application/json", "application/octet-stream"})
_IMAGE_TYPES = frozenset({"image/jpeg", "image/png", "image/webp", "application/octet-stream"})


@dataclass(frozen=True, slots=True, kw_only=True)
class HttpSettings:
    """What HTTP needs to know. ``location`` is None for the gateway, which serves all of them."""

    location: str | None
    default_location: str
    limits: LimitSettings
    token: str | None


class Endpoints:
    """The handlers of one router's HTTP interface."""

    def __init__(self, router: Router, settings: HttpSettings, scrape: Callable[[], Awaitable[str]]) -> None:
        self._router = router
        self._settings = settings
        self._scrape = scrape

    async def server(self, request: Request) -> Response:
        """Open Inference Protocol: the server and its extensions."""
        extensions = (*oip.EXTENSIONS, "model_repository")
        return JsonResponse(oip.server_metadata("edgeserve", __version__, extensions))

    async def live(self, request: Request) -> Response:
        """Open Inference Protocol: whether the process runs."""
        return JsonResponse({"live": True})

    async def ready(self, request: Request) -> Response:
        """Open Inference Protocol: whether a worker is there to serve."""
        location = self._location(request)
        workers = [report for report in self._router.known.workers() if report.location == location]
        is_ready = bool(workers) and len(self._router.catalog) > 0
        return JsonResponse({"ready": is_ready}, HTTPStatus.OK if is_ready else HTTPStatus.SERVICE_UNAVAILABLE)

    async def model(self, request: Request) -> Response:
        """Open Inference Protocol: one model's tensors, family, accuracy and weights."""
        return JsonResponse(oip.model_metadata(self._named(request)[0]))

    async def model_ready(self, request: Request) -> Response:
        """Open Inference Protocol: whether a model can be served, from memory or after a load."""
        models = self._named(request)
        workers = self._router.known.workers()
        is_ready = any(report.can_hold(model.profile) for model in models for report in workers)
        status = HTTPStatus.OK if is_ready else HTTPStatus.SERVICE_UNAVAILABLE
        return JsonResponse({"name": request.path_params["model"], "ready": is_ready}, status)

    async def infer(self, request: Request) -> Response:
        """Open Inference Protocol: inference on a tensor."""
        # By the hot path it comes with an `Incoming`; what is written here is for the API description.
        with self._counting_errors(request, request.path_params["model"]):
            return await self._infer(request)

    async def _infer(self, request: Incoming) -> Response:
        models = self._named(request)
        self._router.require_room()
        _check_type(request, _INFER_TYPES, "application/json or application/octet-stream")
        json_length = oip.parse_json_length(request.headers.get(_JSON_LENGTH))
        body = await self._body(request)
        json_bytes = len(body) if json_length is None else json_length
        if json_bytes > _LARGE_JSON_BYTES or len(body) > _LARGE_BODY_BYTES:
            parsed, batch = await asyncio.to_thread(self._parse, body, json_length, models)
        else:
            parsed, batch = self._parse(body, json_length, models)
        options = parsed.options
        served = await self._router.serve(
            InferenceRequest(
                name=request.path_params["model"],
                location=self._location(request),
                payload=batch,
                deadline_s=_seconds(options.deadline_ms),
                min_accuracy=options.min_accuracy,
                forwarding=Forwarding(options.forward),
                fits=lambda model: oip.fits(parsed, model),
            )
        )
        encoded = oip.encode_infer(
            parsed,
            model_name=served.model.model_id,
            outputs={served.model.outputs[0].name: served.logits},
            labels=served.model.labels,
        )
        return BareResponse(encoded.body, {**encoded.headers, **_headers(served)})

    async def classify(self, request: Request) -> Response:
        """The best labels for one JPEG, PNG or WebP image."""
        with self._counting_errors(request, request.query_params.get("model", "")):
            return await self._classify(request)

    async def _classify(self, request: Request) -> Response:
        self._router.require_room()
        _check_type(request, _IMAGE_TYPES, "image/jpeg, image/png, image/webp or application/octet-stream")
        name = request.query_params.get("model")
        if not name:
            raise InvalidRequest(
                "query parameter model is missing; name a model or a family: /v1/classify?model=resnet50"
            )
        count = _top_k(request.query_params.get("top_k", "5"))
        options = oip.RequestOptions.from_query(dict(request.query_params))
        body = await self._body(request)
        if not body:
            raise InvalidRequest("the body is empty; send the bytes of a JPEG, PNG or WebP image")
        served = await self._router.serve(
            InferenceRequest(
                name=name,
                location=self._location(request),
                payload=bytes(body),
                deadline_s=_seconds(options.deadline_ms),
                min_accuracy=options.min_accuracy,
                forwarding=Forwarding(options.forward),
            )
        )
        predictions = top_k(served.logits[0], served.model.labels, count)
        content = {
            "model": served.model.model_id,
            "location": served.location,
            "outcome": served.outcome.value,
            "predictions": [
                {"label": best.label, "index": best.index, "probability": best.probability} for best in predictions
            ],
            "timing_ms": {name: round(seconds * 1000, 3) for name, seconds in _timings(served).items()},
        }
        if served.model.fallback:
            content["warning"] = f"the weights are {served.model.weights_actual}: the labels mean nothing"
        return JsonResponse(content, headers=_headers(served))

    async def repository_index(self, request: Request) -> Response:
        """Model repository extension: every model, and whether this location holds it."""
        location = self._location(request)
        ready = {
            model.model_id
            for report in self._router.known.workers()
            if report.location == location
            for model in report.models.values()
            if model.state is ModelState.READY
        }
        index = [
            {
                "name": model.model_id,
                "version": oip.VERSION,
                "state": "READY" if model.model_id in ready else "UNAVAILABLE",
            }
            for model in self._router.catalog.models
        ]
        return JsonResponse(index)

    async def load(self, request: Request) -> Response:
        """Model repository extension: bring a model into memory here."""
        await self._router.load(self._location(request), request.path_params["model"])
        return JsonResponse({})

    async def unload(self, request: Request) -> Response:
        """Model repository extension: take a model out of memory here."""
        await self._router.unload(self._location(request), request.path_params["model"])
        return JsonResponse({})

    async def locations(self, request: Request) -> Response:
        """The cluster: memory, resident models, rates and outcomes of every location."""
        router = self._router
        return JsonResponse(
            cluster_status(
                await router.whole_view(),
                router.locations,
                coordinator_up=router.coordinator_up,
                view_age_s=router.view_age_s(),
            )
        )

    async def metrics(self, request: Request) -> Response:
        """Prometheus text with the metrics of this node."""
        return PlainTextResponse(await self._scrape(), media_type="text/plain; version=0.0.4")

    def _parse(
        self, body: bytearray, json_length: int | None, models: tuple[PublishedModel, ...]
    ) -> tuple[oip.InferRequest, Any]:
        parsed = oip.parse_infer(body, json_length)
        model = models[0]
        if len(models) > 1:
            model = next((member for member in models if oip.fits(parsed, member)), model)
        oip.check_outputs(parsed, model)
        return parsed, oip.batch_for(parsed, model, self._settings.limits.batch)

    @contextlib.contextmanager
    def _counting_errors(self, request: Incoming, name: str) -> Iterator[None]:
        """Count a request that fails; one that is served is counted by the router, with its outcome."""
        try:
            yield
        except ClientDisconnect:
            raise
        except Exception as error:
            status = error.status if isinstance(error, EdgeServeError) else HTTPStatus.INTERNAL_SERVER_ERROR
            location = request.headers.get("x-edge-location", self._settings.default_location)
            location = self._settings.location or (location if location in self._router.locations else "none")
            self._router.count(location, name, "error", status)
            raise

    def _location(self, request: Incoming) -> str:
        here = self._settings.location
        name: str = request.headers.get("x-edge-location", here or self._settings.default_location)
        if here is not None and name != here:
            raise NotFound(f"this address serves {here} only; ask the address without a location for {name[:64]!r}")
        if name not in self._router.locations:
            raise NotFound(f"no location is called {name[:64]!r}; there are {', '.join(self._router.locations)}")
        return name

    def _named(self, request: Incoming) -> tuple[PublishedModel, ...]:
        oip.check_version(request.path_params.get("version"))
        return self._router.models_named(request.path_params["model"])

    async def _body(self, request: Incoming) -> bytearray:
        limit = self._settings.limits.body
        message = f"the body is larger than the limit of {limit} bytes; send a smaller one"
        expected = int(request.headers.get("content-length") or 0)
        if expected > limit:
            raise PayloadTooLarge(message)
        # Chunks are put in their place while later ones are on their way, and the worker may write into it: torch wants
        # its inputs so, and would have them copied otherwise.
        body, size = bytearray(min(expected, _PREPARED_BYTES)), 0
        async for chunk in request.stream():
            if size + len(chunk) > limit:
                raise PayloadTooLarge(message)
            body[size : size + len(chunk)] = chunk
            size += len(chunk)
        del body[size:]
        return body


def build_http_app(router: Router, settings: HttpSettings, scrape: Callable[[], Awaitable[str]]) -> FastPath:
    """The ASGI application of one router."""
    app = FastPath(
        title="EdgeServe", version=__version__, description="Many models from edge locations with little memory."
    )
    ends = Endpoints(router, settings, scrape)
    infer: list[tuple[str, str, Callable[[Any], Awaitable[Response]]]] = []
    others: list[tuple[str, str, Callable[[Any], Awaitable[Response]]]] = [
        ("GET", "/v2", ends.server),
        ("GET", "/v2/health/live", ends.live),
        ("GET", "/v2/health/ready", ends.ready),
        ("POST", "/v1/classify", ends.classify),
        ("GET", "/v1/locations", ends.locations),
        ("GET", "/metrics", ends.metrics),
        ("POST", "/v2/repository/index", ends.repository_index),
        ("POST", "/v2/repository/models/{model}/load", ends.load),
        ("POST", "/v2/repository/models/{model}/unload", ends.unload),
    ]
    for prefix in ("/v2/models/{model}", "/v2/models/{model}/versions/{version}"):
        infer.append(("POST", f"{prefix}/infer", ends.infer))
        others += [("GET", prefix, ends.model), ("GET", f"{prefix}/ready", ends.model_ready)]
    # Serve looks for the route of every request from the first one on, to call its metrics by it.
    for method, path, handler in (*infer, *others):
        app.add_api_route(path, handler, methods=[method], response_class=Response)
    app.add_exception_handler(EdgeServeError, on_error)
    app.add_exception_handler(HTTPException, on_http_error)
    app.add_exception_handler(ClientDisconnect, on_disconnect)
    app.add_exception_handler(Exception, on_fault)
    token = settings.token
    if token is not None:
        app.add_middleware(TokenGate, token=token)
    app.infer = ends.infer
    app.on_error = on_any_error

    def admit(headers: Mapping[str, str]) -> None:
        if token is not None:
            header = headers.get("authorization")
            require_token(None if header is None else header.encode("latin-1"), token.encode())

    app.admit = admit
    return app


def _check_type(request: Incoming, accepted: frozenset[str], wording: str) -> None:
    encoding = request.headers.get("content-encoding", "identity")
    if encoding.lower() != "identity":
        raise UnsupportedMediaType(f"Content-Encoding {encoding[:32]!r} is not accepted here; send the body as it is")
    content_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if content_type not in accepted:
        found = f"{content_type[:64]!r} is" if content_type else "a body without a content type is"
        raise UnsupportedMediaType(f"{found} not accepted here; send Content-Type: {wording}")


def _top_k(value: str) -> int:
    if re.fullmatch("[0-9]{1,4}", value) is None or not 1 <= int(value) <= _MAX_TOP_K:
        raise InvalidRequest(f"top_k must be a whole number from 1 to {_MAX_TOP_K}, not {value[:32]!r}")
    return int(value)


def _seconds(milliseconds: float | None) -> float | None:
    return None if milliseconds is None else milliseconds / 1000


def _timings(served: InferenceResponse) -> dict[str, float]:
    return {
        "queue": served.queue_s,
        "load": served.load_s,
        "decode": served.decode_s,
        "exec": served.exec_s,
        "forward": served.forward_s,
    }


def _headers(served: InferenceResponse) -> dict[str, str]:
    timings = ", ".join(f"{name};dur={seconds * 1000:.3f}" for name, seconds in _timings(served).items())
    return {
        "X-EdgeServe-Outcome": served.outcome.value,
        "X-EdgeServe-Location": served.location,
        "X-EdgeServe-Model": served.model.model_id,
        "Server-Timing": timings,
    }
