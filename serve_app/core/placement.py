"""Which models should lie where: what a copy would save all locations together, byte for byte.

A location pays nothing for a request whose model is there, else the load or the way to the nearest holder, whichever
is less. A copy is worth what all locations would pay less, per second, with it. Copies are placed greedily by worth per
byte, each in free memory or in the place of copies that are missed clearly less. All of it is advice: a worker unloads
nothing that is in use, and loads what it is advised to only when nobody has to wait for that.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from serve_app.core.cache import ModelState
from serve_app.core.reports import WorkerReport
from serve_app.core.routing import RoutingRules

_Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class PreloadAt:
    """A worker should load a model in the background."""

    location: str
    replica: str
    model_id: str


@dataclass(frozen=True, slots=True, kw_only=True)
class EvictAt:
    """A worker should unload a model, to make room for one that it is advised to load next."""

    location: str
    replica: str
    model_id: str


Command = PreloadAt | EvictAt


@dataclass(frozen=True, slots=True, kw_only=True)
class PlacementRules:
    """How eager placement is.

    Attributes:
        share_per_round: of a worker's memory, that one round may fill, and that it may empty.
        hysteresis: a copy displaces others only if it is worth so many times what they are.
        payback_s: a copy is worth its load only if it saves as many seconds within this time.
        patience_s: how long an order counts as carried out though no report confirms it.
        repeat_s: how long a worker is not told anything else about the same model.
    """

    share_per_round: float = 0.1
    hysteresis: float = 3.0
    payback_s: float = 600.0
    patience_s: float = 10.0
    repeat_s: float = 120.0

    def __post_init__(self) -> None:
        if not 0 < self.share_per_round <= 1:
            raise ValueError(f"share_per_round must be above 0 and at most 1, not {self.share_per_round}")
        if not self.hysteresis >= 1:
            raise ValueError(f"hysteresis must be at least 1, not {self.hysteresis}")
        for name in ("payback_s", "patience_s", "repeat_s"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, not {getattr(self, name)}")


@dataclass(frozen=True, slots=True)
class _Order:
    given_s: float
    preload: bool


class Placement:
    """Gives each round's commands, and remembers which are still under way.

    Args:
        routing: profiles and links.
        rules: how eager to be.
        payload_bytes: of a typical request, which is what makes a way long beside its round trip.
    """

    def __init__(self, routing: RoutingRules, rules: PlacementRules, *, payload_bytes: int) -> None:
        self._routing = routing
        self._rules = rules
        self._payload_bytes = payload_bytes
        self._orders: dict[tuple[str, str], _Order] = {}

    def round(
        self, reports: Iterable[WorkerReport], rates: Mapping[str, Mapping[str, float]], now: float
    ) -> tuple[Command, ...]:
        """What to change now (seconds); nothing where nothing would be clearly better.

        Args:
            reports: the last one of every live worker.
            rates: requests per second of every model by users of every location.
            now: seconds; never runs backwards.
        """
        self._orders = {
            key: order for key, order in self._orders.items() if now - order.given_s <= self._rules.repeat_s
        }
        sites = [self._site(report, now) for report in sorted(reports, key=lambda report: report.replica)]
        if not sites:
            return ()
        commands = _Round(sites, rates, self._routing, self._rules, self._payload_bytes).commands()
        for command in commands:
            self._orders[command.replica, command.model_id] = _Order(now, isinstance(command, PreloadAt))
        return commands

    def _site(self, report: WorkerReport, now: float) -> _Site:
        """A worker as it will be when its orders have been carried out."""
        held = dict.fromkeys(report.models, True)
        used_bytes = report.used_bytes
        ordered = set()
        for (replica, model_id), order in self._orders.items():
            if replica != report.replica:
                continue
            ordered.add(model_id)
            if now - order.given_s > self._rules.patience_s or order.preload == (model_id in held):
                continue
            if order.preload:
                held[model_id] = True
                used_bytes += self._routing.profiles[model_id].size_bytes
            else:
                del held[model_id]
                used_bytes -= self._routing.profiles[model_id].size_bytes
        stays = {
            resident.model_id
            for resident in report.models.values()
            if resident.pinned or resident.state is ModelState.LOADING
        }
        return _Site(report.location, report.replica, report.capacity_bytes, used_bytes, held, ordered, stays | ordered)


@dataclass(slots=True)
class _Site:
    """``fixed`` models stay where they are, ``barred`` ones are not to be loaded."""

    location: str
    replica: str
    capacity_bytes: int
    used_bytes: int
    held: Collection[str]
    barred: Collection[str]
    fixed: Collection[str]


class _Round:
    """One round: tables of models (rows) by locations that ask or sites that hold (columns), kept exact throughout."""

    def __init__(
        self,
        sites: list[_Site],
        rates: Mapping[str, Mapping[str, float]],
        routing: RoutingRules,
        rules: PlacementRules,
        payload_bytes: int,
    ) -> None:
        self._sites, self._rules = sites, rules
        locations = sorted({site.location for site in sites} | rates.keys())
        names = {name for asked in rates.values() for name in asked}.union(*(site.held for site in sites))
        # Sorted, so that ties fall the same way every time.
        self._models = sorted(names & routing.profiles.keys())
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
            for model_id, per_s in rates.get(location, {}).items():
                if model_id in row:
                    self._rate[row[model_id], number] = per_s
        self._held = _marked(row, [site.held for site in sites])
        self._may_load = ~self._held & ~_marked(row, [site.barred for site in sites])
        self._may_go = self._held & ~_marked(row, [site.fixed for site in sites])
        self._free = np.array([float(site.capacity_bytes - site.used_bytes) for site in sites])
        capacity = np.array([float(site.capacity_bytes) for site in sites])
        self._may_load &= self._size[:, None] <= capacity
        self._may_fill = capacity * rules.share_per_round
        self._may_empty = self._may_fill.copy()
        self._gain = np.zeros(self._held.shape)
        self._loss = np.zeros(self._held.shape)
        self._value(np.arange(len(row)))

    def commands(self) -> tuple[Command, ...]:
        commands: list[Command] = []
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
            if victims is None:
                continue
            site = self._sites[number]
            for command, several in ((EvictAt, victims), (PreloadAt, [model])):
                commands += [
                    command(location=site.location, replica=site.replica, model_id=self._models[one]) for one in several
                ]
            self._place(model, number, victims)
        return tuple(commands)

    def _value(self, models: NDArray[np.intp]) -> None:
        """Bring what copies of these models are, or would be, worth up to date: seconds saved per second."""
        rate, load_s, held = self._rate[models], self._load_s[models, None], self._held[models]
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
        fits = (size <= self._may_fill) & (missing <= self._may_empty)
        able = self._may_load & worthwhile & fits & (self._gain > price)
        models, numbers = np.nonzero(able)
        worth = self._gain[models, numbers] / self._size[models]
        queue = list(zip((-worth).tolist(), models.tolist(), numbers.tolist(), strict=True))
        heapq.heapify(queue)
        return queue

    def _victims(self, model: int, number: int) -> list[int] | None:
        """Whom ``model`` displaces at a site; None if it does not fit, is not worth it, or moves too much."""
        gain = self._gain[model, number]
        if self._size[model] > self._may_fill[number] or gain * self._rules.payback_s < self._load_s[model]:
            return None
        missing = self._size[model] - self._free[number]
        if missing <= 0:
            return []
        may_go = self._may_go[:, number]
        if self._held[model].any():
            # A second copy of one model is never worth the last one of another that is asked for.
            may_go = may_go & ~((self._held.sum(axis=1) == 1) & (self._rate.sum(axis=1) > 0))
        rows = np.flatnonzero(may_go)
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
        if self._size[victims].sum() > self._may_empty[number]:
            return None
        return victims if gain > self._rules.hysteresis * self._loss[victims, number].sum() else None

    def _place(self, model: int, number: int, victims: list[int]) -> None:
        freed = self._size[victims].sum()
        self._free[number] += freed - self._size[model]
        self._may_empty[number] -= freed
        self._may_fill[number] -= self._size[model]
        self._held[model, number] = True
        self._may_load[model, number] = False
        self._held[victims, number] = self._may_go[victims, number] = False
        self._value(np.array([model, *victims]))


def _marked(row: Mapping[str, int], columns: list[Collection[str]]) -> NDArray[np.bool_]:
    """A table that says for every model, and for every column, whether it is named there."""
    marked = np.zeros((len(row), len(columns)), dtype=np.bool_)
    for number, names in enumerate(columns):
        marked[[row[name] for name in names if name in row], number] = True
    return marked
