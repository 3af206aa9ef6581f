"""Find out whether a model answers several requests faster in one execution than one after another."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence

from serve_app.core.contract import Contract
from serve_app.models.agreement import agree
from serve_app.models.runtimes.base import LoadedModel
from serve_app.tasks.joined_tensors import join, split
from serve_app.tasks.tensors import Tensors, probe

#: Of the time of one execution after another, at most, or a joint execution is not worth it.
_PAYS = 0.85

#: And so much must be saved for each request: to join it, and to give it its rows, takes the worker as long.
_SAVED_S = 100e-6

#: A larger joint execution keeps those waiting that come meanwhile: it must be about as good as the best.
_NEAR = 0.05

_ROUNDS = 7

_MOST_REQUESTS = 64

#: Longer executions are compute-bound already.
_LONGEST_S, _LONGEST_JOINT_S = 0.1, 0.3

#: Largest difference between the answers of an execution for one request and for several, in parts of the largest.
_TOLERANCE = 1e-4


def joined_elements(model: LoadedModel, contract: Contract, highest: Mapping[str, int]) -> int:
    """Return up to how many elements of inputs requests are executed together; 0: one by one.

    Requests of the middle of the free axes are executed in turns together and one after another, and their answers
    compared. What is gained is the fixed cost of an execution, and the efficiency of products of larger matrices; so
    the limit holds for elements, and larger requests are joined in smaller numbers.

    Args:
        model: in memory.
        contract: of the model.
        highest: the largest whole number of an input, by its name, where it is known.
    """
    batch = contract.batch
    if batch is None or batch.smallest != 1 or batch.largest == 1 or not contract.is_stackable:
        return 0
    sizes = tuple(
        1 if axis is batch else axis.at_least(math.isqrt(axis.smallest * axis.largest)) for axis in contract.axes
    )
    count, ratios = 2, dict[int, float]()
    while count <= min(batch.largest, _MOST_REQUESTS):
        requests = [probe(contract, sizes, seed, highest=highest) for seed in range(count)]
        compared = _compare(model, contract, requests)
        if compared is None:
            return 0
        single_s, joint_s = compared
        if single_s - joint_s / count >= _SAVED_S:
            ratios[count] = joint_s / (count * single_s)
        if single_s > _LONGEST_S or joint_s > _LONGEST_JOINT_S:
            break
        count *= 2
    best = min(ratios.values(), default=math.inf)
    paying = [each for each, ratio in ratios.items() if ratio <= min(_PAYS, best + _NEAR)]
    return max(paying, default=0) * contract.elements(sizes)


def _compare(model: LoadedModel, contract: Contract, requests: Sequence[Tensors]) -> tuple[float, float] | None:
    """Return the seconds of one request and of all together; None: they do not answer alike."""
    alone = [model.run(each) for each in requests]
    rows = [1] * len(requests)
    try:
        together = split(contract, model.run(join(contract, requests)), rows)
    except ValueError:
        return None
    for expected, actual in zip(alone, together, strict=True):
        if not all(agree(actual[name], array, _TOLERANCE) for name, array in expected.items()):
            return None
    single_s, joint_s = [], []
    for _ in range(_ROUNDS):
        single_s.append(_seconds(lambda: [model.run(each) for each in requests]) / len(requests))
        joint_s.append(_seconds(lambda: split(contract, model.run(join(contract, requests)), rows)))
    return statistics.median(single_s), statistics.median(joint_s)


def _seconds(run: Callable[[], object]) -> float:
    # Of the processor: what else the machine does is not compared. Executions are in the calling thread, and no other.
    started = time.thread_time()
    run()
    return time.thread_time() - started
