"""One round of placement: what is where and what is wanted goes in, commands come out.

What a copy would save is known exactly only for the models for which it can matter. For all others a bound is enough,
and the bound takes time for who asks and who holds, not for every model at every location.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np

from serve_app.core.catalog import ModelProfile
from serve_app.core.cluster.commands import Command, EvictAt, PreloadAt
from serve_app.core.placement.candidates import Candidates, Flags, Floats, Rows, asked, numbered
from serve_app.core.placement.latency_matrix import LatencyMatrix
from serve_app.core.placement.rules import PlacementRules

#: So many rows of a table of a thousand sites take half a megabyte.
_BLOCK = 64


@dataclass(slots=True, kw_only=True)
class WorkerState:
    """One worker, as placement sees it.

    ``held`` is what it will hold when its orders have been carried out. ``fixed`` ones stay where they are. Of what was
    ordered lately, ``barred`` ones are not to be loaded unless they are urgent or required, nor unloaded unless for a
    required copy; ``fresh`` ones neither way at all; ``missed`` ones should be there and are not. ``unused`` ones could
    go and have not been used for long. It is ``primary_for`` those whose last copy it answers for. ``fill_bytes`` and
    ``empty_bytes`` are what may be moved, by one round or by several.
    """

    location: str
    replica: str
    capacity_bytes: int
    used_bytes: int
    exec_slots: int
    held: Collection[str]
    barred: Collection[str]
    fresh: Collection[str]
    missed: Collection[str]
    unevictable: Collection[str]
    primary_for: Collection[str]
    unused: Collection[str]
    fill_bytes: float
    empty_bytes: float


@dataclass(frozen=True, slots=True, kw_only=True)
class PlacementGoals:
    """What users and operators want.

    Attributes:
        rates: requests per second of every model by users of every location.
        copies: how many there must be of some models, whatever they are worth.
        withdraw: models of which copies may go though nothing needs their place.
        urgent: models that may be larger than what a round may move, and move again soon.
        only: the models that may be placed; None: all.
    """

    rates: Mapping[str, Mapping[str, float]]
    copies: Mapping[str, int] = field(default_factory=dict)
    withdraw: frozenset[str] = frozenset()
    urgent: frozenset[str] = frozenset()
    only: frozenset[str] | None = None


class PlacementRound:
    """Models (rows) asked for at locations and held by sites (columns); only pairs that exist take memory.

    A site that was not worth a copy any more is not looked at again in this round, though a copy that goes later may
    make it so: the next round will see.

    Args:
        sites: the workers.
        wants: of users and operators.
        profiles: of all models.
        rules: how eager to be.
        ways: how far the locations are from each other.
    """

    def __init__(
        self,
        sites: list[WorkerState],
        wants: PlacementGoals,
        profiles: Mapping[str, ModelProfile],
        rules: PlacementRules,
        ways: LatencyMatrix,
    ) -> None:
        self._sites, self._rules = sites, rules
        locations = sorted({site.location for site in sites} | wants.rates.keys())
        names = {name for asked in wants.rates.values() for name in asked}.union(*(site.held for site in sites))
        # Sorted, so that ties fall the same way every time.
        self._models = sorted((names | wants.copies.keys()) & profiles.keys())
        row = {model_id: number for number, model_id in enumerate(self._models)}
        self._load_s = np.array([profiles[model_id].load_s for model_id in self._models])
        self._size = np.array([float(profiles[model_id].size_bytes) for model_id in self._models])
        self._way_s = ways.table(locations, [site.location for site in sites])
        self._nearest_s = self._way_s.min(axis=1)
        self._asking, self._rate, self._starts = asked(row, locations, wants.rates)
        self._copies = {row[name]: count for name, count in sorted(wants.copies.items()) if name in row and count > 0}
        self._urgent_rows = frozenset(row[name] for name in wants.urgent if name in row)
        self._placeable = None if wants.only is None else frozenset(row[name] for name in wants.only if name in row)
        #: By model, the sites that hold it; by site, the models.
        self._holders: list[set[int]] = [set() for _ in row]
        self._barred_at: list[set[int]] = [set() for _ in row]
        self._missed_at: dict[int, set[int]] = {}
        self._kept_at: dict[int, set[int]] = {}
        #: For a required copy; for others only what was not ordered lately.
        self._must_go: list[set[int]] = []
        self._may_go: list[set[int]] = []
        self._unused: list[tuple[int, int]] = []
        soon = {row[name] for name in wants.urgent | wants.copies.keys() if name in row}
        for number, site in enumerate(sites):
            self._take_in(number, site, row, soon, wants.withdraw)
        self._free = np.array([float(site.capacity_bytes - site.used_bytes) for site in sites])
        self._capacity = np.array([float(site.capacity_bytes) for site in sites])
        self._least_bytes, self._most_bytes = float(self._capacity.min()), float(self._capacity.max())
        self._may_fill = np.array([site.fill_bytes for site in sites])
        self._may_empty = np.array([site.empty_bytes for site in sites])
        # What is required at once goes beyond what several rounds have used up, but not without bounds.
        self._urgent = self._capacity * rules.share_per_round
        #: Where nothing was moved lately, so that an urgent model may move though it is larger than a share.
        self._rested = (self._may_fill >= self._urgent) & (self._may_empty >= self._urgent)
        self._places = numbered([site.location for site in sites])
        #: By model, what would be lost without the copy at a site; what requests cost now, by who asks; what all pay.
        self._loss: list[dict[int, float]] = [{} for _ in row]
        self._cost_s: dict[int, Floats] = {}
        self._gains: dict[int, Floats] = {}

    def commands(self) -> tuple[Command, ...]:
        """The changes of this round."""
        for model in range(len(self._models)):
            if self._holders[model]:
                self._value(model)
        commands = [*self._requirements(), *self._improvements(), *self._withdrawals()]
        return tuple(commands)

    def left(self) -> list[tuple[float, float]]:
        """What of ``fill_bytes`` and ``empty_bytes`` of each site was not used up; less than 0 if it was exceeded."""
        return list(zip(self._may_fill.tolist(), self._may_empty.tolist(), strict=True))

    def _take_in(
        self, number: int, site: WorkerState, row: Mapping[str, int], soon: set[int], withdraw: frozenset[str]
    ) -> None:
        def rows(names: Collection[str]) -> set[int]:
            return {row[name] for name in names if name in row}

        held, fresh, barred = rows(site.held), rows(site.fresh), rows(site.barred)
        for model in held:
            self._holders[model].add(number)
        for model in fresh | (barred - soon):
            self._barred_at[model].add(number)
        for model in rows(site.missed):
            self._missed_at.setdefault(model, set()).add(number)
        must_go = held - fresh - rows(site.unevictable)
        self._must_go.append(must_go)
        self._may_go.append(must_go - barred)
        if withdraw:
            self._unused += [(model, number) for model in rows(withdraw.intersection(site.unused)) & held]
            for model in rows(site.primary_for):
                self._kept_at.setdefault(model, set()).add(number)

    # What copies are worth

    def _askers(self, model: int) -> tuple[Rows, Floats]:
        """The locations that ask for a model, and their rates."""
        asked = slice(self._starts[model], self._starts[model + 1])
        return self._asking[asked], self._rate[asked]

    def _load_costs_s(self, model: int, askers: Rows) -> Floats:
        """What a load costs those who ask.

        Who has no worker, because it has just left, must go to one in any case: the nearest that can take the model.
        """
        if self._least_bytes < self._size[model] <= self._most_bytes:
            fits = np.flatnonzero(self._size[model] <= self._capacity)
            way_s: Floats = self._way_s[np.ix_(askers, fits)].min(axis=1)
        else:
            way_s = self._nearest_s[askers]
        return way_s + float(self._load_s[model])

    def _value(self, model: int) -> None:
        """Bring up to date what requests for a model cost, and what the copies of it are worth: seconds per second."""
        self._gains.pop(model, None)
        askers, rate = self._askers(model)
        holders = sorted(self._holders[model])
        self._loss[model] = {}
        if not len(askers):
            return
        load_s = self._load_costs_s(model, askers)
        if not holders:
            self._cost_s[model] = load_s
            return
        if len(holders) == 1:
            # Without the only copy, it must be loaded.
            cost_s = self._cost_s[model] = np.minimum(self._way_s[askers, holders[0]], load_s)
            lost = rate * (load_s - cost_s)
            # Summed one after the other, as those of several copies are: ties must stay ties.
            self._loss[model] = {holders[0]: float(lost.cumsum()[-1])}
            return
        if len(askers) == len(self._way_s):
            ways_s = self._way_s.take(holders, axis=1)
        else:
            ways_s = self._way_s[askers[:, None], holders]
        nearest = ways_s.argmin(axis=1)
        cost_s = self._cost_s[model] = np.minimum(ways_s.min(axis=1), load_s)
        # Without the nearest copy, requests go to the one that is now second.
        ways_s[np.arange(len(askers)), nearest] = np.inf
        lost = rate * (np.minimum(ways_s.min(axis=1), load_s) - cost_s)
        losses = np.bincount(nearest, weights=lost, minlength=len(holders))
        self._loss[model] = dict(zip(holders, losses.tolist(), strict=True))

    def _gain(self, model: int) -> Floats:
        """What a copy would save at every site: seconds per second."""
        gain = self._gains.get(model)
        if gain is None:
            askers, rate = self._askers(model)
            if model not in self._cost_s:
                self._value(model)
            gain = self._gains[model] = np.zeros(len(self._sites))
            # Some at a time, so that what is made of them stays in the processor's cache.
            for first in range(0, len(askers), _BLOCK):
                block = slice(first, first + _BLOCK)
                saved_s = self._cost_s[model][block, None] - self._way_s[askers[block]]
                # Not a product of matrices: that may round alike columns differently, and ties must stay ties.
                gain += np.einsum("l,ls->s", rate[block], np.maximum(saved_s, 0.0, out=saved_s))
        return gain

    def _may_load(self, model: int) -> Flags:
        """The sites that could take a copy."""
        may: Flags = self._size[model] <= self._capacity
        may[[*self._holders[model], *self._barred_at[model]]] = False
        return may

    # The copies that there must be

    def _requirements(self) -> Iterator[Command]:
        for model, wanted in self._copies.items():
            while (number := self._next_site(model, wanted)) is not None:
                victims = self._least_missed(model, number, self._must_go[number])
                if victims is None or self._urgent[number] <= 0:
                    self._barred_at[model].add(number)
                    continue
                self._urgent[number] -= self._size[model]
                yield from self._place(model, number, victims, required=True)

    def _next_site(self, model: int, wanted: int) -> int | None:
        """Where the next required copy belongs.

        Where there is none nearby, where it did not come to nothing lately, where most is gained, where most is free.
        """
        holders = self._holders[model]
        there = {self._sites[number].location for number in holders}
        if len(there) >= wanted:
            return None
        numbers = np.flatnonzero(self._may_load(model))
        is_there = np.isin(self._places[numbers], self._places[sorted(holders)])
        if len(holders) >= wanted:
            numbers, is_there = numbers[~is_there], is_there[~is_there]
        if not len(numbers):
            return None
        missed = np.isin(numbers, sorted(self._missed_at.get(model, ())))
        order = np.lexsort((-self._free[numbers], -self._gain(model)[numbers], missed, is_there))
        return int(numbers[order[0]])

    def _needs(self, model: int, number: int) -> bool:
        """Whether there would be too few copies, or at too few locations, without this one."""
        wanted = self._copies.get(model, 0)
        others = self._holders[model] - {number}
        elsewhere = {self._sites[other].location for other in others}
        return len(others) < wanted or (self._sites[number].location not in elsewhere and len(elsewhere) < wanted)

    # The copies that are worth it

    def _improvements(self) -> Iterator[Command]:
        # Lazy greedy: worth only falls as copies are added, so whatever still leads after a second look is the best.
        waiting = self._candidates()
        queue = [(candidates.lead, model) for model, candidates in waiting.items()]
        heapq.heapify(queue)
        placed = 0
        while queue and placed < self._rules.most_copies:
            lead, model = heapq.heappop(queue)
            candidates, number = waiting[model], lead[1]
            worth = self._gain(model) / self._size[model]
            if worth[number] < -lead[0]:
                # A little less, so that rounding excludes nothing.
                least = self._load_s[model] / self._rules.payback_s / self._size[model] * (1 - 1e-9)
                candidates.sink(worth, least)
            else:
                candidates.drop(self._fills(model))
                if number not in self._barred_at[model] and number not in self._holders[model]:
                    victims = self._victims(model, number)
                    if victims is not None:
                        placed += 1
                        yield from self._place(model, number, victims, required=False)
            if candidates:
                heapq.heappush(queue, (candidates.lead, model))

    def _candidates(self) -> dict[int, Candidates]:
        """By model, the sites where a copy might be placed; leaves out what surely cannot be."""
        least = self._least_losses()
        found: dict[int, Candidates] = {}
        for model in self._worthwhile():
            size, urgent = self._size[model], model in self._urgent_rows
            missing = np.maximum(size - self._free, 0.0)
            able = self._may_load(model)
            able &= self._fills(model)
            if not urgent:
                able &= missing <= self._may_empty
            else:
                able &= (missing <= self._may_empty) | self._rested
            if not able.any():
                continue
            gain = self._gain(model)
            with np.errstate(invalid="ignore"):
                price = np.where(missing > 0, missing * least * self._rules.hysteresis, 0.0)
            able &= (gain > price) & (gain * self._rules.payback_s >= self._load_s[model])
            numbers = np.flatnonzero(able)
            if len(numbers):
                found[model] = Candidates(numbers, gain[numbers] / size)
        return found

    def _worthwhile(self) -> list[int]:
        """The models of which a copy could be worth its load anywhere, were it near everybody who asks."""
        models = np.flatnonzero(np.diff(self._starts)).tolist()
        worthwhile = []
        for model in models:
            if self._placeable is not None and model not in self._placeable:
                continue
            askers, rate = self._askers(model)
            cost_s = self._cost_s.get(model)
            if cost_s is None:
                cost_s = self._cost_s[model] = self._load_costs_s(model, askers)
            # A little more, so that rounding excludes nothing.
            if float(rate @ cost_s) * self._rules.payback_s * (1 + 1e-9) >= self._load_s[model]:
                worthwhile.append(model)
        return worthwhile

    def _least_losses(self) -> Floats:
        """At every site, the least that is lost for a byte."""
        size = self._size.tolist()
        return np.array(
            [
                min([self._loss[model].get(number, 0.0) / size[model] for model in rows], default=math.inf)
                for number, rows in enumerate(self._may_go)
            ]
        )

    def _fills(self, model: int) -> Flags:
        """The sites where so much may be loaded in what is left of this round."""
        fills: Flags = self._size[model] <= self._may_fill
        return fills | self._rested if model in self._urgent_rows else fills

    def _victims(self, model: int, number: int) -> list[int] | None:
        """Whom ``model`` displaces at a site; None if it does not fit, is not worth it, or moves too much."""
        gain, rested = self._gain(model)[number], self._rested[number] and model in self._urgent_rows
        if gain <= 0 or gain * self._rules.payback_s < self._load_s[model]:
            return None
        if self._size[model] > self._may_fill[number] and not rested:
            return None
        may_go = self._may_go[number]
        if self._holders[model]:
            # A second copy of one model is never worth the last one of another that is asked for.
            may_go = {row for row in may_go if len(self._holders[row]) > 1 or not len(self._askers(row)[0])}
        victims = self._least_missed(model, number, may_go)
        if victims is None or (self._size[victims].sum() > self._may_empty[number] and not rested):
            return None
        lost = sum(self._loss[victim].get(number, 0.0) for victim in victims)
        return victims if not victims or gain > self._rules.hysteresis * lost else None

    def _least_missed(self, model: int, number: int, may_go: Collection[int]) -> list[int] | None:
        """What makes room for ``model`` at a site and is missed least; None if all together are not enough."""
        missing = float(self._size[model] - self._free[number])
        if missing <= 0:
            return []
        rows = [row for row in sorted(may_go) if row not in self._copies or not self._needs(row, number)]
        rows.sort(key=lambda row: self._loss[row].get(number, 0.0) / self._size[row])
        enough = int(np.searchsorted(np.cumsum(self._size[rows]), missing)) + 1
        if enough > len(rows):
            return None
        victims: list[int] = []
        # Of these, only the largest that suffice: a small model is spared when its bytes are not needed.
        for victim in sorted(rows[:enough], key=lambda victim: -self._size[victim]):
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
        self._holders[model].add(number)
        self._value(model)
        for victim in victims:
            self._go(victim, number)

    def _go(self, model: int, number: int) -> None:
        self._holders[model].discard(number)
        self._may_go[number].discard(model)
        self._must_go[number].discard(model)
        # Not back in the round that takes it away.
        self._barred_at[model].add(number)
        self._value(model)

    # The copies that nobody would miss

    def _withdrawals(self) -> Iterator[Command]:
        for model, number in sorted(self._unused):
            kept = self._kept_at.get(model, set())
            if number not in self._holders[model] or number in kept:
                continue
            others = kept & self._holders[model]
            lost = self._loss[model].get(number, 0.0) * self._rules.payback_s * self._rules.hysteresis
            if not others or lost >= self._load_s[model] or self._needs(model, number):
                continue
            if self._may_empty[number] < self._size[model] and not self._rested[number]:
                continue
            site = self._sites[number]
            yield EvictAt(location=site.location, replica=site.replica, model_id=self._models[model])
            self._may_empty[number] -= self._size[model]
            self._rested[number] = False
            self._go(model, number)
