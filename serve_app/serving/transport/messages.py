"""What a router and a worker say to each other; everything here crosses process boundaries."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from serve_app.core.vocabulary import Outcome
from serve_app.errors import EdgeServeError

FloatArray = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True, kw_only=True)
class InferenceTask:
    """One inference: ``payload`` is a batch ``[N, 3, H, W]`` of float32, or the bytes of one image file.

    ``origin`` is the location whose user asks. ``only_if_resident``: answer ``NotResident`` rather than load the model.
    ``budget_s``: seconds left until the answer is useless.
    """

    model_id: str
    origin: str
    payload: FloatArray | bytes
    budget_s: float
    only_if_resident: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class InferenceResult:
    """The result, and what the router may learn from it.

    ``logits`` is ``[N, classes]``. The four times are seconds that this request spent waiting for memory or a thread,
    waiting for a load, decoding its image, and executing. ``sequence`` numbers the worker's next report.
    """

    logits: FloatArray
    outcome: Outcome
    queue_s: float
    load_s: float
    decode_s: float
    exec_s: float
    replica: str
    sequence: int
    evicted: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class NotResident:
    """The model is not here and the request said not to load it: the router's hint was stale."""

    replica: str
    sequence: int


@dataclass(frozen=True, slots=True, kw_only=True)
class InferenceRejected:
    """The worker is well, but this request fails. A value, so that Serve logs no traceback for a user's mistake."""

    error: EdgeServeError


Reply = InferenceResult | NotResident | InferenceRejected
