"""Messages of local RPC as bytes: their fields as a pickled tuple, their tensors as they are in memory.

To pickle a message as it is takes several times as long, because dataclasses and arrays are pickled by functions in
Python. A message without tensors, which is rare, is pickled nevertheless.

Both ends run the same program as the same user, as with Ray's own calls, so either may unpickle what the other sends.
"""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from dataclasses import fields
from operator import attrgetter
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from serve_app.core.vocabulary import Outcome
from serve_app.serving.transport.messages import InferenceResult, InferenceTask
from serve_app.tasks.base import RawInput
from serve_app.tasks.tensors import Tensors

#: Arrays begin at multiples of this, for vector instructions.
ALIGNMENT: Final = 64


class _Layout:
    """How the messages of one class are written.

    Args:
        number: says which class it is.
        made: the class.
        tensors: the field that has the tensors.
        outcome: the field that has an ``Outcome``, which is pickled by its value; None: there is none.
    """

    def __init__(self, number: int, made: type[Any], tensors: str, outcome: str | None = None) -> None:
        self.number = number
        self._made = made
        self._names = tuple(each.name for each in fields(made) if each.name != tensors)
        self._values = attrgetter(*self._names)
        self._tensors = tensors
        self._outcome = None if outcome is None else self._names.index(outcome)

    def tensors(self, message: object) -> Tensors | RawInput:
        """Return the tensors of a message, or what stands in their place."""
        tensors: Tensors | RawInput = getattr(message, self._tensors)
        return tensors

    def values(self, message: object) -> tuple[object, ...]:
        """Return all fields but the tensors."""
        values: tuple[object, ...] = self._values(message)
        at = self._outcome
        return values if at is None else (*values[:at], str(values[at]), *values[at + 1 :])

    def message(self, values: Sequence[object], tensors: Tensors) -> Any:
        """Make the message again."""
        known = dict(zip(self._names, values, strict=True))
        if self._outcome is not None:
            known[self._names[self._outcome]] = Outcome(str(values[self._outcome]))
        known[self._tensors] = tensors
        return self._made(**known)


_LAYOUTS = (_Layout(0, InferenceTask, "payload"), _Layout(1, InferenceResult, "outputs", "outcome"))
_BY_CLASS: Final[dict[type, _Layout]] = dict(zip((InferenceTask, InferenceResult), _LAYOUTS, strict=True))


def encode(message: object) -> tuple[bytes, list[memoryview]]:
    """Return a message without its arrays, and the bytes of the arrays, which are not copied if they are C-contiguous.

    Each begins at the next multiple of ``ALIGNMENT`` bytes from where the first one does.
    """
    layout = _BY_CLASS.get(type(message))
    tensors = None if layout is None else layout.tensors(message)
    if layout is None or tensors is None or isinstance(tensors, RawInput):
        return pickle.dumps(message, protocol=5), []
    described: list[tuple[str, str, Any]] = []
    arrays = []
    for name, array in tensors.items():
        if array.dtype.hasobject:
            described.append((name, "", array))
            continue
        described.append((name, array.dtype.str, array.shape))
        # As bytes, because a memoryview of some types of numbers cannot be taken.
        arrays.append(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    return pickle.dumps((layout.number, layout.values(message), described), protocol=5), arrays


def decode(pickled: memoryview, content: memoryview) -> Any:
    """Make a message again; its arrays are views of ``content``, which begins where the first one does."""
    loaded = pickle.loads(pickled)
    if type(loaded) is not tuple:
        return loaded
    number, values, described = loaded
    tensors, at = {}, 0
    for name, datatype, shape in described:
        if not datatype:
            tensors[name] = shape
            continue
        array: NDArray[Any] = np.ndarray(shape, datatype, content, at)
        tensors[name] = array
        at += array.nbytes + -array.nbytes % ALIGNMENT
    return _LAYOUTS[number].message(values, tensors)
