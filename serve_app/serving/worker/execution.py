"""What is executed for a request: the model alone, or between the steps of a task; for one request or several."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

from serve_app.core.contract import BATCH, Contract
from serve_app.serving.worker.model_backend import RunnableModel
from serve_app.tasks.base import Answer, Solution
from serve_app.tasks.joined_tensors import join, split
from serve_app.tasks.tensors import Tensors, complete


@dataclass(frozen=True, slots=True, kw_only=True)
class Execution:
    """The inputs of a request's first execution, and the task that goes on with its outputs; None: there is none."""

    contract: Contract
    inputs: Tensors
    solution: Solution | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Executed:
    """Outputs or, where there is a task, its answer; and how often the model was executed for it."""

    outputs: Tensors
    answer: Answer | None
    executions: int


def run_alone(loaded: RunnableModel, execution: Execution, threads: int) -> Executed:
    """Execute a model until its task has an answer."""
    return _finish(loaded, execution, loaded.run(execution.inputs, threads), threads)


def run_joined(
    loaded: RunnableModel, executions: Sequence[Execution], threads: int
) -> Iterator[dict[int, Executed | Exception]]:
    """Execute a model once for several requests; yield results, by the position of the request, as they come.

    It raises what the model raises before there is a result. That may be the fault of one request: they can be run
    alone then, as none has been touched.
    """
    contract = executions[0].contract
    rows = [_rows(contract, each.inputs) for each in executions]
    outputs = loaded.run(join(contract, [each.inputs for each in executions]), threads)
    parts = split(contract, outputs, rows)
    # Those that need no more do not wait for those that do.
    ended: dict[int, Executed | Exception] = {
        index: Executed(outputs=part, answer=None, executions=1)
        for index, (each, part) in enumerate(zip(executions, parts, strict=True))
        if each.solution is None
    }
    if ended:
        yield ended
    for index, (each, part) in enumerate(zip(executions, parts, strict=True)):
        if index not in ended:
            yield {index: _attempt(partial(_finish, loaded, each, part, threads))}


def _attempt(run: Callable[[], Executed]) -> Executed | Exception:
    try:
        return run()
    except Exception as error:
        return error


def _rows(contract: Contract, inputs: Tensors) -> int:
    spec = contract.inputs[0]
    rows: int = inputs[spec.name].shape[spec.axes.index(BATCH)]
    return rows


def _finish(loaded: RunnableModel, execution: Execution, outputs: Tensors, threads: int) -> Executed:
    executions, solution = 1, execution.solution
    if solution is None:
        return Executed(outputs=outputs, answer=None, executions=executions)
    while True:
        try:
            wanted = solution.send(outputs)
        except StopIteration as done:
            return Executed(outputs={}, answer=done.value, executions=executions)
        outputs = loaded.run(complete(wanted, execution.contract)[0], threads)
        executions += 1
