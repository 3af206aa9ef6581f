"""MLServer's custom runtime for torchvision models, written as its documentation teaches; runs in MLServer."""

import json
import os
from pathlib import Path

from mlserver import MLModel
from mlserver.codecs import Base64Codec, StringCodec
from mlserver.types import InferenceRequest, InferenceResponse
from torch import nn

from loadtests.compare.peer_model import PeerModels

#: One for all models of a process: what it knows is the same for each.
_models: PeerModels | None = None


class Classifier(MLModel):  # type: ignore[misc]
    """One model; its name says which."""

    async def load(self) -> bool:
        """Construct it and load its weights."""
        global _models
        _models = _models or PeerModels(Path(os.environ["COMPARE_SPEC"]))
        self._module: nn.Module | None = _models.load(self.name)
        return True

    async def predict(self, payload: InferenceRequest) -> InferenceResponse:
        """Classify one JPEG."""
        assert _models is not None
        assert self._module is not None
        (image,) = Base64Codec.decode_input(payload.inputs[0])
        asked = payload.inputs[0].parameters
        done = _models.classify(self._module, self.name, image, getattr(asked, "top_k", 5))
        content = json.dumps({"predictions": done.predictions, "exec_s": done.exec_s})
        return InferenceResponse(model_name=self.name, outputs=[StringCodec.encode_output("classes", [content])])

    async def unload(self) -> bool:
        """Let go of the weights."""
        self._module = None
        return True
