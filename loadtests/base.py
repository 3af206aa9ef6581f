"""What a location takes before any model: ``python -m loadtests.base``.

The same deployment on this machine with one location more each time, its models published and none in memory. Printed
is what every process of it takes: proportional memory (PSS: pages that several processes map count in parts), and
private dirty memory, which nothing shares. The last column is what each further location adds to all processes
together.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import psutil
from rich.console import Console
from rich.table import Table

from loadtests.support.local_deployment import StartError, edgeserve

_MB = 1e6
#: Until what is started late, such as threads and reports, has taken its memory.
_SETTLE_S = 5.0


@dataclass(frozen=True, slots=True)
class Usage:
    """Memory of one process or of several, in bytes."""

    pss: int = 0
    private_dirty: int = 0
    processes: int = 0

    def __add__(self, other: Usage) -> Usage:
        return Usage(self.pss + other.pss, self.private_dirty + other.private_dirty, self.processes + other.processes)


def usage(pid: int) -> Usage:
    """What one process takes, as the kernel counts it; raises ``OSError`` if it has ended."""
    rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
    kilobytes = dict(re.findall(r"^(\w+): +(\d+) kB$", rollup, re.MULTILINE))
    return Usage(int(kilobytes["Pss"]) * 1024, int(kilobytes["Private_Dirty"]) * 1024, 1)


def of_kinds(folder: Path) -> dict[str, Usage]:
    """What the processes take whose environment names a folder, and their children, by what they are."""
    found: dict[int, psutil.Process] = {}
    for process in psutil.process_iter():
        try:
            if str(folder) in process.environ().values():
                found |= {each.pid: each for each in (process, *process.children(recursive=True))}
        except psutil.Error:
            continue
    kinds: dict[str, Usage] = {}
    for process in found.values():
        try:
            kind = _kind(process.cmdline())
            kinds[kind] = kinds.get(kind, Usage()) + usage(process.pid)
        except (psutil.Error, OSError):
            continue
    return kinds


def _kind(command: Iterable[str]) -> str:
    title = " ".join(command)
    replica = re.match(r"ray::ServeReplica:[^:]+:(\w+)", title)
    if replica is not None:
        return replica[1].lower()
    return "the rest of Ray and Serve"


def measure(locations: int) -> dict[str, Usage]:
    """Start a deployment of so many locations, and return what its processes take; raises ``StartError``."""
    # Imports Ray and what else the other servers need.
    from loadtests.overhead import catalog

    sites = {f"site{number}": {"memory": "64MiB"} for number in range(locations)}
    with edgeserve(catalog(), sites) as here:
        time.sleep(_SETTLE_S)
        return of_kinds(here.folder)


def _print(measured: Mapping[int, Mapping[str, Usage]]) -> None:
    table = Table(title="MB, PSS / private dirty, before any model")
    table.add_column("process")
    for count in measured:
        table.add_column(f"{count} locations")
    table.add_column("added by one")
    steps = max(measured) - min(measured)
    for kind in (*measured[max(measured)], "all"):
        of = [total(kinds) if kind == "all" else kinds.get(kind, Usage()) for kinds in measured.values()]
        cells = [f"{each.pss / _MB:.0f} / {each.private_dirty / _MB:.0f}" for each in of]
        added = ((of[-1].pss - of[0].pss) / steps, (of[-1].private_dirty - of[0].private_dirty) / steps)
        table.add_row(kind, *cells, f"{added[0] / _MB:.0f} / {added[1] / _MB:.0f}")
    Console(width=120).print(table)


def total(kinds: Mapping[str, Usage]) -> Usage:
    """All processes together."""
    return sum(kinds.values(), Usage())


@click.command(context_settings={"help_option_names": ["-h", "--help"]}, help=__doc__)
@click.option("--locations", default=3, show_default=True, type=click.IntRange(min=2), help="The most; from 1 on.")
@click.option("--json", "file", type=click.Path(dir_okay=False, path_type=Path), help="Write the figures here.")
def main(locations: int, file: Path | None) -> None:
    """Measure and print."""
    say = Console(stderr=True)
    measured: dict[int, dict[str, Usage]] = {}
    try:
        for count in range(1, locations + 1):
            say.print(f"starting {count} locations", style="dim")
            measured[count] = measure(count)
    except StartError as error:
        raise click.ClickException(str(error)) from None
    _print(measured)
    if file is not None:
        content: dict[int, Any] = {
            count: {kind: [each.pss, each.private_dirty, each.processes] for kind, each in kinds.items()}
            for count, kinds in measured.items()
        }
        file.write_text(json.dumps(content, indent=2))


if __name__ == "__main__":
    main()
