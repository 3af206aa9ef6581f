"""What loads do to hits on other models: ``python -m loadtests.isolation``.

One location with memory for the whole catalog. Connections keep asking for four small models that are in memory, each
at its own pace, or as fast as they are answered (``--period 0``). Windows take turns: nothing else happens; cold
models are loaded by hand, one after another; cold models are asked for, one after another, so that each is loaded and
run. A cold model is not in memory, and its weights are not in the kernel's page cache. Printed are the 50th and 99th
percentile of the hits, and the 99th over that of the undisturbed window of the same round, and of all rounds together.
Models are taken from the store of `edgeserve up`, and published there where they are missing.
"""

from __future__ import annotations

import asyncio
import json
import os
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median, quantiles
from typing import Any, Literal, get_args

import click
import yaml
from rich.console import Console
from rich.table import Table

from loadtests.support.local_deployment import HOST, ROOT, StartError, edgeserve
from loadtests.support.wire import Connection, Reply, WireError, binary_infer, connect, request
from serve_app.config.edge import load_edge
from serve_app.store.model_store import ModelStore

LOCATION = "bench"
HOT = ("squeezenet1_1", "shufflenet_v2_x0_5", "mnasnet0_5", "mobilenet_v3_small")
#: Loads by hand bring a model into memory and do not run it.
Window = Literal["undisturbed", "loads", "requests"]
WINDOWS: tuple[Window, ...] = get_args(Window)
#: What the worker holds on its own would be a load that was not asked for.
_EDGE = {
    "policy": {"name": "lru"},
    "coordinator": {"placement_every": "off"},
}


class Bench:
    """The clients of one EdgeServe."""

    def __init__(self, port: int, store: ModelStore, models: Sequence[str], connections: int, period_s: float) -> None:
        self._port = port
        self._store = store
        self._cold = [model for model in models if model not in HOT]
        self._connections = connections
        self._period_s = period_s

    async def window(self, window: Window, seconds: float) -> tuple[list[float], int]:
        """Seconds of every hit in a window, and how many cold models came meanwhile."""
        for model in self._cold:
            await self._post(f"/v2/repository/models/{model}/unload", b"", {}, missing=True)
            self._drop_pages(model)
        until_s = time.monotonic() + seconds
        disturbing = asyncio.create_task(self._disturb(window, until_s))
        asked = await asyncio.gather(*(self._ask_in_turn(number, until_s) for number in range(self._connections)))
        return [reply.seconds for replies in asked for reply in replies], await disturbing

    async def warm_up(self) -> None:
        """Bring the models in that are to be hit."""
        for model in HOT * 3:
            await self._post(*self._infer(model))

    async def _ask_in_turn(self, number: int, until_s: float) -> list[Reply]:
        messages = [
            request(HOST, self._port, f"/{LOCATION}{path}", body, headers)
            for path, body, headers in map(self._infer, HOT)
        ]
        replies: list[Reply] = []
        connection = await connect(HOST, self._port)
        due_s = time.monotonic() + self._period_s * number / self._connections
        try:
            while (now := time.monotonic()) < until_s:
                await asyncio.sleep(max(0.0, due_s - now))
                reply = await connection.ask(messages[(number + len(replies)) % len(HOT)])
                _require_ok(reply)
                replies.append(reply)
                due_s = max(due_s + self._period_s, time.monotonic())
        finally:
            connection.close()
        return replies

    async def _disturb(self, window: Window, until_s: float) -> int:
        came = 0
        if window == "undisturbed":
            return came
        for model in self._cold:
            if time.monotonic() >= until_s:
                break
            if window == "loads":
                await self._post(f"/v2/repository/models/{model}/load", b"", {})
            else:
                await self._post(*self._infer(model))
            came += 1
        return came

    def _infer(self, model: str) -> tuple[str, bytes, dict[str, str]]:
        spec = self._store.manifest(model).model.inputs[0]
        body, headers = binary_infer((1, *spec.shape[1:]), spec.name)
        return f"/v2/models/{model}/infer", body, headers

    async def _post(self, path: str, body: bytes, headers: dict[str, str], *, missing: bool = False) -> None:
        connection: Connection = await connect(HOST, self._port)
        try:
            reply = await connection.ask(request(HOST, self._port, f"/{LOCATION}{path}", body, headers))
        finally:
            connection.close()
        if not (missing and reply.status == 404):
            _require_ok(reply)

    def _drop_pages(self, model: str) -> None:
        for file in self._store.manifest(model).files:
            with self._store.blob_path(file.name).open("rb") as blob:
                os.posix_fadvise(blob.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def measure(bench: Bench, rounds: int, seconds: float) -> tuple[list[dict[str, Any]], dict[Window, float]]:
    """One row for each round and window, and the ratio of the 99th percentiles of all rounds together."""
    asyncio.run(bench.warm_up())
    rows = []
    every: dict[Window, list[float]] = {window: [] for window in WINDOWS}
    for turn in range(rounds):
        # The order changes, or drift of the machine would always count against the same.
        for window in WINDOWS if turn % 2 == 0 else tuple(reversed(WINDOWS)):
            hits, came = asyncio.run(bench.window(window, seconds))
            every[window] += hits
            cuts = quantiles(hits, n=100)
            row = {"round": turn, "window": window, "hits": len(hits), "cold_models": came}
            rows.append(row | {"p50_ms": cuts[49] * 1000, "p99_ms": cuts[98] * 1000, "max_ms": max(hits) * 1000})
    p99s = {window: quantiles(hits, n=100)[98] for window, hits in every.items()}
    return rows, {window: p99_s / p99s["undisturbed"] for window, p99_s in p99s.items() if window != "undisturbed"}


def ratios(rows: Sequence[dict[str, Any]], window: Window) -> list[float]:
    """The 99th percentile over that of the undisturbed window, round by round."""
    of = {(row["window"], row["round"]): row["p99_ms"] for row in rows}
    return [value / of["undisturbed", turn] for (name, turn), value in of.items() if name == window]


def _require_ok(reply: Reply) -> None:
    if reply.status != 200:
        raise WireError(f"answered {reply.status}: {reply.body[:200].decode(errors='replace')}")


def _spread(values: Sequence[float], digits: int = 1) -> str:
    return " / ".join(f"{value:.{digits}f}" for value in (min(values), median(values), max(values)))


def _print(rows: Sequence[dict[str, Any]], pooled: dict[Window, float]) -> None:
    table = Table(title="hits in milliseconds, and ratios: least / median / most of the rounds")
    for title in ("window", "hits", "cold models", "p50", "p99", "slowest", "p99 / undisturbed"):
        table.add_column(title)
    for window in WINDOWS:
        mine = [row for row in rows if row["window"] == window]
        cells = [_spread([row[column] for row in mine]) for column in ("p50_ms", "p99_ms", "max_ms")]
        counts = [str(sum(row[column] for row in mine)) for column in ("hits", "cold_models")]
        table.add_row(window, *counts, *cells, "" if window == "undisturbed" else _spread(ratios(rows, window), 2))
    console = Console(width=140)
    console.print(table)
    for window, ratio in pooled.items():
        console.print(f"{window}: p99 of all rounds together over undisturbed {ratio:.2f}")


@click.command(context_settings={"help_option_names": ["-h", "--help"]}, help=__doc__)
@click.option("--rounds", default=5, show_default=True, type=click.IntRange(min=2))
@click.option("--seconds", default=5.0, show_default=True, type=click.FloatRange(min=1), help="Of each window.")
@click.option("--connections", default=16, show_default=True, type=click.IntRange(min=1))
@click.option("--period", default=0.25, show_default=True, type=click.FloatRange(min=0), help="Seconds; 0: no pause.")
@click.option("--json", "file", type=click.Path(dir_okay=False, path_type=Path), help="Write the rows and ratios here.")
def main(rounds: int, seconds: float, connections: int, period: float, file: Path | None) -> None:
    """Measure and print."""
    say = Console(stderr=True)
    models = yaml.safe_load((ROOT / "deploy" / "catalog.yaml").read_text())["models"]
    store = load_edge(ROOT / "deploy" / "edge.yaml").store
    try:
        say.print("starting EdgeServe", style="dim")
        with edgeserve(models, {LOCATION: {"memory": "6GiB"}}, edge=_EDGE, store=store) as here:
            say.print(f"measuring {rounds} rounds", style="dim")
            rows, pooled = measure(
                Bench(here.port, ModelStore(store), list(models), connections, period), rounds, seconds
            )
    except (StartError, WireError) as error:
        raise click.ClickException(str(error)) from None
    _print(rows, pooled)
    if file is not None:
        compared = {window: ratios(rows, window) for window in WINDOWS if window != "undisturbed"}
        file.write_text(json.dumps({"rows": rows, "ratios": compared, "pooled": pooled}, indent=2))


if __name__ == "__main__":
    main()
