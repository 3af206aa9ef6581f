"""``POST /v1/classify``: the best labels for one image."""

from __future__ import annotations

from fastapi import Request
from fastapi.responses import Response

from serve_app.errors import InvalidRequest
from serve_app.serving.api.endpoints import Endpoints
from serve_app.serving.api.error_responses import JsonResponse
from serve_app.serving.api.inference import outcome_headers
from serve_app.serving.api.predict import raw_request, required_model, task_content
from serve_app.serving.api.request_reader import check_content_type, query_options
from serve_app.tasks.base import RawInput
from serve_app.tasks.classes import label_count

_CONTENT_TYPES = frozenset({"image/jpeg", "image/png", "image/webp", "application/octet-stream"})


class ClassificationEndpoints(Endpoints):
    """The handler of images."""

    async def classify(self, request: Request) -> Response:
        """The best labels for one JPEG, PNG or WebP image."""
        with self._reader.counting_errors(request, request.query_params.get("model", "")):
            return await self._classify(request)

    async def _classify(self, request: Request) -> Response:
        self._router.require_capacity()
        content_type = check_content_type(
            request, _CONTENT_TYPES, "image/jpeg, image/png, image/webp or application/octet-stream"
        )
        options = query_options(request, "model", "top_k")
        name = required_model(options, "/v1/classify")
        label_count(options.get("top_k", "5"))
        self._require_classifier(name)
        body = await self._reader.body(request)
        if not body:
            raise InvalidRequest("the body is empty; send the bytes of a JPEG, PNG or WebP image")
        raw = RawInput(data=bytes(body), content_type=content_type, options=options)
        response = await self._router.serve(raw_request(name, self._reader.location(request), raw))
        return JsonResponse(task_content(response, {}), headers=outcome_headers(response))

    def _require_classifier(self, name: str) -> None:
        model = self._router.models_named(name)[0]
        if model.task.kind != "image-classification":
            raise InvalidRequest(
                f"model {model.name!r} has the task {model.task.kind!r} and does not classify images; "
                f"ask /v1/predict?model={model.name}, or /v2/models/{model.name}/infer with tensors"
            )
