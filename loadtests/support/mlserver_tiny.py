"""The trivial model for MLServer, which imports this file in an environment of its own: nothing of ours is there."""

import base64

import numpy as np
from mlserver import MLModel
from mlserver.codecs import NumpyCodec
from mlserver.types import InferenceRequest, InferenceResponse

OUTPUTS = 10


class FirstTen(MLModel):  # type: ignore[misc]
    """The first ten numbers of the input; numbers come as base64 (datatype BYTES) or as JSON (FP32)."""

    async def load(self) -> bool:
        """Nothing to load."""
        return True

    async def predict(self, payload: InferenceRequest) -> InferenceResponse:
        """The answer, as JSON: ten numbers are nothing."""
        tensor = payload.inputs[0]
        if tensor.datatype == "BYTES":
            flat = np.frombuffer(base64.b64decode(tensor.data.root[0]), dtype="<f4")
        else:
            flat = np.asarray(tensor.data.root, dtype=np.float32)
        return InferenceResponse(
            model_name=self.name, outputs=[NumpyCodec.encode_output("output", flat[:OUTPUTS].reshape(1, -1))]
        )
