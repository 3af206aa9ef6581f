"""What users notice when parts of a cluster break: ``python -m loadtests.faults``.

Starts a cluster of a head and three locations on hosts of its own (``loadtests.testbed``; needs root), keeps requests
coming at every location, and breaks one thing after the other. Clients are as those of any service with several
addresses: a request that fails, or is not answered within 5 s, is tried once more at another location. For each fault
the table says

    requests   sent while it was broken and until all was well again
    broken     of these, failed at the first address; who has no other address sees these
    lost       failed at the second address as well
    back       until the location that was hit answered hits at its own address again, s
    directory  until all hosts saw the cluster as it is, s
    bytes      whether every worker's books added up in the end, with nothing left pinned

A fault that nothing recovers from by itself (a lost host) is mended by hand after a while; ``back`` counts from there.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from io import BytesIO
from pathlib import Path

import click
import httpx
from PIL import Image
from rich.console import Console
from rich.table import Table

from loadtests.support.clients import Clients
from loadtests.support.testbed_cluster import HEAD, Lab, LabError, executable, lab, until
from loadtests.testbed.machine import TestbedError
from serve_app.store.model_store import ModelStore

LOCATIONS = ("paris", "tokyo", "virginia")
VICTIM = "paris"
MODELS = ("squeezenet1_1", "shufflenet_v2_x0_5", "mobilenet_v3_small", "mnasnet0_5", "shufflenet_v2_x1_0")
#: Room for three of the five.
_MEMORY = "45MiB"
_SETTLED_S = 2.0
_RECOVERY_S = 120.0
_BROKEN_S = 8.0
_HOUR_S = 3600.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One line of the table."""

    fault: str
    requests: int
    broken: int
    lost: int
    back_s: float | None
    directory_s: float | None
    bytes_exact: bool
    note: str = ""
    problems: Sequence[str] = field(default_factory=tuple)


@dataclass(frozen=True, slots=True)
class Fault:
    """One thing to break. ``strike`` breaks it; ``mend``, where it does not heal by itself, is called a while later."""

    name: str
    strike: Callable[[Lab], str | None]
    mend: Callable[[Lab], None] | None = None
    broken_s: float = _BROKEN_S
    takes_coordinator: bool = False


def _kill(title: str, host: str = VICTIM, number: int = signal.SIGKILL) -> Callable[[Lab], None]:
    def strike(made: Lab) -> None:
        pids = made.pids(host, title)
        if not pids:
            raise LabError(f"nothing called {title} runs at {host}")
        for pid in pids:
            os.kill(pid, number)

    return strike


def _haproxy(made: Lab) -> None:
    pids = [pid for pid in made.host(VICTIM).processes() if "haproxy" in executable(pid)]
    if not pids:
        raise LabError(f"no HAProxy runs at {VICTIM}")
    for pid in pids:
        os.kill(pid, signal.SIGKILL)


def _raylet(made: Lab) -> None:
    for pid in made.raylets(VICTIM):
        os.kill(pid, signal.SIGKILL)


def _restart_ray(made: Lab) -> None:
    # What the dead raylet has left would keep the ports.
    made.stop_ray(VICTIM)
    made.start_ray(VICTIM)


def _boot(made: Lab) -> None:
    made.host(VICTIM).boot()
    made.start_ray(VICTIM)


def _stop_worker(made: Lab) -> None:
    _kill(f"ray::ServeReplica:{VICTIM}:Worker", number=signal.SIGSTOP)(made)


def _continue_worker(made: Lab) -> None:
    # By now Serve may have replaced it.
    for pid in made.pids(VICTIM, f"ray::ServeReplica:{VICTIM}:Worker"):
        os.kill(pid, signal.SIGCONT)


def _unload(made: Lab, model: str) -> None:
    httpx.post(f"{made.url(VICTIM)}/v2/repository/models/{model}/unload", timeout=10.0)


def _blob(made: Lab, model: str) -> Path:
    names = [file.name for file in ModelStore(made.models(VICTIM)).manifest(model).files]
    return next(path for name in names for path in made.models(VICTIM).rglob(name))


@contextmanager
def _broken_file(made: Lab, model: str) -> Iterator[Path]:
    blob = _blob(made, model)
    aside = blob.with_suffix(".aside")
    blob.rename(aside)
    try:
        yield blob
    finally:
        blob.unlink(missing_ok=True)
        aside.rename(blob)


def _file(damage: Callable[[Path, Path], None]) -> Callable[[Lab], str]:
    """Damage the weights of a model at one host, ask for it, and say what the user is told."""

    def strike(made: Lab) -> str:
        model = MODELS[4]
        _unload(made, model)
        with _broken_file(made, model) as blob:
            damage(blob.with_suffix(".aside"), blob)
            answers = []
            for query in ("", "&forward=never"):
                url = f"{made.url(VICTIM)}/v1/classify?model={model}{query}"
                answer = httpx.post(url, content=_photo(), headers={"Content-Type": "image/jpeg"}, timeout=30.0)
                where = answer.headers.get("X-EdgeServe-Location", "")
                answers.append(f"{answer.status_code} {where or answer.json().get('error', '')[:90]}")
            return f"asked: {answers[0]}; kept here: {answers[1]}"

    return strike


def _photo() -> bytes:
    file = BytesIO()
    Image.new("RGB", (224, 224)).save(file, "JPEG")
    return file.getvalue()


def _corrupt(good: Path, bad: Path) -> None:
    content = bytearray(good.read_bytes())
    content[0:64] = bytes(64)
    bad.write_bytes(content)


def _truncate(good: Path, bad: Path) -> None:
    bad.write_bytes(good.read_bytes()[: good.stat().st_size // 2])


def _full_disk(made: Lab) -> str:
    """Publish into a store on a disk of 8 MB, beside the one that serves."""
    place = f"{made.testbed.home}/full"
    script = (
        f"mkdir -p {place} && mount -t tmpfs -o size=8m tmpfs {place} && "
        f"EDGESERVE_STORE={place}/store {sys.executable} -m serve_app publish --edge {made.folder}/edge.yaml; "
        f"code=$?; ls -A {place}/store/tmp 2>/dev/null | head -3; umount {place}; exit $code"
    )
    variables = [f"{name}={value}" for name, value in made.environment().items()]
    done = made.host(VICTIM).run("env", *variables, "sh", "-c", script, timeout_s=120.0, check=False)
    return f"rc {done.returncode}: {' '.join(done.stderr.split())[-140:]}"


def _step_clock(made: Lab) -> str:
    """All hosts share the machine's clock, so all of them step, and so does the machine."""
    real_s, steady_s = time.time(), time.monotonic()
    time.clock_settime(time.CLOCK_REALTIME, real_s + _HOUR_S)
    try:
        time.sleep(_BROKEN_S)
    finally:
        time.clock_settime(time.CLOCK_REALTIME, real_s + time.monotonic() - steady_s)
    return "an hour forward, and back"


_REPLICA = "ray::ServeReplica"
FAULTS = (
    Fault("kill -9 worker", _kill(f"{_REPLICA}:{VICTIM}:Worker")),
    Fault("kill -9 router", _kill(f"{_REPLICA}:{VICTIM}:Router")),
    Fault("kill -9 coordinator", _kill("ray::Coordinator", HEAD), takes_coordinator=True),
    Fault("kill -9 HAProxy", _haproxy),
    Fault("worker hangs", _stop_worker, _continue_worker, 10.0),
    Fault("kill -9 raylet", _raylet, _restart_ray, 15.0),
    Fault("host lost", lambda made: made.host(VICTIM).kill(), _boot, 15.0),
    Fault("host cut off", lambda made: made.host(VICTIM).cut(), lambda made: made.host(VICTIM).heal(), 8.0),
    Fault("weights corrupt", _file(_corrupt)),
    Fault("weights truncated", _file(_truncate)),
    Fault("weights missing", _file(lambda good, bad: None)),
    Fault("disk full at publish", _full_disk),
    Fault("clock steps an hour", _step_clock),
)


def run(fault: Fault, made: Lab, clients: Clients) -> Row:
    """Break one thing, wait until all is well, and look at what happened meanwhile."""
    replicas = {name: set(made.pids(name, _REPLICA)) for name in LOCATIONS}
    epoch = made.status()["coordinator"]["epoch"] if fault.takes_coordinator else ""
    began_s = mended_s = time.monotonic()
    note = fault.strike(made) or ""
    if fault.mend is not None:
        threading.Event().wait(fault.broken_s)
        fault.mend(made)
        mended_s = time.monotonic()
    back_s = directory_s = None
    try:
        until(f"{VICTIM} answers hits", lambda: clients.first_hit_s(VICTIM, mended_s) is not None, _RECOVERY_S)
        back_s = (clients.first_hit_s(VICTIM, mended_s) or 0.0) - mended_s
        until("all see the cluster as it is", lambda: made.is_consistent(after_epoch=epoch), _RECOVERY_S)
        directory_s = time.monotonic() - mended_s
    except LabError as error:
        note = f"{note} {error}".strip()
    threading.Event().wait(_SETTLED_S)
    answers = clients.since(began_s) + [one for one in clients.under_way(began_s) if one.sent_s < began_s]
    broken = [one for one in answers if one.broken]
    lost = [one for one in broken if one.lost]
    restarted = [name for name in LOCATIONS if set(made.pids(name, _REPLICA)) != replicas[name]]
    if restarted:
        note = f"{note} new processes: {', '.join(restarted)}".strip()
    return Row(
        fault=fault.name,
        requests=len(answers),
        broken=len(broken),
        lost=len(lost),
        back_s=back_s,
        directory_s=directory_s,
        bytes_exact=_books_add_up(made),
        note=note,
        problems=tuple(f"{one.sent_s - began_s:.2f} s, {one.location}: {one.problem}"[:400] for one in broken),
    )


def _books_add_up(made: Lab) -> bool:
    """Whether used bytes are the sum of what is resident, within capacity, and nothing is left in use for ever."""

    def exact() -> bool:
        status = made.status()
        return all(
            row["used_bytes"] == sum(model["bytes"] for model in row["resident"]) <= row["capacity_bytes"]
            for row in (status[name] for name in LOCATIONS)
        )

    try:
        until("the books add up", exact, 10.0)
    except (LabError, httpx.HTTPError):
        return False
    return True


def _show(rows: Sequence[Row], out: Console) -> None:
    table = Table("fault", "requests", "broken", "lost", "back (s)", "directory (s)", "bytes", "note")
    for row in rows:
        table.add_row(
            row.fault,
            str(row.requests),
            str(row.broken),
            str(row.lost),
            "-" if row.back_s is None else f"{row.back_s:.1f}",
            "-" if row.directory_s is None else f"{row.directory_s:.1f}",
            "exact" if row.bytes_exact else "WRONG",
            row.note,
        )
    out.print(table)


@click.command(context_settings={"help_option_names": ["-h", "--help"]}, help=__doc__)
@click.option("--only", multiple=True, help="Part of the name of a fault; repeat for several.")
@click.option("--step-clock", is_flag=True, help="Also step the clock of this machine, which all that runs here sees.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.option("--problems", is_flag=True, help="Say what went wrong with each request that failed.")
def main(only: tuple[str, ...], step_clock: bool, as_json: bool, problems: bool) -> None:
    """Run all faults, one after the other."""
    out = Console(stderr=as_json, width=None if sys.stdout.isatty() else 160)
    faults = [fault for fault in FAULTS if not only or any(part in fault.name for part in only)]
    if not step_clock:
        faults = [fault for fault in faults if fault.strike is not _step_clock]
    entry = {"weights": "random:0", "family": "imagenet"}
    models = {name: {"builder": f"torchvision:{name}", **entry} for name in MODELS}
    rows: list[Row] = []
    try:
        with lab(LOCATIONS, models, memory=_MEMORY, say=lambda said: out.print(said, style="dim")) as made:
            with Clients(made, [f"/v1/classify?model={name}" for name in MODELS[:3]]) as clients:
                for location in LOCATIONS:
                    until(f"{location} answers", lambda at=location: clients.first_hit_s(at, 0.0) is not None, 60.0)  # type: ignore[misc]
                for fault in faults:
                    out.print(f"{fault.name} ...", style="dim")
                    rows.append(run(fault, made, clients))
                    out.print(f"  {asdict(rows[-1])}" if problems else f"  {rows[-1].lost} lost", style="dim")
            out.print("no clients any more", style="dim")
            until("nothing is in use", lambda: _nothing_in_use(made), 30.0)
    except (TestbedError, LabError, subprocess.SubprocessError) as error:
        raise click.ClickException(" ".join(str(error).split())) from None
    if as_json:
        click.echo(json.dumps([asdict(row) for row in rows], indent=2))
    else:
        _show(rows, out)


def _nothing_in_use(made: Lab) -> bool:
    status = made.status()
    return not any(model["in_use"] for name in LOCATIONS for model in status[name]["resident"])


if __name__ == "__main__":
    main()
