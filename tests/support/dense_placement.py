"""A round of placement over whole tables of models by sites: the reference for the sparse one, for small clusters.

It says the same in the plainest way: everything is computed for everybody, and anew.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Collection, Iterator, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from serve_app.core.cluster.commands import Command, PreloadAt, WithdrawAt
from serve_app.core.placement.rules import PlacementRules
from serve_app.core.placement.tables import PlacementGoals
from serve_app.core.placement.worker_states import WorkerState
from serve_app.core.routing.rules import RoutingRules


class DenseRound:
    """Tables of models (rows) by locations that ask or workers that hold (columns), kept exact throughout."""

    def __init__(
        self,
        workers: Sequence[WorkerState],
        goals: PlacementGoals,
        routing: RoutingRules,
        rules: PlacementRules,
        payload_bytes: int,
    ) -> None:
        self._workers, self._rules = workers, rules
        locations = sorted({worker.location for worker in workers} | goals.rates.keys())
        names = {name for asked in goals.rates.values() for name in asked}.union(*(worker.held for worker in workers))
        # Sorted, so that ties fall the same way every time.
        self._models = sorted((names | goals.copies.keys()) & routing.profiles.keys())
        row = {model_id: number for number, model_id in enumerate(self._models)}
        profiles = [routing.profiles[model_id] for model_id in self._models]
        self._load_s = np.array([profile.load_s for profile in profiles])
        self._size = np.array([float(profile.size_bytes) for profile in profiles])
        self._latency_s = np.array(
            [
                [
                    0.0 if here == worker.location else routing.link(here, worker.location).seconds(payload_bytes)
                    for worker in workers
                ]
                for here in locations
            ]
        )
        self._rate = np.zeros((len(row), len(locations)))
        for number, location in enumerate(locations):
            for model_id, per_s in goals.rates.get(location, {}).items():
                if model_id in row:
                    self._rate[row[model_id], number] = per_s
        self._copies = {row[name]: count for name, count in sorted(goals.copies.items()) if name in row and count > 0}
        self._held = _marked(row, [worker.held for worker in workers])
        self._is_urgent = np.array([name in goals.urgent for name in self._models], dtype=np.bool_)
        soon = np.array([name in goals.urgent or name in goals.copies for name in self._models], dtype=np.bool_)
        cooling_down = _marked(row, [worker.cooling_down for worker in workers])
        just_ordered = _marked(row, [worker.just_ordered for worker in workers])
        self._may_load = ~self._held & ~(cooling_down & ~soon[:, None]) & ~just_ordered
        #: For a required copy; for others only what was not ordered lately.
        self._may_go_for_required = (
            self._held & ~just_ordered & ~_marked(row, [worker.unevictable for worker in workers])
        )
        self._may_go = self._may_go_for_required & ~cooling_down
        self._overdue = _marked(row, [worker.overdue for worker in workers])
        self._primary = _marked(row, [worker.primary_for for worker in workers])
        self._idle = self._held & _marked(row, [goals.withdraw.intersection(worker.idle) for worker in workers])
        self._free = np.array([float(worker.model_capacity_bytes - worker.used_bytes) for worker in workers])
        capacity = np.array([float(worker.model_capacity_bytes) for worker in workers])
        self._fits = self._size[:, None] <= capacity
        self._may_load &= self._fits
        self._load_budget = np.array([worker.load_budget_bytes for worker in workers])
        self._evict_budget = np.array([worker.evict_budget_bytes for worker in workers])
        # What is required at once goes beyond what several rounds have used up, but not without bounds.
        self._required_budget = capacity * rules.share_per_round
        #: Where nothing was moved lately, so that an urgent model may move though it is larger than a share.
        self._rested = (self._load_budget >= self._required_budget) & (self._evict_budget >= self._required_budget)
        self._placeable = np.array([goals.only is None or name in goals.only for name in self._models], dtype=np.bool_)
        self._gain = np.zeros(self._held.shape)
        self._loss = np.zeros(self._held.shape)
        self._value(np.arange(len(row)))

    def commands(self) -> tuple[Command, ...]:
        """The changes of this round."""
        commands = [*self._requirements(), *self._improvements(), *self._withdrawals()]
        return tuple(commands)

    def budgets_left(self) -> list[tuple[float, float]]:
        """What of ``load_budget_bytes`` and ``evict_budget_bytes`` of each site was not used up."""
        return list(zip(self._load_budget.tolist(), self._evict_budget.tolist(), strict=True))

    # Required copies

    def _requirements(self) -> Iterator[Command]:
        for model, wanted in self._copies.items():
            while (number := self._next_worker(model, wanted)) is not None:
                victims = self._cheapest_victims(model, number, self._may_go_for_required[:, number])
                if victims is None or self._required_budget[number] <= 0:
                    self._may_load[model, number] = False
                    continue
                self._required_budget[number] -= self._size[model]
                yield from self._place(model, number, victims, required=True)

    def _next_worker(self, model: int, wanted: int) -> int | None:
        """Where the next required copy belongs.

        Where there is none nearby, where it did not come to nothing lately, where most is gained, where most is free.
        """
        there = {self._workers[number].location for number in np.flatnonzero(self._held[model])}
        count = int(self._held[model].sum())
        options = [
            (
                self._workers[number].location in there,
                bool(self._overdue[model, number]),
                -self._gain[model, number],
                -self._free[number],
                int(number),
            )
            for number in np.flatnonzero(self._may_load[model])
            if (count if self._workers[number].location in there else len(there)) < wanted
        ]
        return min(options)[-1] if options else None

    def _needs(self, model: int, number: int) -> bool:
        """Whether the requirement is met less well without this copy."""
        others = self._held[model].copy()
        others[number] = False
        return self._met(model, others) != self._met(model, self._held[model])

    def _met(self, model: int, held: NDArray[np.bool_]) -> tuple[int, int]:
        """How many of the required copies there are, and at how many of the required locations."""
        holders = [self._workers[number].location for number in np.flatnonzero(held)]
        wanted = self._copies.get(model, 0)
        return min(len(holders), wanted), min(len(set(holders)), wanted)

    # Copies that are worth it

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
        load_s = self._load_s[models, None] + np.where(fits[:, None, :], self._latency_s, np.inf).min(axis=2)
        latencies_s = np.where(held[:, None, :], self._latency_s, np.inf)
        nearest = latencies_s.argmin(axis=2)
        cost_s = np.minimum(latencies_s.min(axis=2), load_s)
        self._gain[models] = np.einsum("ml,mls->ms", rate, np.maximum(cost_s[:, :, None] - self._latency_s, 0.0))
        # Without the nearest copy, requests go to the one that is now second.
        np.put_along_axis(latencies_s, nearest[:, :, None], np.inf, axis=2)
        lost = rate * (np.minimum(latencies_s.min(axis=2), load_s) - cost_s)
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
        fits = (self._rested & self._is_urgent[:, None]) | (
            (size <= self._load_budget) & (missing <= self._evict_budget)
        )
        able = self._may_load & self._placeable[:, None] & worthwhile & fits & (self._gain > price)
        models, numbers = np.nonzero(able)
        worth = self._gain[models, numbers] / self._size[models]
        queue = list(zip((-worth).tolist(), models.tolist(), numbers.tolist(), strict=True))
        heapq.heapify(queue)
        return queue

    def _victims(self, model: int, number: int) -> list[int] | None:
        """Whom ``model`` displaces at a worker; None if it does not fit, is not worth it, or moves too much."""
        gain, size = self._gain[model, number], self._size
        # An urgent model may move alone where nothing has moved lately.
        is_free = self._rested[number] and self._is_urgent[model]
        if gain * self._rules.payback_s < self._load_s[model] or not (
            is_free or size[model] <= self._load_budget[number]
        ):
            return None
        may_go = self._may_go[:, number].copy()
        if self._held[model].any():
            # The last copies of what is asked for do not go for a second copy.
            may_go[(self._held.sum(axis=1) == 1) & (self._rate > 0).any(axis=1)] = False
        victims = self._cheapest_victims(model, number, may_go)
        if not victims:
            return victims
        moves_too_much = not is_free and size[victims].sum() > self._evict_budget[number]
        is_worth_it = gain > self._rules.hysteresis * self._loss[victims, number].sum()
        return victims if is_worth_it and not moves_too_much else None

    def _cheapest_victims(self, model: int, number: int, may_go: NDArray[np.bool_]) -> list[int] | None:
        """Whom it costs least to have make room; None if all together are not enough."""
        needed = self._size[model] - self._free[number]
        able = [int(row) for row in np.flatnonzero(may_go) if not self._needs(int(row), number)]
        able.sort(key=lambda row: self._loss[row, number] / self._size[row])
        chosen: list[int] = []
        while self._size[chosen].sum() < needed:
            if not able:
                return None
            chosen.append(able.pop(0))
        # The largest of them that are enough, the first ones first where several are as large.
        victims: list[int] = []
        while self._size[victims].sum() < needed:
            victims.append(max((row for row in chosen if row not in victims), key=lambda row: self._size[row]))
        return victims

    def _place(self, model: int, number: int, victims: list[int], *, required: bool) -> Iterator[Command]:
        worker = self._workers[number]
        yield from self._take_away(victims, number)
        yield PreloadAt(
            location=worker.location, replica=worker.replica, model_id=self._models[model], required=required
        )
        self._free[number] -= self._size[model]
        self._load_budget[number] -= self._size[model]
        self._rested[number] = False
        self._held[model, number], self._may_load[model, number] = True, False
        self._value(np.array([model, *victims]))

    def _take_away(self, victims: list[int], number: int) -> Iterator[Command]:
        worker = self._workers[number]
        for victim in victims:
            yield WithdrawAt(location=worker.location, replica=worker.replica, model_id=self._models[victim])
            self._free[number] += self._size[victim]
            self._evict_budget[number] -= self._size[victim]
            for table in (self._held, self._may_go, self._may_go_for_required, self._may_load):
                table[victim, number] = False

    # Copies that may go

    def _withdrawals(self) -> Iterator[Command]:
        for model, number in np.argwhere(self._idle).tolist():
            lost_s = self._loss[model, number] * self._rules.payback_s * self._rules.hysteresis
            may_go = (
                self._held[model, number]
                and not self._primary[model, number]
                and (self._primary[model] & self._held[model]).any()
                and lost_s < self._load_s[model]
                and not self._needs(model, number)
                and (self._rested[number] or self._size[model] <= self._evict_budget[number])
            )
            if may_go:
                yield from self._take_away([model], number)
                self._rested[number] = False
                self._value(np.array([model]))


def _marked(row: Mapping[str, int], columns: list[Collection[str]]) -> NDArray[np.bool_]:
    """A table that says for every model, and for every column, whether it is named there."""
    marked = np.zeros((len(row), len(columns)), dtype=np.bool_)
    for number, names in enumerate(columns):
        marked[[row[name] for name in names if name in row], number] = True
    return marked
