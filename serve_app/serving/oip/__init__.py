"""The Open Inference Protocol v2 (KServe v2) over REST, as plain functions: bytes in, arrays out, and back.

Numbers travel as JSON or, with the binary tensor data extension, as raw little-endian bytes behind the JSON header,
whose length is in the HTTP header ``Inference-Header-Content-Length``. The package imports no web framework and no
torch::

    request = parse_infer(body, parse_json_length(headers.get(JSON_LENGTH_HEADER)))
    check_version(version)
    check_outputs(request, model)
    tensors = tensors_for(request, model, max_batch=8)
    ...                                              # run the model
    response = encode_infer(request, model_name=model.model_id, outputs={"output": logits})

Every error in a request raises ``InvalidRequest``, whose one sentence names the wrong part.

Specification: https://github.com/kserve/open-inference-protocol, and the extensions "binary tensor data" and
"classification" of https://github.com/triton-inference-server/server/tree/main/docs/protocol.
"""

from serve_app.serving.oip.options import OPTIONS, RequestOptions
from serve_app.serving.oip.request import (
    InferRequest,
    RequestedOutput,
    check_outputs,
    fits,
    parse_infer,
    parse_json_length,
    tensors_for,
)
from serve_app.serving.oip.response import (
    EXTENSIONS,
    JSON_LENGTH_HEADER,
    VERSION,
    EncodedResponse,
    check_version,
    encode_infer,
    model_metadata,
    server_metadata,
)
from serve_app.serving.oip.tensors import InputTensor, datatype_of, tensor_from_binary, tensor_from_json

__all__ = [
    "EXTENSIONS",
    "JSON_LENGTH_HEADER",
    "OPTIONS",
    "VERSION",
    "EncodedResponse",
    "InferRequest",
    "InputTensor",
    "RequestOptions",
    "RequestedOutput",
    "check_outputs",
    "check_version",
    "datatype_of",
    "encode_infer",
    "fits",
    "model_metadata",
    "parse_infer",
    "parse_json_length",
    "server_metadata",
    "tensor_from_binary",
    "tensor_from_json",
    "tensors_for",
]
