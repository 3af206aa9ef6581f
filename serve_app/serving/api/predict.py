"""``POST /v1/predict``: what people send to a model, and what they read of its answer, whatever its task."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from fastapi import Request
from fastapi.responses import Response

from serve_app.core.vocabulary import Forwarding
from serve_app.errors import InvalidRequest
from serve_app.serving import oip
from serve_app.serving.api.endpoints import Endpoints
from serve_app.serving.api.error_responses import JsonResponse
from serve_app.serving.api.inference import outcome_headers, parts_s
from serve_app.serving.api.request_reader import check_content_type, query_options
from serve_app.serving.router.request import InferenceRequest, InferenceResponse
from serve_app.tasks.base import RawInput

_CONTENT_TYPES = frozenset({
    "image/jpeg", "image/png", "image/webp", "text/plain", "audio/wav", "audio/x-wav", "audio/wave", "audio/vnd.wave",
    "application/json", "application/octet-stream",
})  # fmt: skip
#: The options of all tasks; each reads its own.
TASK_OPTIONS: Final = ("top_k", "min_score", "max_overlap", "mask", "labels")
_WORDING = (
    "image/jpeg, image/png, image/webp, text/plain, audio/wav, application/json, or application/octet-stream for a "
    "file of any kind"
)


class PredictionEndpoints(Endpoints):
    """The handler of raw inputs."""

    async def predict(self, request: Request) -> Response:
        """The answer of a model to an image, a text, a WAV file, JSON or any other file, by the task of the model.

        Query parameter ``model`` names a model or a family. The others are options of the task: ``top_k`` of
        classifications, ``labels`` of text-classification, ``min_score`` and ``max_overlap`` of detection,
        ``min_score`` of voice-activity, ``mask`` of segmentation; and those of every inference, such as
        ``deadline_ms``.
        """
        with self._reader.counting_errors(request, request.query_params.get("model", "")):
            return await self._predict(request)

    async def _predict(self, request: Request) -> Response:
        self._router.require_capacity()
        content_type = check_content_type(request, _CONTENT_TYPES, _WORDING)
        options = query_options(request, "model", *TASK_OPTIONS)
        name = required_model(options, "/v1/predict")
        self._router.models_named(name)
        body = await self._reader.body(request)
        if not body:
            raise InvalidRequest("the body is empty; send an image, text, a WAV file or JSON, as the model takes it")
        raw = RawInput(data=bytes(body), content_type=content_type, options=options)
        response = await self._router.serve(raw_request(name, self._reader.location(request), raw))
        task = {"task": response.model.task.kind}
        return JsonResponse(task_content(response, task), headers=outcome_headers(response))


def required_model(options: Mapping[str, str], path: str) -> str:
    """Return the query parameter ``model``.

    Raises:
        InvalidRequest: it is missing.
    """
    name = options.get("model")
    if not name:
        raise InvalidRequest(f"query parameter model is missing; name a model or a family: {path}?model=resnet50")
    return name


def raw_request(name: str, location: str, raw: RawInput) -> InferenceRequest:
    """Return the request for the task of a model; its options are those of ``raw``.

    Raises:
        InvalidRequest: an option that every inference has is wrong.
    """
    options = oip.RequestOptions.from_query(dict(raw.options))
    return InferenceRequest(
        name=name,
        location=location,
        payload=raw,
        deadline_s=options.deadline_s,
        min_accuracy=options.min_accuracy,
        forwarding=Forwarding(options.forward),
    )


def task_content(response: InferenceResponse, more: Mapping[str, Any]) -> dict[str, Any]:
    """Return the JSON of a task's answer, with where and how it came about."""
    content: dict[str, Any] = {
        "model": response.model.name,
        "location": response.location,
        "outcome": response.outcome.value,
        **more,
        **(response.answer or {}),
        "timing_ms": {name: round(part_s * 1000, 3) for name, part_s in parts_s(response).items()},
    }
    if response.model.fallback:
        content["warning"] = f"the weights are {response.model.weights_actual}: the answer means nothing"
    return content
