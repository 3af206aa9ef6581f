"""The cost of decisions as the cluster grows: ``python -m loadtests.scale``.

A made-up cluster (``scale_world.py``) of 10, 100 and 1,000 locations and 10,000 models reports through the state
machines that serve: one ``CoordinatorState``, and the ``RouterView`` of some routers, which decide with ``choose``
while their views change. No Ray, no network: the benchmark measures decisions alone. Bytes are those of pickled
``ViewDelta``s to the worker and to the router of a location, each four times a second. Memory is resident memory. Times
are processor time, so that other processes count less. Every size has a process for its coordinator and one for its
routers (``scale_routers.py``); the last column is the cost of the largest cluster over that of the smallest.
"""

from __future__ import annotations

import gc
import json
import multiprocessing
import pickle
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import click
import psutil
from rich.console import Console
from rich.table import Table

from loadtests.support.scale_routers import DECISIONS, REQUESTS, decide
from loadtests.support.scale_world import TICK_S, World
from serve_app.core.cluster.reports import ViewDelta, WorkerReport
from serve_app.core.coordination.coordinator_state import CoordinatorState
from serve_app.core.coordination.events import LinksMeasured, Reader, ReaderSeen, WorkerReported
from serve_app.core.coordination.rules import CoordinatorRules
from serve_app.core.placement.rules import PlacementRules, PlacementSettings
from serve_app.core.routing.router_view import RouterView
from serve_app.core.vocabulary import Outcome

#: Routers that read deltas and decide; other views are not kept.
_ROUTERS = 8
#: A measurement takes not much longer, however slow its subject is.
_LIMIT_S = 8.0
_PAYLOAD_BYTES = 100_000
_WARM_TICKS = 8

#: The figures, and their aims with 1,000 locations and 10,000 models.
AIMS = {
    **{f"decision p99, {outcome.value} (us)": 20.0 for outcome in Outcome},
    "decision p99, all (us)": 20.0,
    "reports a second, answered": 20_000.0,
    "reports a second, taken in": 20_000.0,
    "placement round, first (s)": 1.0,
    "placement round (s)": 1.0,
    "deltas (kB/s a location)": 64.0,
}
_MORE_IS_BETTER = {"reports a second, answered", "reports a second, taken in"}


@dataclass(slots=True)
class Figures:
    """One size of cluster: figures by name, in the order in which they were measured."""

    locations: int
    models: int
    values: dict[str, float] = field(default_factory=dict)


class _Bench:
    def __init__(self, locations: int, models: int, seed: int) -> None:
        self._world = world = World(locations, models, seed)
        self._figures = Figures(locations, models)
        self._now = 100.0
        self._routers = {location: RouterView() for location in world.locations[:_ROUTERS]}
        #: The epoch and version that each worker has.
        self._read: dict[str, tuple[str, int]] = dict.fromkeys(world.locations, ("", 0))

    def run(self) -> tuple[Figures, list[dict[str, bytes]]]:
        """The figures, and the deltas of the routers."""
        values = self._figures.values
        history = list(self._world.history())
        reports = [list(self._world.tick()) for _ in range(2)]
        links = [self._world.links(location) for location in self._world.locations]
        before_bytes = _resident_bytes()
        self._state = state = CoordinatorState(
            epoch="first",
            rules=CoordinatorRules(
                half_life_s=60.0,
                stale_after_s=1e9,
                placement=PlacementSettings(
                    routing=self._world.rules, every_s=1e9, payload_bytes=_PAYLOAD_BYTES, rules=PlacementRules()
                ),
            ),
        )
        for measured in links:
            state.handle(LinksMeasured(links=measured), self._now)
        for report in history:
            # One location after the other: all at once they would be a flash crowd.
            self._now += TICK_S
            state.handle(WorkerReported(report), self._now)
        for tick in reports:
            self._report(tick)
        del history, reports, links
        values["coordinator (MB)"] = (_resident_bytes() - before_bytes) / 1e6
        self._resynchronize()
        self._settle()
        values["reports a second, answered"] = self._reports_per_s(self._answer)
        self._measure_deltas()
        announced = self._announce()
        self._place()
        # Last: without readers meanwhile, later deltas and rounds of placement would be larger than in service.
        values["reports a second, taken in"] = self._reports_per_s(
            lambda report: state.handle(WorkerReported(report), self._now)
        )
        return self._figures, announced

    def _report(self, tick: Sequence[WorkerReport]) -> None:
        """Every worker reports; no delta is read."""
        self._now += TICK_S
        for report in tick:
            self._state.handle(WorkerReported(report), self._now)

    def _view(self, location: str, known: RouterView) -> bytes:
        delta = self._read_delta(Reader(location, None, known.cluster.epoch, known.cluster.version))
        return pickle.dumps(delta, pickle.HIGHEST_PROTOCOL)

    def _read_delta(self, reader: Reader) -> ViewDelta:
        self._state.handle(ReaderSeen(reader), self._now)
        return self._state.delta(reader, self._now)

    def _resynchronize(self) -> None:
        """All readers read everything, as after a restart of the coordinator."""
        values = self._figures.values
        sizes: list[int] = []
        began_s = time.thread_time()
        for location in self._world.locations:
            sizes.append(len(self._view(location, RouterView())))
            if time.thread_time() - began_s > _LIMIT_S:
                break
        took_s = time.thread_time() - began_s
        values["first view of a reader (kB)"] = statistics.mean(sizes) / 1e3
        values["first views of all readers, two a location (s)"] = took_s / len(sizes) * 2 * len(self._world.locations)
        before_bytes = _resident_bytes()
        for location, known in self._routers.items():
            known.apply(pickle.loads(self._view(location, known)), self._now)
        values["router (MB)"] = (_resident_bytes() - before_bytes) / 1e6 / len(self._routers)

    def _settle(self) -> None:
        """Let all workers report and read for some ticks, as far as there is time."""
        began_s = time.perf_counter()
        for _ in range(_WARM_TICKS):
            self._now += TICK_S
            for report in self._world.tick():
                self._answer(report)
                if time.perf_counter() - began_s > 2 * _LIMIT_S:
                    return
            self._refresh()

    def _answer(self, report: WorkerReport) -> ViewDelta:
        epoch, version = self._read[report.location]
        delta = self._state.exchange(report, epoch, version, self._now)
        self._read[report.location] = delta.epoch, delta.version
        return delta

    def _refresh(self) -> None:
        for location, known in self._routers.items():
            known.apply(pickle.loads(self._view(location, known)), self._now)

    def _reports_per_s(self, act: Callable[[WorkerReport], object]) -> float:
        spent_s, count, began_s = 0.0, 0, time.perf_counter()
        while time.perf_counter() - began_s < _LIMIT_S and count < 20_000:
            tick = [pickle.dumps(report, pickle.HIGHEST_PROTOCOL) for report in self._world.tick()]
            self._now += TICK_S
            gc.collect()
            for sent in tick:
                # Each report is unpickled just before it is taken in, as in service: a list of a whole tick would have
                # left the processor's cache.
                report: WorkerReport = pickle.loads(sent)
                before_s = time.thread_time()
                act(report)
                spent_s += time.thread_time() - before_s
                count += 1
                if spent_s > _LIMIT_S:
                    break
            self._refresh()
        return count / spent_s

    def _measure_deltas(self) -> None:
        """Bytes of the deltas to a worker and a router, mean over some locations."""
        per_s: list[float] = []
        began_s = time.perf_counter()
        for _ in range(12):
            sizes = dict.fromkeys(self._routers, 0)
            self._now += TICK_S
            for report in self._world.tick():
                if report.location in sizes:
                    sizes[report.location] += len(pickle.dumps(self._answer(report), pickle.HIGHEST_PROTOCOL))
                else:
                    self._state.handle(WorkerReported(report), self._now)
            for location, known in self._routers.items():
                data = self._view(location, known)
                sizes[location] += len(data)
                known.apply(pickle.loads(data), self._now)
            per_s.extend(size / TICK_S for size in sizes.values())
            if time.perf_counter() - began_s > 3 * _LIMIT_S:
                break
        self._figures.values["deltas (kB/s a location)"] = statistics.mean(per_s) / 1e3

    def _announce(self) -> list[dict[str, bytes]]:
        """The deltas of the routers: everything, then what is new, for as many decisions as there is time for."""
        announced: list[dict[str, bytes]] = []
        read = dict.fromkeys(self._routers, ("", 0))
        began_s = time.perf_counter()
        while len(announced) <= DECISIONS // REQUESTS // len(read) and time.perf_counter() - began_s < 4 * _LIMIT_S:
            self._report(list(self._world.tick()))
            deltas: dict[str, bytes] = {}
            for location, (epoch, version) in read.items():
                delta = self._read_delta(Reader(location, None, epoch, version))
                read[location] = delta.epoch, delta.version
                deltas[location] = pickle.dumps(delta, pickle.HIGHEST_PROTOCOL)
            announced.append(deltas)
        return announced

    def _place(self) -> None:
        values = self._figures.values
        rounds = []
        for _ in range(3):
            before_s = time.thread_time()
            try:
                commands = self._state.plan(self._now)
            except MemoryError:
                return
            rounds.append((time.thread_time() - before_s, len(commands)))
            if sum(seconds for seconds, _ in rounds) > 3 * _LIMIT_S:
                break
            for _ in range(4):
                self._report(list(self._world.tick()))
        values["placement round, first (s)"], values["commands of the first round"] = rounds[0]
        values["placement round (s)"] = statistics.median(seconds for seconds, _ in rounds)


def _resident_bytes() -> int:
    gc.collect()
    return int(psutil.Process().memory_info().rss)


def measure(locations: int, models: int, seed: int) -> tuple[Figures, list[dict[str, bytes]]]:
    """Measure the coordinator of one size in this process; returns the deltas of some routers, too."""
    return _Bench(locations, models, seed).run()


@click.command(help=__doc__)
@click.option("--locations", default="10,100,1000", show_default=True, help="Sizes of the cluster.")
@click.option("--models", default=10_000, show_default=True, type=click.IntRange(300), help="In the catalog.")
@click.option("--seed", default=0, show_default=True, help="Of everything.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def main(locations: str, models: int, seed: int, as_json: bool) -> None:
    """See the module."""
    try:
        sizes = sorted({int(size) for size in locations.split(",")})
    except ValueError:
        raise click.BadParameter(f"must be numbers like 10,100, not {locations!r}", param_hint="--locations") from None
    if not sizes or sizes[0] < 2:
        raise click.BadParameter("a cluster has at least 2 locations", param_hint="--locations")
    found = []
    for size in sizes:
        # Memory of one size must not be counted as that of the next.
        with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
            figures, announced = pool.apply(measure, (size, models, seed))
            figures.values |= pool.apply(decide, (size, models, seed, announced))
            found.append(figures)
    if as_json:
        rows = [{"locations": row.locations, "models": row.models, "figures": row.values} for row in found]
        click.echo(json.dumps({"aims": AIMS, "rows": rows}))
        return
    Console(width=max(120, 60 + 14 * len(found))).print(_table(found))


def _table(found: Sequence[Figures]) -> Table:
    table = Table(title=f"{found[0].models:,} models")
    table.add_column("locations")
    for row in found:
        table.add_column(f"{row.locations:,}", justify="right")
    table.add_column("aim", justify="right")
    table.add_column("growth", justify="right")
    show: Callable[[float], str] = lambda value: f"{value:,.3g}" if value < 1000 else f"{value:,.0f}"  # noqa: E731
    for name in found[-1].values:
        aim = AIMS.get(name)
        bound = (
            "" if aim is None else f"{'>' if name in _MORE_IS_BETTER else '<'} {aim:,.3g}".replace("2e+04", "20,000")
        )
        values = [row.values.get(name, float("nan")) for row in found]
        growth = values[-1] / values[0] if values[0] else float("nan")
        table.add_row(name, *map(show, values), bound, f"x {growth:.2g}")
    return table


if __name__ == "__main__":
    main()
