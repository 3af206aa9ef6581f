"""One round of placement: workers and goals go in, commands come out.

The gain of a copy is computed exactly only for the models for which it can matter. For all others a bound is enough,
which takes time for each location that asks and each holder, not for every model at every location.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Collection, Iterator, Mapping, Sequence

import numpy as np

from serve_app.core.catalog import ModelProfile
from serve_app.core.cluster.commands import Command, PreloadAt, WithdrawAt
from serve_app.core.placement.candidates import CandidateWorkers
from serve_app.core.placement.copy_values import CopyValues
from serve_app.core.placement.latency_matrix import LatencyMatrix
from serve_app.core.placement.rules import PlacementRules
from serve_app.core.placement.tables import Flags, Floats, PlacementGoals, PlacementTables
from serve_app.core.placement.worker_states import WorkerState


class PlacementRound:
    """Finds the changes of one round: required copies, then copies that are worth it, then copies that may go.

    A worker that was not worth a copy any more is not considered again in this round, though a copy that goes later may
    make it so: the next round will.

    Args:
        workers: all that are not leaving; at least one.
        goals: demand and requirements.
        profiles: of all models.
        rules: of placement.
        latencies: between the locations.
    """

    def __init__(
        self,
        workers: Sequence[WorkerState],
        goals: PlacementGoals,
        profiles: Mapping[str, ModelProfile],
        rules: PlacementRules,
        latencies: LatencyMatrix,
    ) -> None:
        self._workers, self._rules = workers, rules
        self._tables = tables = PlacementTables(workers, goals, profiles, latencies)
        holders: list[set[int]] = [set() for _ in tables.models]
        self._values = CopyValues(tables, holders)
        self._holders = holders
        #: By model: the workers that may not load it, those where it is overdue, those that are primary for it.
        self._blocked_at: list[set[int]] = [set() for _ in tables.models]
        self._overdue_at: dict[int, set[int]] = {}
        self._primary_at: dict[int, set[int]] = {}
        #: By worker: the models that may go for a required copy, and for any copy.
        self._may_go_for_required: list[set[int]] = []
        self._may_go: list[set[int]] = []
        #: Pairs of model and worker.
        self._idle: list[tuple[int, int]] = []
        for number, worker in enumerate(workers):
            self._enter(number, worker, goals)
        self._free: Floats = np.array([float(worker.model_capacity_bytes - worker.used_bytes) for worker in workers])
        self._load_budget: Floats = np.array([worker.load_budget_bytes for worker in workers])
        self._evict_budget: Floats = np.array([worker.evict_budget_bytes for worker in workers])
        #: Required copies may exceed what earlier rounds have used up, but not without bounds.
        self._required_budget = tables.capacity * rules.share_per_round
        #: Workers without recent changes: an urgent model may move there though it is larger than a share.
        self._rested: Flags = (self._load_budget >= self._required_budget) & (
            self._evict_budget >= self._required_budget
        )

    def commands(self) -> tuple[Command, ...]:
        """The changes of this round; to be called once."""
        for model, holders in enumerate(self._holders):
            if holders:
                self._values.update(model)
        return (*self._requirements(), *self._improvements(), *self._withdrawals())

    def budgets_left(self) -> list[tuple[float, float]]:
        """The bytes left to load and to unload at each worker; negative where a budget was exceeded."""
        return list(zip(self._load_budget.tolist(), self._evict_budget.tolist(), strict=True))

    def _enter(self, number: int, worker: WorkerState, goals: PlacementGoals) -> None:
        row = self._tables.row

        def rows(names: Collection[str]) -> set[int]:
            return {row[name] for name in names if name in row}

        held, just_ordered, cooling_down = rows(worker.held), rows(worker.just_ordered), rows(worker.cooling_down)
        for model in held:
            self._holders[model].add(number)
        names = self._tables.models
        for model in cooling_down:
            if names[model] not in goals.urgent and names[model] not in goals.copies:
                self._blocked_at[model].add(number)
        for model in just_ordered:
            self._blocked_at[model].add(number)
        for model in rows(worker.overdue):
            self._overdue_at.setdefault(model, set()).add(number)
        may_go = held - just_ordered - rows(worker.unevictable)
        self._may_go_for_required.append(may_go)
        self._may_go.append(may_go - cooling_down)
        if goals.withdraw:
            self._idle += [(model, number) for model in rows(goals.withdraw.intersection(worker.idle)) & held]
            for model in rows(worker.primary_for):
                self._primary_at.setdefault(model, set()).add(number)

    def _may_load(self, model: int) -> Flags:
        """The workers that could load a copy."""
        may: Flags = self._tables.size[model] <= self._tables.capacity
        may[[*self._holders[model], *self._blocked_at[model]]] = False
        return may

    # Required copies

    def _requirements(self) -> Iterator[Command]:
        for model, wanted in self._tables.copies.items():
            while (number := self._next_worker(model, wanted)) is not None:
                victims = self._cheapest_victims(model, number, self._may_go_for_required[number])
                if victims is None or self._required_budget[number] <= 0:
                    self._blocked_at[model].add(number)
                    continue
                self._required_budget[number] -= self._tables.size[model]
                yield from self._place(model, number, victims, required=True)

    def _next_worker(self, model: int, wanted: int) -> int | None:
        """Where the next required copy belongs, or None if there are enough or no worker can take it.

        Preferred are workers at a location without a copy, then workers where no earlier command for the model is
        overdue, then the largest gain, then the most free memory.
        """
        tables, holders = self._tables, self._holders[model]
        if len({tables.names[number] for number in holders}) >= wanted:
            return None
        numbers = np.flatnonzero(self._may_load(model))
        is_served = np.isin(tables.locations[numbers], tables.locations[sorted(holders)])
        if len(holders) >= wanted:
            numbers, is_served = numbers[~is_served], is_served[~is_served]
        if not len(numbers):
            return None
        overdue = np.isin(numbers, sorted(self._overdue_at.get(model, ())))
        gain = self._values.gain(model)[numbers]
        order = np.lexsort((-self._free[numbers], -gain, overdue, is_served))
        return int(numbers[order[0]])

    def _needs(self, model: int, number: int) -> bool:
        """Whether there would be too few copies, or at too few locations, without this one."""
        wanted, names = self._tables.copies.get(model, 0), self._tables.names
        others = self._holders[model] - {number}
        elsewhere = {names[other] for other in others}
        return len(others) < wanted or (names[number] not in elsewhere and len(elsewhere) < wanted)

    # Copies that are worth it

    def _improvements(self) -> Iterator[Command]:
        # Lazy greedy: worths only fall as copies are added, so a lead that is still first after an update is the best.
        waiting, tables = self._candidates(), self._tables
        queue = [(candidates.lead, model) for model, candidates in waiting.items()]
        heapq.heapify(queue)
        placed = 0
        while queue and placed < self._rules.most_copies:
            lead, model = heapq.heappop(queue)
            candidates, number = waiting[model], lead[1]
            worth = self._values.gain(model) / tables.size[model]
            if worth[number] < -lead[0]:
                # A little less, so that rounding excludes nothing.
                least = tables.load_s[model] / self._rules.payback_s / tables.size[model] * (1 - 1e-9)
                candidates.lower(worth, least)
            else:
                candidates.drop(self._is_within_budget(model))
                if number not in self._blocked_at[model] and number not in self._holders[model]:
                    victims = self._victims(model, number)
                    if victims is not None:
                        placed += 1
                        yield from self._place(model, number, victims, required=False)
            if candidates:
                heapq.heappush(queue, (candidates.lead, model))

    def _candidates(self) -> dict[int, CandidateWorkers]:
        """By model, the workers where a copy might be placed; leaves out those that surely cannot take one."""
        tables, least = self._tables, self._least_losses()
        found: dict[int, CandidateWorkers] = {}
        for model in self._worthwhile():
            size = tables.size[model]
            missing = np.maximum(size - self._free, 0.0)
            able = self._may_load(model)
            able &= self._is_within_budget(model)
            if model in tables.urgent:
                able &= (missing <= self._evict_budget) | self._rested
            else:
                able &= missing <= self._evict_budget
            if not able.any():
                continue
            gain = self._values.gain(model)
            with np.errstate(invalid="ignore"):
                price = np.where(missing > 0, missing * least * self._rules.hysteresis, 0.0)
            able &= (gain > price) & (gain * self._rules.payback_s >= tables.load_s[model])
            numbers = np.flatnonzero(able)
            if len(numbers):
                found[model] = CandidateWorkers(numbers, gain[numbers] / size)
        return found

    def _worthwhile(self) -> list[int]:
        """The models of which a copy could be worth its load anywhere, were it near all locations that ask."""
        # A little more, so that rounding excludes nothing.
        tables, payback_s = self._tables, self._rules.payback_s
        return [
            model
            for model in tables.requested()
            if (tables.placeable is None or model in tables.placeable)
            and self._values.most_gain(model) * payback_s * (1 + 1e-9) >= tables.load_s[model]
        ]

    def _least_losses(self) -> Floats:
        """By worker, the least that is lost for a byte."""
        size, loss = self._tables.size.tolist(), self._values.loss
        return np.array(
            [
                min([loss[model].get(number, 0.0) / size[model] for model in models], default=math.inf)
                for number, models in enumerate(self._may_go)
            ]
        )

    def _is_within_budget(self, model: int) -> Flags:
        """The workers that may still load so much in this round."""
        within: Flags = self._tables.size[model] <= self._load_budget
        return within | self._rested if model in self._tables.urgent else within

    def _victims(self, model: int, number: int) -> list[int] | None:
        """The models that a copy displaces; None if it does not fit, is not worth it, or moves too much."""
        tables, holders = self._tables, self._holders
        gain, rested = self._values.gain(model)[number], self._rested[number] and model in tables.urgent
        if gain <= 0 or gain * self._rules.payback_s < tables.load_s[model]:
            return None
        if tables.size[model] > self._load_budget[number] and not rested:
            return None
        may_go = self._may_go[number]
        if holders[model]:
            # A second copy of one model is never worth the last one of another that is asked for.
            may_go = {
                other for other in may_go if len(holders[other]) > 1 or not len(tables.requesting_locations(other)[0])
            }
        victims = self._cheapest_victims(model, number, may_go)
        if victims is None or (tables.size[victims].sum() > self._evict_budget[number] and not rested):
            return None
        lost = sum(self._values.loss_at(victim, number) for victim in victims)
        return victims if not victims or gain > self._rules.hysteresis * lost else None

    def _cheapest_victims(self, model: int, number: int, may_go: Collection[int]) -> list[int] | None:
        """The models that make room at the least loss; None if all together are not enough."""
        size, loss = self._tables.size, self._values.loss
        missing = float(size[model] - self._free[number])
        if missing <= 0:
            return []
        models = [
            other for other in sorted(may_go) if other not in self._tables.copies or not self._needs(other, number)
        ]
        models.sort(key=lambda other: loss[other].get(number, 0.0) / size[other])
        enough = int(np.searchsorted(np.cumsum(size[models]), missing)) + 1
        if enough > len(models):
            return None
        victims: list[int] = []
        # Of these, only the largest that suffice: a small model is spared when its bytes are not needed.
        for victim in sorted(models[:enough], key=lambda victim: -size[victim]):
            if missing <= 0:
                break
            victims.append(victim)
            missing -= size[victim]
        return victims

    def _place(self, model: int, number: int, victims: list[int], *, required: bool) -> Iterator[Command]:
        worker, size, names = self._workers[number], self._tables.size, self._tables.models
        freed = size[victims].sum()
        for victim in victims:
            yield WithdrawAt(location=worker.location, replica=worker.replica, model_id=names[victim])
        yield PreloadAt(location=worker.location, replica=worker.replica, model_id=names[model], required=required)
        self._free[number] += freed - size[model]
        self._evict_budget[number] -= freed
        self._load_budget[number] -= size[model]
        self._rested[number] = False
        self._holders[model].add(number)
        self._values.update(model)
        for victim in victims:
            self._remove(victim, number)

    def _remove(self, model: int, number: int) -> None:
        self._holders[model].discard(number)
        self._may_go[number].discard(model)
        self._may_go_for_required[number].discard(model)
        # Not back in the round that takes it away.
        self._blocked_at[model].add(number)
        self._values.update(model)

    # Copies that may go

    def _withdrawals(self) -> Iterator[Command]:
        size = self._tables.size
        for model, number in sorted(self._idle):
            primaries = self._primary_at.get(model, set())
            if number not in self._holders[model] or number in primaries:
                continue
            lost = self._values.loss_at(model, number) * self._rules.payback_s * self._rules.hysteresis
            is_spare = bool(primaries & self._holders[model]) and not self._needs(model, number)
            if not is_spare or lost >= self._tables.load_s[model]:
                continue
            if self._evict_budget[number] < size[model] and not self._rested[number]:
                continue
            worker = self._workers[number]
            yield WithdrawAt(location=worker.location, replica=worker.replica, model_id=self._tables.models[model])
            self._evict_budget[number] -= size[model]
            self._rested[number] = False
            self._remove(model, number)
