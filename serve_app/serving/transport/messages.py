"""The messages between a router and a worker; all of them cross process boundaries."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from serve_app.core.vocabulary import Outcome
from serve_app.errors import EdgeServeError

FloatArray = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True, kw_only=True)
class InferenceTask:
    """One inference for a worker to run.

    Attributes:
        model_id: the model.
        origin: the location whose user sent the request.
        payload: a batch ``[N, 3, H, W]`` of float32, or the bytes of one image file.
        budget_s: seconds until the deadline of the request.
        only_if_resident: reply ``NotResident`` instead of loading the model.
    """

    model_id: str
    origin: str
    payload: FloatArray | bytes
    budget_s: float
    only_if_resident: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class InferenceResult:
    """The result of an inference, and what the router learns of the worker by it.

    Attributes:
        logits: ``[N, classes]``.
        outcome: hit, join or load.
        queue_s: seconds of waiting for memory or a thread.
        load_s: seconds of waiting for a load.
        decode_s: seconds of decoding the image.
        exec_s: seconds of execution.
        replica: the worker's replica id.
        sequence: number of the worker's next report.
        evicted: the models that left memory for the load.
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
    """The model is not in memory, and the task was ``only_if_resident``: the router's view was stale."""

    replica: str
    sequence: int


@dataclass(frozen=True, slots=True, kw_only=True)
class InferenceRejected:
    """The task failed, and the worker is well. A value, because Serve logs an exception with its traceback."""

    error: EdgeServeError


Reply = InferenceResult | NotResident | InferenceRejected
