"""The messages between a router and a worker; all of them cross process boundaries."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from serve_app.core.vocabulary import Outcome
from serve_app.errors import EdgeServeError
from serve_app.tasks.base import RawInput
from serve_app.tasks.tensors import Tensors


@dataclass(frozen=True, slots=True, kw_only=True)
class InferenceTask:
    """One inference for a worker to run.

    Attributes:
        model_id: the model.
        origin: the location whose user sent the request.
        payload: the inputs of the model, or what its task makes them from.
        budget_s: seconds until the deadline of the request.
        only_if_resident: reply ``NotResident`` instead of loading the model.
    """

    model_id: str
    origin: str
    payload: Tensors | RawInput
    budget_s: float
    only_if_resident: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class InferenceResult:
    """The result of an inference, and what the router learns of the worker by it.

    Attributes:
        outputs: of the last execution; empty where the task has made an answer of them.
        answer: of the task, as JSON has it; None for tensors.
        outcome: hit, join or load.
        queue_s: seconds of waiting for memory or a thread.
        load_s: seconds of waiting for a load.
        decode_s: seconds in which the task has made tensors.
        exec_s: seconds of execution.
        replica: the worker's replica id.
        sequence: number of the worker's next report.
        evicted: the models that left memory for the load.
        form: in which the model ran, see ``PublishedModel.form``.
    """

    outputs: Tensors
    answer: dict[str, Any] | None = None
    outcome: Outcome
    queue_s: float
    load_s: float
    decode_s: float
    exec_s: float
    replica: str
    sequence: int
    evicted: tuple[str, ...] = ()
    form: str = "mapped"


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
