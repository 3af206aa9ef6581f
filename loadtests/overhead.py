"""What serving adds to an execution: ``python -m loadtests.overhead``.

A trivial model behind EdgeServe, MLServer 1.7 and Ray Serve as it is by default, asked by the same client over one
keep-alive connection, in rounds that take turns. The payloads are one fp32 image of 224x224 (602 kB) and a tensor of
192 bytes. Overhead is the time of a request less what the server says it spent executing (`Server-Timing`); the others
do not say, their model is a slice of an array. Printed are medians in milliseconds, and ours over theirs in each round.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
from collections.abc import Sequence
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from loadtests.support.contenders import Contender, Shape, default_serve, mlserver, ours
from loadtests.support.local_deployment import HOST, StartError, edgeserve
from loadtests.support.wire import Reply, WireError, ask_many

IMAGE: Shape = (1, 3, 224, 224)
TINY: Shape = (1, 3, 4, 4)
_NAMES: dict[Shape, str] = {IMAGE: "602 kB", TINY: "192 B"}
_MANY = 16
_WARM_UP = 50


def catalog() -> dict[str, dict[str, Any]]:
    """The same trivial model for images of either size."""
    return {
        f"tiny{shape[-1]}": {
            "builder": "loadtests.support.tiny:first_ten",
            "weights": "random:0",
            "input": {"resize_px": shape[-1], "crop_px": shape[-1]},
        }
        for shape in (IMAGE, TINY)
    }


def measure(contenders: Sequence[Contender], rounds: int, count: int) -> list[dict[str, Any]]:
    """One row for each round, payload, number of connections and contender."""
    rows = []
    for turn in range(-1, rounds):
        # Round -1 warms up. Then the order changes, or whoever comes first would have it easier each time.
        order = list(contenders) if turn % 2 else list(reversed(contenders))
        for shape in (IMAGE, TINY):
            for connections in (1, _MANY):
                for contender in order:
                    each = _WARM_UP if turn < 0 else math.ceil(count / connections)
                    message = contender.requests[shape]
                    replies = asyncio.run(ask_many(HOST, contender.port, message, count=each, connections=connections))
                    if turn >= 0:
                        rows.append(_row(turn, shape, connections, contender.name, replies))
    return rows


def _row(turn: int, shape: Shape, connections: int, name: str, replies: Sequence[Reply]) -> dict[str, Any]:
    overheads = [(reply.seconds - reply.exec_s) * 1000 for reply in replies]
    return {
        "round": turn,
        "payload": _NAMES[shape],
        "connections": connections,
        "server": name,
        "http_p50_ms": median(reply.seconds for reply in replies) * 1000,
        "overhead_p50_ms": median(overheads),
        "overhead_p99_ms": quantiles(overheads, n=100)[98],
    }


def ratios(rows: Sequence[dict[str, Any]], against: str, payload: str, connections: int) -> list[float]:
    """Our overhead over that of another server, round by round."""
    of = {
        (row["server"], row["round"]): row["overhead_p50_ms"]
        for row in rows
        if row["payload"] == payload and row["connections"] == connections
    }
    return [value / of[against, turn] for (server, turn), value in of.items() if server == "edgeserve"]


def _spread(values: Sequence[float], digits: int = 2) -> str:
    return " / ".join(f"{value:.{digits}f}" for value in (min(values), median(values), max(values)))


def _print(rows: Sequence[dict[str, Any]]) -> None:
    servers = list(dict.fromkeys(row["server"] for row in rows))
    table = Table(title="milliseconds and ratios, least / median / most of the rounds")
    for title in ("payload", "connections", "server", "HTTP p50", "less execution", "p99 of it", "ours / theirs"):
        table.add_column(title)
    for payload in _NAMES.values():
        for connections in (1, _MANY):
            for server in servers:
                mine = [
                    row
                    for row in rows
                    if (row["payload"], row["connections"], row["server"]) == (payload, connections, server)
                ]
                columns = ("http_p50_ms", "overhead_p50_ms", "overhead_p99_ms")
                cells = [_spread([row[column] for row in mine]) for column in columns]
                ratio = "" if server == "edgeserve" else _spread(ratios(rows, server, payload, connections))
                table.add_row(payload, str(connections), server, *cells, ratio)
    Console(width=140).print(table)


@click.command(context_settings={"help_option_names": ["-h", "--help"]}, help=__doc__)
@click.option("--rounds", default=5, show_default=True, type=click.IntRange(min=2))
@click.option("--requests", "count", default=300, show_default=True, type=click.IntRange(min=64), help="Of each round.")
@click.option("--only-ours", is_flag=True, help="Start nothing but EdgeServe.")
@click.option("--json", "file", type=click.Path(dir_okay=False, path_type=Path), help="Write the rows and ratios here.")
def main(rounds: int, count: int, only_ours: bool, file: Path | None) -> None:
    """Measure and print."""
    say = Console(stderr=True)
    try:
        with contextlib.ExitStack() as stack:
            contenders = []
            if not only_ours:
                say.print("starting MLServer and Ray Serve", style="dim")
                contenders += [stack.enter_context(start((IMAGE, TINY))) for start in (mlserver, default_serve)]
            say.print("starting EdgeServe", style="dim")
            here = stack.enter_context(edgeserve(catalog(), {"bench": {"memory": "64MiB"}}))
            paths = {shape: f"/bench/v2/models/tiny{shape[-1]}" for shape in (IMAGE, TINY)}
            contenders.append(ours(here.port, paths))
            say.print(f"measuring {rounds} rounds", style="dim")
            rows = measure(contenders, rounds, count)
    except (StartError, WireError) as error:
        raise click.ClickException(str(error)) from None
    _print(rows)
    if file is not None:
        compared = [
            {"payload": payload, "connections": connections, "against": other,
             "ratios": ratios(rows, other, payload, connections)}
            for payload in _NAMES.values()
            for connections in (1, _MANY)
            for other in ("mlserver", "default serve")
            if not only_ours
        ]  # fmt: skip
        file.write_text(json.dumps({"rows": rows, "ratios": compared}, indent=2))


if __name__ == "__main__":
    main()
