"""Which models should lie where: what a copy would save all locations together, byte for byte.

A location pays nothing for a request whose model is there, else the load or the way to the nearest holder, whichever
is less. A copy is worth what all locations would pay less, per second, with it. Copies are placed greedily by worth per
byte, each in free memory or in the place of copies that are missed clearly less. Before that come the copies that are
required, by the catalogue or because a crowd is more than the holders can serve. After it, copies are withdrawn that
nobody uses and nobody would miss. All of it is advice: a worker unloads nothing that is in use.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from serve_app.core.cluster.commands import Command, PreloadAt
from serve_app.core.cluster.reports import WorkerReport
from serve_app.core.links import Link
from serve_app.core.placement.latency_matrix import LatencyMatrix
from serve_app.core.placement.rules import PlacementRules
from serve_app.core.placement.solver import PlacementGoals, PlacementRound, WorkerState
from serve_app.core.routing.rules import RoutingRules
from serve_app.core.vocabulary import ModelState


@dataclass(frozen=True, slots=True)
class _Order:
    given_s: float
    preload: bool


@dataclass(slots=True)
class _Credit:
    """Bytes that may still be filled and emptied at one worker; less than 0 after a model larger than a share."""

    fill_bytes: float
    empty_bytes: float


class Placement:
    """Gives each round's commands, and remembers which are still under way.

    Args:
        routing: profiles and links.
        rules: how eager to be.
        payload_bytes: of a typical request, which is what makes a way long beside its round trip.
        min_copies: models of which there must be several copies, whether or not anybody asks for them.
    """

    def __init__(
        self,
        routing: RoutingRules,
        rules: PlacementRules,
        *,
        payload_bytes: int,
        min_copies: Mapping[str, int] | None = None,
    ) -> None:
        self._profiles = routing.profiles
        self._ways = LatencyMatrix(routing.links, routing.default_link, payload_bytes)
        self._rules = rules
        self._min_copies = min_copies or {}
        self._orders: dict[tuple[str, str], _Order] = {}
        self._credits: dict[str, _Credit] = {}
        #: When each worker was last seen to use each of its models, or to have got it.
        self._used_s: dict[str, dict[str, float]] = {}

    def measured(self, links: Mapping[tuple[str, str], Link]) -> None:
        """These ways take so long, as a router has measured."""
        self._ways.measured(links)

    def used(self, replica: str, model_id: str, now: float) -> None:
        """A worker has served a request for a model."""
        self._used_s.setdefault(replica, {})[model_id] = now

    def round(
        self,
        reports: Iterable[WorkerReport],
        rates: Mapping[str, Mapping[str, float]],
        now: float,
        *,
        crowds: Mapping[str, Mapping[str, float]] | None = None,
        over: frozenset[str] = frozenset(),
    ) -> tuple[Command, ...]:
        """What to change now (seconds); nothing where nothing would be clearly better.

        Args:
            reports: the last one of every live worker.
            rates: requests per second of every model by users of every location, steadily.
            now: seconds; never runs backwards.
            crowds: the same for the requests of this very moment, of what is surely more than chance.
            over: models for which there was a crowd, which has gone; copies of them may be withdrawn.
        """
        sites = self._sites(reports, now)
        if not sites:
            return ()
        crowds = crowds or {}
        merged, urgent = self._merged(rates, crowds)
        work = PlacementRound(
            sites,
            PlacementGoals(rates=merged, copies=self._copies(crowds, sites), urgent=urgent, withdraw=over),
            self._profiles,
            self._rules,
            self._ways,
        )
        commands = work.commands()
        for site, left in zip(sites, work.left(), strict=True):
            self._credits[site.replica] = _Credit(*left)
        return self._given(commands, now)

    def hand_over(
        self,
        leaving: WorkerReport,
        reports: Iterable[WorkerReport],
        rates: Mapping[str, Mapping[str, float]],
        now: float,
    ) -> tuple[Command, ...]:
        """What others should load because ``leaving`` is about to go; moves more at once than a round."""
        sites = self._sites(reports, now)
        for site in sites:
            site.fill_bytes = site.empty_bytes = site.capacity_bytes * self._rules.hand_over_share
        if not sites:
            return ()
        models = frozenset(leaving.models)
        wants = PlacementGoals(rates=rates, copies=self._min_copies, urgent=models, only=models)
        return self._given(PlacementRound(sites, wants, self._profiles, self._rules, self._ways).commands(), now)

    def _given(self, commands: tuple[Command, ...], now: float) -> tuple[Command, ...]:
        for command in commands:
            self._orders[command.replica, command.model_id] = _Order(now, isinstance(command, PreloadAt))
        return commands

    def _merged(
        self, rates: Mapping[str, Mapping[str, float]], crowds: Mapping[str, Mapping[str, float]]
    ) -> tuple[Mapping[str, Mapping[str, float]], frozenset[str]]:
        """Rates, and in their place those of crowds that would pay for a load before they may have gone; of what."""
        merged, urgent = dict(rates), set()
        if not any(crowds.values()):
            return merged, frozenset()
        furthest_s = self._ways.furthest_s
        for location, crowd in crowds.items():
            asked = dict(merged.get(location, {}))
            for model_id, per_s in crowd.items():
                profile = self._profiles.get(model_id)
                if profile is None or per_s <= asked.get(model_id, 0.0):
                    continue
                saved_s = per_s * self._rules.crowd_payback_s * min(profile.load_s, furthest_s)
                if saved_s >= profile.load_s:
                    asked[model_id] = per_s
                    urgent.add(model_id)
            merged[location] = asked
        return merged, frozenset(urgent)

    def _copies(self, crowds: Mapping[str, Mapping[str, float]], sites: list[WorkerState]) -> Mapping[str, int]:
        """How many copies there must be of models of which one is not enough, or that nobody may ask for."""
        copies = dict(self._min_copies)
        busy = self._rules.busy_share * sum(site.exec_slots for site in sites) / len(sites)
        for model_id in {model_id for crowd in crowds.values() for model_id in crowd} & self._profiles.keys():
            per_s = sum(crowd.get(model_id, 0.0) for crowd in crowds.values())
            needed = math.ceil(per_s * self._profiles[model_id].exec_s / busy)
            if needed > 1:
                copies[model_id] = max(copies.get(model_id, 0), min(needed, len(sites)))
        return copies

    def _sites(self, reports: Iterable[WorkerReport], now: float) -> list[WorkerState]:
        self._orders = {
            key: order for key, order in self._orders.items() if now - order.given_s <= self._rules.repeat_s
        }
        staying = sorted(
            (report for report in reports if not report.leaving and report.capacity_bytes > 0),
            key=lambda report: report.replica,
        )
        replicas = {report.replica for report in staying}
        for known in (self._used_s, self._credits):
            for replica in known.keys() - replicas:
                del known[replica]
        orders: dict[str, dict[str, _Order]] = {}
        for (replica, model_id), order in self._orders.items():
            orders.setdefault(replica, {})[model_id] = order
        return [self._site(report, orders.get(report.replica, {}), now) for report in staying]

    def _site(self, report: WorkerReport, orders: Mapping[str, _Order], now: float) -> WorkerState:
        """A worker as it will be when its orders have been carried out."""
        known = self._used_s.get(report.replica, {})
        used_s = self._used_s[report.replica] = {
            model_id: now if resident.uses else known.get(model_id, now) for model_id, resident in report.models.items()
        }
        held = dict.fromkeys(report.models, True)
        used_bytes = report.used_bytes + report.unaccounted_bytes
        ordered, just_ordered, missed = set(), set(), set()
        for model_id, order in orders.items():
            ordered.add(model_id)
            fresh = now - order.given_s <= self._rules.patience_s
            if fresh:
                just_ordered.add(model_id)
            elif order.preload and model_id not in report.models:
                missed.add(model_id)
            if not fresh or order.preload == (model_id in held) or model_id not in self._profiles:
                continue
            if order.preload:
                held[model_id] = True
                used_bytes += self._profiles[model_id].size_bytes
            else:
                del held[model_id]
                used_bytes -= self._profiles[model_id].size_bytes
        stays = {
            resident.model_id
            for resident in report.models.values()
            if resident.unevictable or resident.state is ModelState.LOADING
        }
        share_bytes = report.capacity_bytes * self._rules.share_per_round
        credit = self._credits.get(report.replica, _Credit(share_bytes, share_bytes))
        return WorkerState(
            location=report.location,
            replica=report.replica,
            capacity_bytes=report.capacity_bytes,
            used_bytes=used_bytes,
            exec_slots=report.exec_slots,
            held=held,
            barred=ordered,
            fresh=just_ordered,
            missed=missed,
            unevictable=stays,
            primary_for=report.primary_for,
            unused={
                model_id
                for model_id, since_s in used_s.items()
                if now - since_s >= self._rules.withdraw_after_s and not report.models[model_id].uses
            }
            - stays
            - just_ordered,
            fill_bytes=min(share_bytes, credit.fill_bytes + share_bytes),
            empty_bytes=min(share_bytes, credit.empty_bytes + share_bytes),
        )
