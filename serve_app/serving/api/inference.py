"""``POST /v2/models/{model}/infer``: inference on a tensor, by the Open Inference Protocol."""

from __future__ import annotations

import asyncio

from fastapi import Request
from fastapi.responses import Response

from serve_app.core.catalog import PublishedModel
from serve_app.core.precision import parts_of_form
from serve_app.core.versions import FIRST_VERSION
from serve_app.core.vocabulary import Forwarding
from serve_app.serving import oip
from serve_app.serving.api.fast_path import FastResponse, InferenceHttpRequest
from serve_app.serving.api.request_reader import RequestReader, check_content_type
from serve_app.serving.router.request import InferenceRequest, InferenceResponse
from serve_app.serving.router.router import Router
from serve_app.tasks.tensors import Tensors

#: JSON above this size is parsed in a thread: numbers as text take milliseconds.
_LARGE_JSON_BYTES = 32 * 1024
#: Bodies above this size are checked in a thread: a pass over every number takes milliseconds.
_LARGE_BODY_BYTES = 2 * 2**20

_JSON_LENGTH = oip.JSON_LENGTH_HEADER.lower()
_CONTENT_TYPES = frozenset({"", "application/json", "application/octet-stream"})


class InferenceEndpoints:
    """The handler of inference requests.

    Args:
        router: runs the inferences.
        reader: reads the requests.
        max_batch: rows of a tensor at most.
    """

    def __init__(self, router: Router, reader: RequestReader, max_batch: int) -> None:
        self._router = router
        self._reader = reader
        self._max_batch = max_batch

    async def infer(self, request: Request) -> Response:
        """Open Inference Protocol: inference on a tensor."""
        # FastAPI derives the API description from the annotation; the fast path passes an InferenceHttpRequest.
        with self._reader.counting_errors(request, request.path_params["model"]):
            return await self._infer(request)

    async def _infer(self, request: InferenceHttpRequest) -> Response:
        models = self._reader.models(request)
        self._router.require_capacity()
        check_content_type(request, _CONTENT_TYPES, "application/json or application/octet-stream")
        json_length = oip.parse_json_length(request.headers.get(_JSON_LENGTH))
        body = await self._reader.body(request, header_bytes=json_length or 0)
        json_bytes = len(body) if json_length is None else json_length
        if json_bytes > _LARGE_JSON_BYTES or len(body) > _LARGE_BODY_BYTES:
            parsed, tensors = await asyncio.to_thread(self._parse, body, json_length, models)
        else:
            parsed, tensors = self._parse(body, json_length, models)
        options = parsed.options
        response = await self._router.serve(
            InferenceRequest(
                name=self._reader.name(request),
                location=self._reader.location(request),
                payload=tensors,
                deadline_s=options.deadline_s,
                min_accuracy=options.min_accuracy,
                forwarding=Forwarding(options.forward),
                fits=lambda model: oip.fits(parsed, model),
            )
        )
        encoded = oip.encode_infer(
            parsed,
            model_name=response.model.name,
            version=str(response.model.version),
            outputs=response.outputs,
            labels=response.model.labels,
        )
        return FastResponse(encoded.body, {**encoded.headers, **outcome_headers(response)})

    def _parse(
        self, body: memoryview, json_length: int | None, models: tuple[PublishedModel, ...]
    ) -> tuple[oip.InferRequest, Tensors]:
        parsed = oip.parse_infer(body, json_length)
        model = models[0]
        if len(models) > 1:
            model = next((member for member in models if oip.fits(parsed, member)), model)
        oip.check_outputs(parsed, model)
        return parsed, oip.tensors_for(parsed, model, self._max_batch)


def parts_s(response: InferenceResponse) -> dict[str, float]:
    """Return the seconds that each part of an inference took."""
    return {
        "queue": response.queue_s,
        "load": response.load_s,
        "decode": response.decode_s,
        "exec": response.exec_s,
        "forward": response.forward_s,
    }


def outcome_headers(response: InferenceResponse) -> dict[str, str]:
    """Return the HTTP headers that say how and where an inference ran."""
    parts = ", ".join(f"{name};dur={part_s * 1000:.3f}" for name, part_s in parts_s(response).items())
    form, precision = parts_of_form(response.form)
    headers = {
        "X-EdgeServe-Outcome": response.outcome.value,
        "X-EdgeServe-Location": response.location,
        "X-EdgeServe-Model": response.model.name,
        "X-EdgeServe-Form": f"{form}; precision={precision}",
        "Server-Timing": parts,
    }
    if response.model.version != FIRST_VERSION:
        headers["X-EdgeServe-Version"] = str(response.model.version)
    if response.model.fallback:
        headers["X-EdgeServe-Weights"] = "fallback"
    return headers
