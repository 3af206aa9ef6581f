"""What users notice when the head of a cluster is lost: ``python -m loadtests.head_loss``.

Starts a cluster of a head and three locations on hosts of its own (``loadtests.testbed``; needs root), keeps requests
coming at every location's own address, and takes the head's power (``--stop``: only stops Ray there, which the others
notice at once). Paris and Tokyo have too little memory for one of
the models, so they forward requests for it to Virginia. Clients are those of ``loadtests.faults``: a request that
fails, or is not answered within 5 s, is tried once more at another location. The first table says, by the time since
the loss,

    sent      requests
    hits, loads, forwards   how they were answered at the first address (a join counts as a load)
    broken    of these, failed at the first address; who has no other address sees these
    lost      failed at the second address as well

the second until when each location answered hits, loads and forwards, and when its Ray and its worker ended; the third
what it took to be whole again.

By default the head keeps what it knows in memory, as Ray does: once nothing serves any more, it boots, and Ray is
started anew everywhere. With ``--redis`` it keeps it in a Redis on a host of its own (``deploy/redis.conf``; needs
redis-server), with ``--rocksdb`` on its own disk, and Ray elsewhere waits for it: after each of the outages it boots,
Ray is started there and nowhere else, and a worker is killed to see that somebody takes care of the cluster again.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise

import click
from rich.console import Console
from rich.table import Table

from loadtests.support.clients import Answer, Clients
from loadtests.support.testbed_cluster import HEAD, Lab, LabError, Store, lab, until
from loadtests.testbed.machine import TestbedError

LOCATIONS = ("paris", "tokyo", "virginia")
SMALL = ("squeezenet1_1", "shufflenet_v2_x0_5", "mobilenet_v3_small", "mnasnet0_5", "shufflenet_v2_x1_0")
LARGE = "resnet18"
#: Room for three of the small ones; and for the large one as well.
_MEMORY = {"paris": "45MiB", "tokyo": "45MiB", "virginia": "150MiB"}
#: Two models are always asked for, so they are hits; three in turn, and kept here, so there are loads.
_HITS = [f"/v1/classify?model={name}" for name in SMALL[:2]]
_LOADS = [f"/v1/classify?model={name}&forward=never" for name in SMALL[2:]]
_PATHS = [path for load in _LOADS for path in (*_HITS, load, f"/v1/classify?model={LARGE}")]
_SLICES_S = (0.0, 10.0, 30.0, 60.0, 120.0, 300.0, float("inf"))
_BEFORE_S = 15.0
_LOOK_S = 1.0
_NOTHING_S = 20.0
_GIVEN_UP_S = 400.0
_RECOVERY_S = 300.0
_SETTLED_S = 5.0
_WORKER = "ray::ServeReplica:{}:Worker"


@dataclass(frozen=True, slots=True, kw_only=True)
class Slice:
    """What became of the requests to one location that were sent in one span of time."""

    when: str
    location: str
    sent: int
    hits: int
    loads: int
    forwards: int
    broken: int
    lost: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Lasted:
    """How long one location did what, in seconds since the loss; None is never, or not once."""

    location: str
    hits_s: float | None
    loads_s: float | None
    forwards_s: float | None
    ray_ended_s: float | None
    worker_ended_s: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Loss:
    """One loss of the head. ``steps`` are seconds since it came back."""

    store: Store
    stopped: bool
    outage_s: float
    slices: Sequence[Slice]
    lasted: Sequence[Lasted]
    steps: Sequence[tuple[str, float | None]]
    problems: Sequence[str] = field(default_factory=tuple)


class Watch:
    """Looks every second whether Ray and the worker of each location are still the same processes."""

    def __init__(self, made: Lab) -> None:
        self._lab = made
        self._over = threading.Event()
        self._first = {name: self._processes(name) for name in LOCATIONS}
        self.ended_s: dict[tuple[str, str], float] = {}
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Watch:
        """Start looking."""
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Stop looking."""
        self._over.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._over.wait(_LOOK_S):
            for location in LOCATIONS:
                now = self._processes(location)
                for kind, first in self._first[location].items():
                    if not first & now[kind]:
                        self.ended_s.setdefault((location, kind), time.monotonic())

    def _processes(self, location: str) -> dict[str, set[int]]:
        worker = _WORKER.format(location)
        return {"ray": set(self._lab.raylets(location)), "worker": set(self._lab.pids(location, worker))}


def lose(made: Lab, clients: Clients, *, stop: bool, outage_s: float | None, say: Callable[[str], None]) -> Loss:
    """Take the head away, wait, give it back, and see to it that all is whole again.

    Args:
        made: the cluster.
        clients: who asks it.
        stop: only Ray is stopped on the head; else its power is taken.
        outage_s: how long the head is lost; None is until nothing serves.
        say: is told how far it is.
    """
    with Watch(made) as watch:
        began_s = time.monotonic()
        if stop:
            made.stop_ray(HEAD)
        else:
            made.host(HEAD).kill()
        if outage_s is None:
            until("nothing serves", lambda: _nothing_serves(clients, watch, began_s), _GIVEN_UP_S)
        else:
            threading.Event().wait(outage_s)
        back_s = time.monotonic()
        say(f"the head is back after {back_s - began_s:.0f} s")
        steps = [*_take_back(made, clients, outage_s is None, say)]
        steps = [(name, None if at_s is None else at_s - back_s) for name, at_s in steps]
        threading.Event().wait(_SETTLED_S)
        answers = clients.since(began_s - _BEFORE_S)
        lasted = [_lasted(location, answers, watch, began_s, back_s) for location in LOCATIONS]
    if outage_s is not None:
        steps.append(("then a worker was killed; seconds until all was well", _replaced_s(made, clients)))
    return Loss(
        store=made.store,
        stopped=stop,
        outage_s=back_s - began_s,
        slices=_slices(answers, began_s, back_s),
        lasted=lasted,
        steps=steps,
        problems=[
            f"{one.sent_s - began_s:.1f} s, {one.location}: {one.problem}"[:300] for one in answers if one.broken
        ],
    )


def _nothing_serves(clients: Clients, watch: Watch, began_s: float) -> bool:
    quiet = clients.since(max(began_s, time.monotonic() - _NOTHING_S))
    gone = all((location, kind) in watch.ended_s for location in LOCATIONS for kind in ("ray", "worker"))
    return gone and bool(quiet) and all(one.broken for one in quiet)


def _take_back(
    made: Lab, clients: Clients, everywhere: bool, say: Callable[[str], None]
) -> list[tuple[str, float | None]]:
    """Bring the head back, and Ray everywhere if so; when which step was done, None if it never was."""
    steps: list[tuple[str, float | None]] = []
    if not made.host(HEAD).processes():
        made.host(HEAD).boot()
        steps.append(("host booted", time.monotonic()))
    made.start_ray(HEAD)
    steps.append(("Ray on the head started", time.monotonic()))
    if everywhere:
        for location in LOCATIONS:
            made.stop_ray(location)
            made.start_ray(location)
        steps.append(("Ray on all others stopped and started", time.monotonic()))
        made.deploy()
        steps.append(("locations deployed", time.monotonic()))
    after_s = time.monotonic()
    for what, is_true in (
        ("hits at all locations", lambda: all(clients.first_hit_s(name, after_s) for name in LOCATIONS)),
        ("the head answers, all see the cluster as it is", made.is_consistent),
    ):
        say(f"until {what}")
        try:
            until(what, is_true, _RECOVERY_S)
            steps.append((what, time.monotonic()))
        except LabError:
            steps.append((what, None))
    return steps


def _replaced_s(made: Lab, clients: Clients) -> float | None:
    victim = LOCATIONS[0]
    title = _WORKER.format(victim)
    killed, killed_s = set(made.pids(victim, title)), time.monotonic()
    for pid in killed:
        os.kill(pid, signal.SIGKILL)
    try:
        until("a new worker", lambda: bool(set(made.pids(victim, title)) - killed), _RECOVERY_S)
        new_s = time.monotonic()
        until("it answers hits", lambda: clients.first_hit_s(victim, new_s) is not None, _RECOVERY_S)
        until("all see the cluster as it is", made.is_consistent, _RECOVERY_S)
    except LabError:
        return None
    return time.monotonic() - killed_s


def _lasted(location: str, answers: Sequence[Answer], watch: Watch, began_s: float, back_s: float) -> Lasted:
    """Of what was answered while the head was away."""

    def last_s(outcomes: Sequence[str]) -> float | None:
        done = [
            one.done_s - began_s
            for one in answers
            if one.location == location and not one.broken and one.outcome in outcomes and began_s < one.done_s < back_s
        ]
        return max(done, default=None)

    def ended_s(kind: str) -> float | None:
        at_s = watch.ended_s.get((location, kind))
        return None if at_s is None else at_s - began_s

    return Lasted(
        location=location,
        hits_s=last_s(["hit"]),
        loads_s=last_s(["load", "join"]),
        forwards_s=last_s(["forward"]),
        ray_ended_s=ended_s("ray"),
        worker_ended_s=ended_s("worker"),
    )


def _slices(answers: Sequence[Answer], began_s: float, back_s: float) -> list[Slice]:
    outage_s = back_s - began_s
    edges = [edge for edge in _SLICES_S if edge < outage_s]
    named = [(f"{from_s:.0f} to {to_s:.0f} s", from_s, to_s) for from_s, to_s in pairwise([*edges, outage_s])]
    spans = [("before", -_BEFORE_S, 0.0), *named, (f"back, from {outage_s:.0f} s", outage_s, float("inf"))]
    return [
        _slice(name, location, [one for one in answers if from_s <= one.sent_s - began_s < to_s])
        for name, from_s, to_s in spans
        for location in LOCATIONS
    ]


def _slice(when: str, location: str, answers: Sequence[Answer]) -> Slice:
    here = [one for one in answers if one.location == location]
    good = [one.outcome for one in here if not one.broken]
    return Slice(
        when=when,
        location=location,
        sent=len(here),
        hits=good.count("hit"),
        loads=good.count("load") + good.count("join"),
        forwards=good.count("forward"),
        broken=sum(one.broken for one in here),
        lost=sum(one.lost for one in here),
    )


def _show(loss: Loss, out: Console) -> None:
    table = Table("since the loss", "location", "sent", "hits", "loads", "forwards", "broken", "lost")
    for row in loss.slices:
        counts = (row.sent, row.hits, row.loads, row.forwards, row.broken, row.lost)
        table.add_row(row.when, row.location, *map(str, counts), end_section=row.location == LOCATIONS[-1])
    how = "Ray stopped on the head" if loss.stopped else "head lost"
    table.title = f"{how} for {loss.outage_s:.0f} s, store: {loss.store}"
    out.print(table)
    table = Table("location", "last hit (s)", "last load", "last forward", "Ray ended", "worker ended")
    for one in loss.lasted:
        times = (one.hits_s, one.loads_s, one.forwards_s, one.ray_ended_s, one.worker_ended_s)
        table.add_row(one.location, *map(_seconds, times))
    out.print(table)
    table = Table("since the head is back", "s")
    for name, at_s in loss.steps:
        table.add_row(name, "never" if at_s is None else f"{at_s:.1f}")
    out.print(table)


def _seconds(time_s: float | None) -> str:
    return "-" if time_s is None else f"{time_s:.1f}"


@click.command(context_settings={"help_option_names": ["-h", "--help"]}, help=__doc__)
@click.option("--redis", "store", flag_value="redis", help="The head keeps what it knows in a Redis on another host.")
@click.option("--rocksdb", "store", flag_value="rocksdb", help="The head keeps what it knows on its own disk.")
@click.option("--stop", is_flag=True, help="Only stop Ray on the head, in the place of taking its power.")
@click.option("--outage", "outages_s", multiple=True, type=float, help="Seconds, with a store; by default 20 and 180.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.option("--problems", is_flag=True, help="Say what went wrong with each request that failed.")
def main(store: Store | None, stop: bool, outages_s: tuple[float, ...], as_json: bool, problems: bool) -> None:
    """Lose the head, once or several times."""
    if store == "redis" and shutil.which("redis-server") is None:
        raise click.UsageError("--redis needs redis-server, which is not on this machine")
    if store is None and outages_s:
        raise click.UsageError(
            "--outage goes with --redis or --rocksdb: without a store, the outage lasts until the end"
        )
    out = Console(stderr=as_json, width=None if sys.stdout.isatty() else 160)

    def say(said: str) -> None:
        out.print(said, style="dim")

    entry = {"weights": "random:0"}
    models = {name: {"builder": f"torchvision:{name}", **entry} for name in (*SMALL, LARGE)}
    edge = {"locations": {name: {"memory": memory, "pin_to_nodes": True} for name, memory in _MEMORY.items()}}
    losses: list[Loss] = []
    try:
        with (
            lab(LOCATIONS, models, memory=_MEMORY["paris"], edge=edge, store=store or "memory", say=say) as made,
            Clients(made, _PATHS) as clients,
        ):
            for outage_s in (None,) if store is None else outages_s or (20.0, 180.0):
                until("hits", lambda: all(clients.first_hit_s(name, 0.0) for name in LOCATIONS), _RECOVERY_S)
                until("all see the cluster as it is", made.is_consistent, _RECOVERY_S)
                threading.Event().wait(_BEFORE_S)
                say(f"the head is lost {'until nothing serves' if outage_s is None else f'for {outage_s:.0f} s'}")
                losses.append(lose(made, clients, stop=stop, outage_s=outage_s, say=say))
                if not as_json:
                    _show(losses[-1], out)
                if problems:
                    out.print("\n".join(losses[-1].problems), highlight=False)
    except (TestbedError, LabError, subprocess.SubprocessError) as error:
        raise click.ClickException(" ".join(str(error).split())) from None
    if as_json:
        click.echo(json.dumps([asdict(loss) for loss in losses], indent=2))


if __name__ == "__main__":
    main()
