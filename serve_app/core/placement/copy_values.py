"""What copies are worth: the seconds per second that requests would lose without them, or save with them."""

from __future__ import annotations

import numpy as np

from serve_app.core.placement.tables import Floats, PlacementTables

#: So many rows of a table of a thousand workers take half a megabyte.
_BLOCK = 64


class CopyValues:
    """The holders of each model during a round, and the value of copies that are, or might be, there.

    Args:
        tables: of the round.
        holders: by model, the workers that hold it.

    Attributes:
        holders: by model; ``update`` follows a change of them.
        loss: by model and holder, what would be lost without the copy there.
    """

    def __init__(self, tables: PlacementTables, holders: list[set[int]]) -> None:
        self._tables = tables
        self.holders = holders
        self.loss: list[dict[int, float]] = [{} for _ in holders]
        #: Seconds that a request costs now, by location that asks.
        self._cost_s: dict[int, Floats] = {}
        #: What a copy would save, by worker; only of the models for which it can matter.
        self._gains: dict[int, Floats] = {}

    def update(self, model: int) -> None:
        """Bring the values of a model up to date with its holders."""
        self._gains.pop(model, None)
        tables = self._tables
        requesting_locations, per_s = tables.requesting_locations(model)
        holders = sorted(self.holders[model])
        self.loss[model] = {}
        if not len(requesting_locations):
            return
        load_s = tables.load_costs_s(model, requesting_locations)
        if not holders:
            self._cost_s[model] = load_s
            return
        if len(holders) == 1:
            # Without the only copy, the model must be loaded.
            cost_s = self._cost_s[model] = np.minimum(tables.latency_s[requesting_locations, holders[0]], load_s)
            lost = per_s * (load_s - cost_s)
            # Summed one after the other, as those of several copies are: ties must stay ties.
            self.loss[model] = {holders[0]: float(lost.cumsum()[-1])}
            return
        if len(requesting_locations) == len(tables.latency_s):
            latency_s = tables.latency_s.take(holders, axis=1)
        else:
            latency_s = tables.latency_s[requesting_locations[:, None], holders]
        nearest = latency_s.argmin(axis=1)
        cost_s = self._cost_s[model] = np.minimum(latency_s.min(axis=1), load_s)
        # Without the nearest copy, requests go to the one that is now second.
        latency_s[np.arange(len(requesting_locations)), nearest] = np.inf
        lost = per_s * (np.minimum(latency_s.min(axis=1), load_s) - cost_s)
        losses = np.bincount(nearest, weights=lost, minlength=len(holders))
        self.loss[model] = dict(zip(holders, losses.tolist(), strict=True))

    def loss_at(self, model: int, worker: int) -> float:
        """What would be lost without the copy at a worker; 0 if there is none."""
        return self.loss[model].get(worker, 0.0)

    def gain(self, model: int) -> Floats:
        """What a copy would save, by worker."""
        gain = self._gains.get(model)
        if gain is None:
            tables = self._tables
            requesting_locations, per_s = tables.requesting_locations(model)
            if model not in self._cost_s:
                self.update(model)
            gain = self._gains[model] = np.zeros(tables.latency_s.shape[1])
            # In blocks, so that intermediate tables stay in the processor's cache.
            for first in range(0, len(requesting_locations), _BLOCK):
                block = slice(first, first + _BLOCK)
                saved_s = self._cost_s[model][block, None] - tables.latency_s[requesting_locations[block]]
                # Not a product of matrices: that may round equal columns differently, and ties must stay ties.
                gain += np.einsum("l,ls->s", per_s[block], np.maximum(saved_s, 0.0, out=saved_s))
        return gain

    def most_gain(self, model: int) -> float:
        """An upper bound of ``gain`` at any worker: all requests would cost nothing."""
        requesting_locations, per_s = self._tables.requesting_locations(model)
        cost_s = self._cost_s.get(model)
        if cost_s is None:
            cost_s = self._cost_s[model] = self._tables.load_costs_s(model, requesting_locations)
        return float(per_s @ cost_s)
