"""What the API description says of the requests, whose bodies and queries the handlers read by themselves."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, Final

from serve_app.core.contract import DATATYPES
from serve_app.serving.oip.options import MAX_PRIORITY
from serve_app.serving.oip.request import MAX_REQUEST_ID

_Schema = dict[str, Any]

_STRING: Final[_Schema] = {"type": "string"}
_FILE: Final[_Schema] = {"schema": {"type": "string", "format": "binary"}}

#: Of every inference: in the query of /v1, and among the parameters of the protocol.
_OPTIONS: Final[dict[str, _Schema]] = {
    "deadline_ms": {"type": "number", "minimum": 0, "description": "Milliseconds from the arrival of the request."},
    "min_accuracy": {"type": "number", "minimum": 0, "maximum": 1, "description": "Of the member of a family."},
    "forward": {"type": "string", "enum": ["auto", "never", "prefer"], "default": "auto"},
    "priority": {"type": "integer", "minimum": 0, "maximum": MAX_PRIORITY, "description": "Without effect so far."},
}
_TOP_K: Final[_Schema] = {"type": "integer", "minimum": 1, "maximum": 1000, "default": 5}
_SHARE: Final[_Schema] = {"type": "number", "minimum": 0, "maximum": 1}
_MODEL: Final[_Schema] = {"type": "string", "description": "A model, MODEL@VERSION, or a family."}

_TENSOR_DATA: Final[_Schema] = {
    "type": "array",
    "items": {},
    "description": "The elements, flat or nested; left out where binary_data_size is given.",
}
_INFER: Final[_Schema] = {
    "type": "object",
    "required": ["inputs"],
    "properties": {
        "id": {"type": "string", "maxLength": MAX_REQUEST_ID},
        "inputs": {
            "type": "array",
            "minItems": 1,
            "items": {
                "type": "object",
                "required": ["name", "datatype", "shape"],
                "properties": {
                    "name": {"type": "string", "minLength": 1},
                    "datatype": {"type": "string", "enum": list(DATATYPES)},
                    "shape": {"type": "array", "items": {"type": "integer", "minimum": 0}},
                    "parameters": {
                        "type": "object",
                        "properties": {
                            "binary_data_size": {
                                "type": "integer",
                                "minimum": 0,
                                "description": "Bytes of this tensor among those that follow the JSON.",
                            }
                        },
                    },
                    "data": _TENSOR_DATA,
                },
            },
        },
        "outputs": {
            "type": "array",
            "description": "Those to return; all of them if left out.",
            "items": {
                "type": "object",
                "required": ["name"],
                "properties": {
                    "name": {"type": "string", "minLength": 1},
                    "parameters": {
                        "type": "object",
                        "properties": {
                            "binary_data": {"type": "boolean"},
                            "classification": {
                                "type": "integer",
                                "minimum": 1,
                                "description": "So many best classes instead of the tensor.",
                            },
                        },
                    },
                },
            },
        },
        "parameters": {
            "type": "object",
            "properties": {"binary_data_output": {"type": "boolean", "default": False}, **_OPTIONS},
        },
    },
}
_EMBEDDINGS: Final[_Schema] = {
    "type": "object",
    "required": ["model", "input"],
    "additionalProperties": False,
    "properties": {
        "model": {"type": "string", "description": "A model whose task is embedding."},
        "input": {"oneOf": [_STRING, {"type": "array", "minItems": 1, "items": _STRING}]},
        "encoding_format": {"type": "string", "enum": ["float", "base64"], "default": "float"},
        "dimensions": {"type": "integer", "minimum": 1, "description": "Those of the model, or left out."},
        "user": {"description": "Without effect."},
    },
}
_PREDICT: Final[_Schema] = {
    "description": "Inputs by name for a model without a task; a text, or a list of texts, for one that takes texts.",
    "oneOf": [{"type": "object", "additionalProperties": True}, _STRING, {"type": "array", "items": _STRING}],
}

_PICTURES: Final = ("image/jpeg", "image/png", "image/webp")
_ANY_FILE: Final = "application/octet-stream"
_JSON_LENGTH: Final[_Schema] = {
    "name": "Inference-Header-Content-Length",
    "in": "header",
    "description": "Bytes of the JSON part, where binary tensors follow it.",
    "schema": {"type": "integer", "minimum": 1},
}


def described(path: str) -> _Schema:
    """Return what the description of a ``POST`` or ``GET`` of ``path`` has beyond its handler's docstring."""
    parameters = [
        {"name": name, "in": "path", "required": True, "schema": _STRING} for name in re.findall(r"{(\w+)}", path)
    ]
    description = _described_body(path)
    if "parameters" in description:
        parameters += description["parameters"]
    return description | ({"parameters": parameters} if parameters else {})


def _described_body(path: str) -> _Schema:
    match path.rpartition("/")[2]:
        case "infer":
            body = _body({"application/json": {"schema": _INFER}, _ANY_FILE: _FILE})
            return {"parameters": [_JSON_LENGTH], **body}
        case "predict":
            known = {
                "top_k": _TOP_K,
                "min_score": _SHARE,
                "max_overlap": _SHARE,
                "mask": {"type": "boolean", "default": True},
                "labels": {"type": "string", "description": "Labels of a text-classification, separated by commas."},
            }
            audio = ("audio/wav", "audio/x-wav", "audio/wave", "audio/vnd.wave")
            files = dict.fromkeys((*_PICTURES, *audio, _ANY_FILE), _FILE)
            body = _body(files | {"text/plain": {"schema": _STRING}, "application/json": {"schema": _PREDICT}})
            return {"parameters": _query(known, required=("model",)), **body}
        case "classify":
            body = _body(dict.fromkeys((*_PICTURES, _ANY_FILE), _FILE))
            return {"parameters": _query({"top_k": _TOP_K}, required=("model",)), **body}
        case "embeddings":
            return {"parameters": _query({}), **_body({"application/json": {"schema": _EMBEDDINGS}})}
        case _:
            return {}


def _body(content: Mapping[str, _Schema]) -> _Schema:
    return {"requestBody": {"required": True, "content": dict(content)}}


def _query(options: Mapping[str, _Schema], required: Sequence[str] = ()) -> list[_Schema]:
    known = {**({"model": _MODEL} if "model" in required else {}), **options, **_OPTIONS}
    return [
        {"name": name, "in": "query", "required": name in required, "schema": schema} for name, schema in known.items()
    ]
