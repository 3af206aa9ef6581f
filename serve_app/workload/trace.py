"""A finite request stream in columns: the output of readers and generators, and the input of the simulator."""

from __future__ import annotations

from array import array
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

#: More requests than this are refused before they are generated: a short specification can ask for any number.
MAX_REQUESTS = 100_000_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Trace:
    """A finite request stream in columns, in order of arrival.

    Attributes:
        name: given by the user.
        models: distinct names of the requested models (functions).
        locations: distinct names of the locations of users.
        arrival_s: ``array('d')``, seconds since the beginning, never falling.
        model: ``array('I')``, indices into ``models``.
        source: ``array('I')``, a number for each owner or user. Requests of one source stay together when a trace is
            split over locations.
        location: ``array('I')``, indices into ``locations``; None if all requests come from the first.

    Raises:
        ValueError: columns of different lengths or types, an index out of range, names that are not distinct, or
            arrivals that are negative, not finite or not in order.
    """

    name: str
    models: tuple[str, ...]
    locations: tuple[str, ...] = ("local",)
    arrival_s: array[float]
    model: array[int]
    source: array[int]
    location: array[int] | None = None

    def __post_init__(self) -> None:
        _check_column("arrival_s", self.arrival_s, "d", len(self))
        _check_column("model", self.model, "I", len(self))
        _check_column("source", self.source, "I", len(self))
        _check_names("models", self.models)
        _check_names("locations", self.locations)
        if not self.locations:
            raise ValueError("locations must not be empty")
        _check_indices("model", self.model, len(self.models))
        if self.location is not None:
            _check_column("location", self.location, "I", len(self))
            _check_indices("location", self.location, len(self.locations))
        _check_arrivals(column(self.arrival_s))

    def __len__(self) -> int:
        return len(self.arrival_s)

    def only_used(self) -> Trace:
        """Return the same requests without models that have no request."""
        counts = np.bincount(column(self.model), minlength=len(self.models))
        if counts.all():
            return self
        used = np.flatnonzero(counts)
        renumbered = np.zeros(len(counts), dtype=np.uintc)
        renumbered[used] = np.arange(len(used))
        models = tuple(self.models[index] for index in used)
        return replace(self, models=models, model=indices(renumbered[column(self.model)]))


def make_trace(
    *,
    name: str,
    models: tuple[str, ...],
    arrival_s: NDArray[Any],
    model: NDArray[Any],
    source: NDArray[Any],
    locations: tuple[str, ...] = ("local",),
    location: NDArray[Any] | None = None,
) -> Trace:
    """Make a trace of columns in any order: sort it stably by arrival, and drop unused models."""
    order = np.argsort(arrival_s, kind="stable")
    times: array[float] = array("d")
    times.frombytes(np.asarray(arrival_s, dtype=np.float64)[order].tobytes())
    return Trace(
        name=name,
        models=models,
        locations=locations,
        arrival_s=times,
        model=indices(model[order]),
        source=indices(source[order]),
        location=None if location is None else indices(location[order]),
    ).only_used()


def column(values: array[Any]) -> NDArray[Any]:
    """View a column as a numpy array, without a copy."""
    return np.asarray(values)


def indices(values: NDArray[Any]) -> array[int]:
    """Make a column of indices, each from 0 to 2**32 - 1."""
    made = array("I")
    made.frombytes(np.asarray(values).astype(np.uintc).tobytes())
    return made


def _check_column(name: str, values: array[Any], typecode: str, length: int) -> None:
    if not (isinstance(values, array) and values.typecode == typecode):
        raise ValueError(f"{name} must be an array({typecode!r})")
    if len(values) != length:
        raise ValueError(f"{name} must have as many entries as arrival_s ({length}), not {len(values)}")


def _check_names(what: str, names: tuple[str, ...]) -> None:
    if len(set(names)) != len(names):
        raise ValueError(f"{what} must be distinct")


def _check_indices(name: str, values: array[int], count: int) -> None:
    highest = int(column(values).max(initial=0))
    if len(values) and highest >= count:
        raise ValueError(f"{name} must be below {count}, not {highest}")


def _check_arrivals(arrival_s: NDArray[Any]) -> None:
    bad = ~np.isfinite(arrival_s) | (arrival_s < 0)
    if bad.any():
        raise ValueError(f"arrival_s must be finite and not negative, not {arrival_s[bad][0]}")
    falls = np.flatnonzero(arrival_s[1:] < arrival_s[:-1])
    if len(falls):
        raise ValueError(f"arrival_s must never fall, but entry {falls[0] + 1} is before the one in front of it")
