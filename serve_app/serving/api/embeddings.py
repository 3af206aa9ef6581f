"""``POST /v1/embeddings``: vectors of texts, in the form of OpenAI's interface, which its client libraries speak."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any

import numpy as np
import orjson
from fastapi import Request
from fastapi.responses import Response

from serve_app.core.catalog import PublishedModel
from serve_app.errors import EdgeServeError, InvalidRequest
from serve_app.serving.api.endpoints import Endpoints
from serve_app.serving.api.error_responses import JsonResponse, error_response
from serve_app.serving.api.inference import outcome_headers
from serve_app.serving.api.predict import raw_request
from serve_app.serving.api.request_reader import check_content_type, query_options
from serve_app.tasks.base import RawInput

_FIELDS = ("model", "input", "encoding_format", "dimensions", "user")
_FORMATS = ("float", "base64")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Asked:
    model: str
    texts: list[str]
    encoding: str
    dimensions: int | None


class EmbeddingEndpoints(Endpoints):
    """The handler of texts."""

    async def embeddings(self, request: Request) -> Response:
        """The vectors of one or several texts, in the form of OpenAI's interface.

        The body is ``{"model": NAME, "input": TEXT or [TEXT, ...], "encoding_format": "float" or "base64"}``. A client
        takes the URL of a location and ``/v1`` as its base URL.
        """
        try:
            with self._reader.counting_errors(request, ""):
                self._router.require_capacity()
                check_content_type(request, frozenset({"application/json"}), "application/json")
                options = query_options(request)
                asked = _parse(await self._reader.body(request))
            with self._reader.counting_errors(request, asked.model):
                return await self._embed(request, asked, options)
        except EdgeServeError as error:
            if error.is_fault:
                raise
            return _error_response(error)

    async def _embed(self, request: Request, asked: _Asked, options: Mapping[str, str]) -> Response:
        _require_text_embedder(self._router.models_named(asked.model)[0])
        raw = RawInput(data=orjson.dumps(asked.texts), content_type="application/json", options=options)
        response = await self._router.serve(raw_request(asked.model, self._reader.location(request), raw))
        answer = response.answer or {}
        if asked.dimensions not in (None, answer["dimensions"]):
            raise InvalidRequest(
                f"model {response.model.name!r} has vectors of {answer['dimensions']} dimensions, not "
                f"{asked.dimensions}; leave dimensions out"
            )
        content = {
            "object": "list",
            "data": [
                {"object": "embedding", "index": index, "embedding": _encoded(vector, asked.encoding)}
                for index, vector in enumerate(answer["embeddings"])
            ],
            "model": response.model.name,
            "usage": {"prompt_tokens": answer["tokens"], "total_tokens": answer["tokens"]},
        }
        return JsonResponse(content, headers=outcome_headers(response))


def _error_response(error: EdgeServeError) -> Response:
    """Return an error as clients of this form read it."""
    plain = error_response(error)
    kind = "invalid_request_error" if error.status < HTTPStatus.INTERNAL_SERVER_ERROR else "server_error"
    headers = {name: value for name, value in plain.headers.items() if name not in ("content-length", "content-type")}
    content = {"error": {"message": error.message, "type": kind, "param": None, "code": None}}
    return JsonResponse(content, error.status, headers)


def _parse(body: memoryview) -> _Asked:
    try:
        content = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise InvalidRequest(f"the body is not JSON ({error}); send an object with model and input") from error
    if not isinstance(content, dict):
        raise InvalidRequest(f"the body is a JSON {type(content).__name__}; send an object with model and input")
    unknown = next((name for name in content if name not in _FIELDS), None)
    if unknown is not None:
        raise InvalidRequest(f"there is no field {unknown[:64]!r}; the fields are {', '.join(_FIELDS)}")
    model = content.get("model")
    if not isinstance(model, str) or not model:
        raise InvalidRequest("the field model is missing or no string; name a model whose task is embedding")
    encoding = content.get("encoding_format") or "float"
    if encoding not in _FORMATS:
        raise InvalidRequest(f"encoding_format must be one of {', '.join(_FORMATS)}, not {str(encoding)[:32]!r}")
    dimensions = content.get("dimensions")
    if dimensions is not None and (type(dimensions) is not int or dimensions < 1):
        raise InvalidRequest(f"dimensions must be a whole number, not {str(dimensions)[:32]!r}")
    return _Asked(model=model, texts=_texts(content.get("input")), encoding=encoding, dimensions=dimensions)


def _texts(given: Any) -> list[str]:
    texts = [given] if isinstance(given, str) else given
    if not isinstance(texts, list) or not texts:
        raise InvalidRequest("the field input must be a text or a list of texts, and not empty")
    if any(isinstance(text, int | list) for text in texts):
        raise InvalidRequest("the field input holds tokens, which belong to the tokenizer of another model; send texts")
    if not all(isinstance(text, str) for text in texts):
        raise InvalidRequest("the field input must be a text or a list of texts")
    return texts


def _require_text_embedder(model: PublishedModel) -> None:
    if model.task.kind != "embedding" or model.task.image is not None:
        what = "embeds images" if model.task.kind == "embedding" else f"has the task {model.task.kind!r}"
        raise InvalidRequest(f"model {model.name!r} {what}, not texts; ask /v1/predict?model={model.name}")


def _encoded(vector: list[float], encoding: str) -> list[float] | str:
    return vector if encoding == "float" else base64.b64encode(np.asarray(vector, "<f4").tobytes()).decode()
