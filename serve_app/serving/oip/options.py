"""Options of a request, with the same rules for JSON parameters and for a URL query."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal, cast

from serve_app.errors import InvalidRequest
from serve_app.serving.oip.tensors import describe

MAX_PRIORITY: Final = 2**31 - 1
#: The options of every inference.
OPTIONS: Final = ("deadline_ms", "min_accuracy", "forward", "priority")
_FORWARD: Final = ("auto", "never", "prefer")
_INTEGER: Final = re.compile(r"-?[0-9]{1,18}")
_NUMBER: Final = re.compile(r"-?[0-9]{1,400}(\.[0-9]{1,400})?([eE][-+]?[0-9]{1,4})?")


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestOptions:
    """Options of one request, checked by the constructor.

    Attributes:
        deadline_ms: counts from the arrival of the request.
        min_accuracy: lower bound (0..1) for the members of a family.
        forward: ``"never"`` keeps the request at its location, ``"prefer"`` sends it to a worker that holds the model
            rather than loading the model, ``"auto"`` takes what is expected to be faster.
        priority: is checked, and has no effect so far.

    Raises:
        InvalidRequest: a value has the wrong type or lies out of range.
    """

    deadline_ms: float | None = None
    min_accuracy: float | None = None
    forward: Literal["auto", "never", "prefer"] = "auto"
    priority: int = 0

    def __post_init__(self) -> None:
        if self.deadline_ms is not None and not _in_range(self.deadline_ms, math.inf):
            raise InvalidRequest(
                f"deadline_ms must be a number of milliseconds, 0 or more, not {describe(self.deadline_ms)}"
            )
        if self.min_accuracy is not None and not _in_range(self.min_accuracy, 1.0):
            raise InvalidRequest(f"min_accuracy must be a number in 0..1, not {describe(self.min_accuracy)}")
        if type(self.forward) is not str or self.forward not in _FORWARD:
            raise InvalidRequest(f"forward must be 'auto', 'never' or 'prefer', not {describe(self.forward)}")
        if type(self.priority) is not int or not 0 <= self.priority <= MAX_PRIORITY:
            raise InvalidRequest(f"priority must be a whole number in 0..{MAX_PRIORITY}, not {describe(self.priority)}")

    @property
    def deadline_s(self) -> float | None:
        """``deadline_ms`` in seconds."""
        return None if self.deadline_ms is None else self.deadline_ms / 1000

    @classmethod
    def from_parameters(cls, parameters: Mapping[str, object]) -> RequestOptions:
        """Read the ``parameters`` of a request; unknown names are ignored, as the protocol demands."""
        for name in OPTIONS:
            if name in parameters and parameters[name] is None:
                raise InvalidRequest(f"{name} must not be null; leave it out instead")
        known: dict[str, Any] = {name: parameters[name] for name in OPTIONS if name in parameters}
        return cls(**known)

    @classmethod
    def from_query(cls, query: Mapping[str, str]) -> RequestOptions:
        """Read a URL query; text that reads as a number counts as that number where a number is expected."""
        return cls.from_parameters({name: text if name == "forward" else _scalar(text) for name, text in query.items()})


def _in_range(value: object, upper: float) -> bool:
    # The upper limit is finite or excluded; NaN is in no range.
    return type(value) in (int, float) and 0 <= cast(float, value) <= upper and value != math.inf


def _scalar(text: str) -> object:
    if _INTEGER.fullmatch(text):
        return int(text)
    return float(text) if _NUMBER.fullmatch(text) else text
