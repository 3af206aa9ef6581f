"""A round of placement over whole tables of models by sites: the reference for the sparse one, for small clusters.

It says the same in the plainest way: everything is computed for everybody, and anew.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Collection, Iterator, Mapping

import numpy as np
from numpy.typing import NDArray

from serve_app.core.cluster.commands import Command, EvictAt, PreloadAt
from serve_app.core.placement.rules import PlacementRules
from serve_app.core.placement.solver import PlacementGoals, WorkerState
from serve_app.core.routing.rules import RoutingRules


class DenseRound:
    """Tables of models (rows) by locations that ask or sites that hold (columns), kept exact throughout."""

    def __init__(
        self,
        sites: list[WorkerState],
        wants: PlacementGoals,
        routing: RoutingRules,
        rules: PlacementRules,
        payload_bytes: int,
    ) -> None:
        self._sites, self._rules = sites, rules
        locations = sorted({site.location for site in sites} | wants.rates.keys())
        names = {name for asked in wants.rates.values() for name in asked}.union(*(site.held for site in sites))
        # Sorted, so that ties fall the same way every time.
        self._models = sorted((names | wants.copies.keys()) & routing.profiles.keys())
        row = {model_id: number for number, model_id in enumerate(self._models)}
        profiles = [routing.profiles[model_id] for model_id in self._models]
        self._load_s = np.array([profile.load_s for profile in profiles])
        self._size = np.array([float(profile.size_bytes) for profile in profiles])
        self._way_s = np.array(
            [
                [
                    0.0 if here == site.location else routing.link(here, site.location).seconds(payload_bytes)
                    for site in sites
                ]
                for here in locations
            ]
        )
        self._rate = np.zeros((len(row), len(locations)))
        for number, location in enumerate(locations):
            for model_id, per_s in wants.rates.get(location, {}).items():
                if model_id in row:
                    self._rate[row[model_id], number] = per_s
        self._copies = {row[name]: count for name, count in sorted(wants.copies.items()) if name in row and count > 0}
        self._held = _marked(row, [site.held for site in sites])
        self._is_urgent = np.array([name in wants.urgent for name in self._models], dtype=np.bool_)
        soon = np.array([name in wants.urgent or name in wants.copies for name in self._models], dtype=np.bool_)
        barred = _marked(row, [site.barred for site in sites])
        fresh = _marked(row, [site.fresh for site in sites])
        self._may_load = ~self._held & ~(barred & ~soon[:, None]) & ~fresh
        #: For a required copy; for others only what was not ordered lately.
        self._must_go = self._held & ~fresh & ~_marked(row, [site.unevictable for site in sites])
        self._may_go = self._must_go & ~barred
        self._missed = _marked(row, [site.missed for site in sites])
        self._kept = _marked(row, [site.primary_for for site in sites])
        self._unused = self._held & _marked(row, [wants.withdraw.intersection(site.unused) for site in sites])
        self._free = np.array([float(site.capacity_bytes - site.used_bytes) for site in sites])
        capacity = np.array([float(site.capacity_bytes) for site in sites])
        self._fits = self._size[:, None] <= capacity
        self._may_load &= self._fits
        self._may_fill = np.array([site.fill_bytes for site in sites])
        self._may_empty = np.array([site.empty_bytes for site in sites])
        # What is required at once goes beyond what several rounds have used up, but not without bounds.
        self._urgent = capacity * rules.share_per_round
        #: Where nothing was moved lately, so that an urgent model may move though it is larger than a share.
        self._rested = (self._may_fill >= self._urgent) & (self._may_empty >= self._urgent)
        self._placeable = np.array([wants.only is None or name in wants.only for name in self._models], dtype=np.bool_)
        self._gain = np.zeros(self._held.shape)
        self._loss = np.zeros(self._held.shape)
        self._value(np.arange(len(row)))

    def commands(self) -> tuple[Command, ...]:
        """The changes of this round."""
        commands = [*self._requirements(), *self._improvements(), *self._withdrawals()]
        return tuple(commands)

    def left(self) -> list[tuple[float, float]]:
        """What of ``fill_bytes`` and ``empty_bytes`` of each site was not used up."""
        return list(zip(self._may_fill.tolist(), self._may_empty.tolist(), strict=True))

    # The copies that there must be

    def _requirements(self) -> Iterator[Command]:
        for model, wanted in self._copies.items():
            while (number := self._next_site(model, wanted)) is not None:
                victims = self._least_missed(model, number, self._must_go[:, number])
                if victims is None or self._urgent[number] <= 0:
                    self._may_load[model, number] = False
                    continue
                self._urgent[number] -= self._size[model]
                yield from self._place(model, number, victims, required=True)

    def _next_site(self, model: int, wanted: int) -> int | None:
        """Where the next required copy belongs.

        Where there is none nearby, where it did not come to nothing lately, where most is gained, where most is free.
        """
        there = {self._sites[number].location for number in np.flatnonzero(self._held[model])}
        count = int(self._held[model].sum())
        options = [
            (
                self._sites[number].location in there,
                bool(self._missed[model, number]),
                -self._gain[model, number],
                -self._free[number],
                int(number),
            )
            for number in np.flatnonzero(self._may_load[model])
            if (count if self._sites[number].location in there else len(there)) < wanted
        ]
        return min(options)[-1] if options else None

    def _needs(self, model: int, number: int) -> bool:
        """Whether there would be too few copies, or at too few locations, without this one."""
        wanted = self._copies.get(model, 0)
        others = [other for other in np.flatnonzero(self._held[model]) if other != number]
        elsewhere = {self._sites[other].location for other in others}
        return len(others) < wanted or (self._sites[number].location not in elsewhere and len(elsewhere) < wanted)

    # The copies that are worth it

    def _improvements(self) -> Iterator[Command]:
        # Lazy greedy: worth only falls as copies are added, so whatever still leads after a second look is the best.
        queue = self._candidates()
        while queue:
            negative, model, number = heapq.heappop(queue)
            worth = self._gain[model, number] / self._size[model]
            if not self._may_load[model, number] or worth <= 0:
                continue
            if worth < -negative:
                heapq.heappush(queue, (-worth, model, number))
                continue
            victims = self._victims(model, number)
            if victims is not None:
                yield from self._place(model, number, victims, required=False)

    def _value(self, models: NDArray[np.intp]) -> None:
        """Bring what copies of these models are, or would be, worth up to date: seconds saved per second."""
        rate, held = self._rate[models], self._held[models]
        # Who has no worker, because it has just left, must go to one in any case: the nearest that can take the model.
        fits = self._fits[models]
        fits |= ~fits.any(axis=1, keepdims=True)
        load_s = self._load_s[models, None] + np.where(fits[:, None, :], self._way_s, np.inf).min(axis=2)
        ways_s = np.where(held[:, None, :], self._way_s, np.inf)
        nearest = ways_s.argmin(axis=2)
        cost_s = np.minimum(ways_s.min(axis=2), load_s)
        self._gain[models] = np.einsum("ml,mls->ms", rate, np.maximum(cost_s[:, :, None] - self._way_s, 0.0))
        # Without the nearest copy, requests go to the one that is now second.
        np.put_along_axis(ways_s, nearest[:, :, None], np.inf, axis=2)
        lost = rate * (np.minimum(ways_s.min(axis=2), load_s) - cost_s)
        is_nearest = nearest[:, :, None] == np.arange(held.shape[1])
        self._loss[models] = np.where(held, np.einsum("ml,mls->ms", lost, is_nearest), 0.0)

    def _candidates(self) -> list[tuple[float, int, int]]:
        """Copies that might be placed, the most worthwhile per byte on top; leaves out what surely cannot be."""
        size = self._size[:, None]
        least = np.where(self._may_go, self._loss / size, np.inf).min(axis=0, initial=math.inf)
        missing = np.maximum(size - self._free, 0.0)
        with np.errstate(invalid="ignore"):
            price = np.where(missing > 0, missing * least * self._rules.hysteresis, 0.0)
        worthwhile = self._gain * self._rules.payback_s >= self._load_s[:, None]
        fits = (self._rested & self._is_urgent[:, None]) | ((size <= self._may_fill) & (missing <= self._may_empty))
        able = self._may_load & self._placeable[:, None] & worthwhile & fits & (self._gain > price)
        models, numbers = np.nonzero(able)
        worth = self._gain[models, numbers] / self._size[models]
        queue = list(zip((-worth).tolist(), models.tolist(), numbers.tolist(), strict=True))
        heapq.heapify(queue)
        return queue

    def _victims(self, model: int, number: int) -> list[int] | None:
        """Whom ``model`` displaces at a site; None if it does not fit, is not worth it, or moves too much."""
        gain, rested = self._gain[model, number], self._rested[number] and self._is_urgent[model]
        if gain * self._rules.payback_s < self._load_s[model]:
            return None
        if self._size[model] > self._may_fill[number] and not rested:
            return None
        may_go = self._may_go[:, number]
        if self._held[model].any():
            # A second copy of one model is never worth the last one of another that is asked for.
            may_go = may_go & ~((self._held.sum(axis=1) == 1) & (self._rate.sum(axis=1) > 0))
        victims = self._least_missed(model, number, may_go)
        if victims is None or (self._size[victims].sum() > self._may_empty[number] and not rested):
            return None
        return victims if not victims or gain > self._rules.hysteresis * self._loss[victims, number].sum() else None

    def _least_missed(self, model: int, number: int, may_go: NDArray[np.bool_]) -> list[int] | None:
        """What makes room for ``model`` at a site and is missed least; None if all together are not enough."""
        missing = self._size[model] - self._free[number]
        if missing <= 0:
            return []
        rows = np.array(
            [row for row in np.flatnonzero(may_go) if row not in self._copies or not self._needs(int(row), number)],
            dtype=np.intp,
        )
        order = rows[np.argsort(self._loss[rows, number] / self._size[rows], kind="stable")]
        enough = int(np.searchsorted(np.cumsum(self._size[order]), missing)) + 1
        if enough > len(order):
            return None
        victims: list[int] = []
        # Of these, only the largest that suffice: a small model is spared when its bytes are not needed.
        for victim in sorted(order[:enough].tolist(), key=lambda victim: -self._size[victim]):
            if missing <= 0:
                break
            victims.append(victim)
            missing -= self._size[victim]
        return victims

    def _place(self, model: int, number: int, victims: list[int], *, required: bool) -> Iterator[Command]:
        site, freed = self._sites[number], self._size[victims].sum()
        for victim in victims:
            yield EvictAt(location=site.location, replica=site.replica, model_id=self._models[victim])
        yield PreloadAt(location=site.location, replica=site.replica, model_id=self._models[model], required=required)
        self._free[number] += freed - self._size[model]
        self._may_empty[number] -= freed
        self._may_fill[number] -= self._size[model]
        self._rested[number] = False
        self._held[model, number] = True
        self._may_load[model, number] = False
        self._held[victims, number] = self._may_go[victims, number] = self._must_go[victims, number] = False
        self._value(np.array([model, *victims]))

    # The copies that nobody would miss

    def _withdrawals(self) -> Iterator[Command]:
        for model in np.flatnonzero((self._unused & self._held & ~self._kept).any(axis=1)).tolist():
            for number in np.flatnonzero(self._unused[model] & self._held[model] & ~self._kept[model]).tolist():
                others = self._kept[model] & self._held[model]
                others[number] = False
                loss_s = self._loss[model, number] * self._rules.payback_s * self._rules.hysteresis
                if not others.any() or loss_s >= self._load_s[model] or self._needs(model, number):
                    continue
                if self._may_empty[number] < self._size[model] and not self._rested[number]:
                    continue
                site = self._sites[number]
                yield EvictAt(location=site.location, replica=site.replica, model_id=self._models[model])
                self._may_empty[number] -= self._size[model]
                self._rested[number] = False
                self._held[model, number] = self._may_go[model, number] = False
                self._value(np.array([model]))


def _marked(row: Mapping[str, int], columns: list[Collection[str]]) -> NDArray[np.bool_]:
    """A table that says for every model, and for every column, whether it is named there."""
    marked = np.zeros((len(row), len(columns)), dtype=np.bool_)
    for number, names in enumerate(columns):
        marked[[row[name] for name in names if name in row], number] = True
    return marked
