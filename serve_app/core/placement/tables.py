"""The inputs of a round of placement as tables: models are rows, workers are columns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from serve_app.core.catalog import ModelProfile
from serve_app.core.placement.latency_matrix import LatencyMatrix
from serve_app.core.placement.worker_states import WorkerState

Floats = NDArray[np.float64]
Rows = NDArray[np.intp]
Flags = NDArray[np.bool_]


@dataclass(frozen=True, slots=True, kw_only=True)
class PlacementGoals:
    """Demand, and what operators require.

    Attributes:
        rates: requests per second of every model by users of every location.
        copies: required number of copies of some models, whatever they are worth.
        withdraw: models of which copies may go though nothing needs their place.
        urgent: models that may exceed a round's budget, and move again soon.
        only: the models that may be placed; None: all.
    """

    rates: Mapping[str, Mapping[str, float]]
    copies: Mapping[str, int] = field(default_factory=dict)
    withdraw: frozenset[str] = frozenset()
    urgent: frozenset[str] = frozenset()
    only: frozenset[str] | None = None


class PlacementTables:
    """What does not change during a round; only pairs of model and location with requests take memory.

    Args:
        workers: the columns.
        goals: of the round.
        profiles: of all models.
        latencies: between the locations.

    Attributes:
        models: names, sorted, so that ties fall the same way every time.
        row: of each name.
        load_s: seconds of a load, by model.
        size: bytes, by model.
        latency_s: seconds from every location to every worker.
        nearest_s: seconds from every location to the nearest worker.
        capacity: bytes, by worker.
        locations: a number for the location of each worker.
        copies: required copies, by model.
        urgent: models that are urgent.
        placeable: models that may be placed; None: all.
        names: of the locations that the workers are at.
    """

    def __init__(
        self,
        workers: Sequence[WorkerState],
        goals: PlacementGoals,
        profiles: Mapping[str, ModelProfile],
        latencies: LatencyMatrix,
    ) -> None:
        locations = sorted({worker.location for worker in workers} | goals.rates.keys())
        requested = {name for rates in goals.rates.values() for name in rates}
        names = requested.union(*(worker.held for worker in workers))
        self.models = sorted((names | goals.copies.keys()) & profiles.keys())
        self.row = row = {model_id: number for number, model_id in enumerate(self.models)}
        self.load_s: Floats = np.array([profiles[model_id].load_s for model_id in self.models])
        self.size: Floats = np.array([float(profiles[model_id].size_bytes) for model_id in self.models])
        self.latency_s: Floats = latencies.table(locations, [worker.location for worker in workers])
        self.nearest_s: Floats = self.latency_s.min(axis=1)
        self.capacity: Floats = np.array([float(worker.model_capacity_bytes) for worker in workers])
        self._smallest, self._largest = float(self.capacity.min()), float(self.capacity.max())
        self.names = [worker.location for worker in workers]
        self.locations = _numbered(self.names)
        self.copies = {row[name]: count for name, count in sorted(goals.copies.items()) if name in row and count > 0}
        self.urgent = frozenset(row[name] for name in goals.urgent if name in row)
        self.placeable = None if goals.only is None else frozenset(row[name] for name in goals.only if name in row)
        self._asking, self._per_s, self._starts = _requests(row, locations, goals.rates)

    def requesting_locations(self, model: int) -> tuple[Rows, Floats]:
        """The locations that request a model, and their requests per second."""
        asked = slice(self._starts[model], self._starts[model + 1])
        return self._asking[asked], self._per_s[asked]

    def requested(self) -> list[int]:
        """The models that any location asks for."""
        found: list[int] = np.flatnonzero(np.diff(self._starts)).tolist()
        return found

    def load_costs_s(self, model: int, requesting_locations: Rows) -> Floats:
        """Seconds that a load costs the locations that ask.

        A location without a worker, because that has just left, needs one in any case: the nearest that can hold the
        model.
        """
        if self._smallest < self.size[model] <= self._largest:
            fits = np.flatnonzero(self.size[model] <= self.capacity)
            latency_s: Floats = self.latency_s[np.ix_(requesting_locations, fits)].min(axis=1)
        else:
            latency_s = self.nearest_s[requesting_locations]
        return latency_s + float(self.load_s[model])


def _requests(
    row: Mapping[str, int], locations: Sequence[str], rates: Mapping[str, Mapping[str, float]]
) -> tuple[Rows, Floats, list[int]]:
    """Locations and requests per second, sorted by model; and where each model begins."""
    rows: list[int] = []
    per_s: list[float] = []
    counts: list[int] = []
    for location in locations:
        rate = rates.get(location, {})
        rows += [row.get(name, -1) for name in rate]
        per_s += rate.values()
        counts.append(len(rate))
    models, rated = np.array(rows, dtype=np.intp), np.array(per_s)
    asking = np.repeat(np.arange(len(locations)), counts)
    # Short numbers of models are sorted by one byte after the other, which takes a tenth of the time.
    order = np.flatnonzero((models >= 0) & (rated > 0))
    models = models[order]
    order = order[np.argsort(models.astype(np.uint16) if len(row) < 1 << 16 else models, kind="stable")]
    starts = np.concatenate(([0], np.cumsum(np.bincount(models, minlength=len(row)))))
    return asking[order], rated[order], starts.tolist()


def _numbered(names: Sequence[str]) -> Rows:
    """A number for each name, the same for the same."""
    number = {name: place for place, name in enumerate(dict.fromkeys(names))}
    return np.array([number[name] for name in names], dtype=np.intp)
