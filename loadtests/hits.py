"""Hits beside the bare library that is fastest: ``python -m loadtests.hits``.

Every model of the catalog is asked over one connection, until it has gone over to its fastest form; the same module is
run without any server by torch, ONNX Runtime and OpenVINO, in float32 and with as many threads, in a process of its
own. They take turns. A request is one image as an fp32 tensor in binary, through HAProxy, router and worker. Printed
are milliseconds, and the ratios of the execution and of the whole request to the best of the bare libraries: medians
over the turns. Models are published into the store of ``deploy/edge.yaml``, where they are not there yet.
"""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import geometric_mean, median
from typing import Any

import click
import httpx
import yaml
from rich.console import Console
from rich.table import Table

from loadtests.support.local_deployment import HOST, Here, StartError, edgeserve
from loadtests.support.wire import Reply, WireError, ask_many, binary_infer, request
from serve_app.config.edge import load_edge
from serve_app.errors import EdgeServeError

_EDGE = Path("deploy/edge.yaml")
_WEIGHTS = "random:0"
_AIM, _WORST_AIM = 1.2, 1.5
#: Executions in a turn take about so long.
_TURN_S = 0.15
_MOST_IN_A_TURN = 40
#: A model is asked so often at most before it must have gone over to its fastest form.
_WARM_UP, _STABLE = 60, 8


class _Bare:
    """The process that runs one model without a server."""

    def __init__(self, builder: str, shape: Sequence[int], threads: int) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "loadtests.support.bare", builder, _WEIGHTS, json.dumps(shape), str(threads)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
        )  # fmt: skip
        self.names: list[str] = self._next_line()

    def seconds(self, name: str, count: int) -> list[float]:
        """Run a model so often by one of the libraries; return the seconds of each execution."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{name} {count}\n")
        self._process.stdin.flush()
        seconds: list[float] = self._next_line()
        return seconds

    def close(self) -> None:
        """End it."""
        self._process.kill()
        self._process.wait()

    def _next_line(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise StartError(f"the bare libraries ended with {self._process.wait()}")
        return json.loads(line)


@contextmanager
def _bare(builder: str, shape: Sequence[int], threads: int) -> Iterator[_Bare]:
    bare = _Bare(builder, shape, threads)
    try:
        yield bare
    finally:
        bare.close()


def measure(here: Here, model_id: str, builder: str, side: int, rounds: int, threads: int) -> dict[str, Any]:
    """Return the row of one model; times are medians of the rounds in milliseconds."""
    shape = (1, 3, side, side)
    body, headers = binary_infer(shape, "input")
    message = request(HOST, here.port, f"/bench/v2/models/{model_id}/infer", body, headers)

    def ask(count: int) -> list[Reply]:
        return asyncio.run(ask_many(HOST, here.port, message, count=count))

    forms = [ask(1)[0].headers["x-edgeserve-form"]]
    while len(forms) < _WARM_UP and (len(forms) < _STABLE or len(set(forms[-_STABLE:])) > 1):
        forms.append(ask(1)[0].headers["x-edgeserve-form"])
    with _bare(builder, shape, threads) as bare:
        counts = {name: _count(bare.seconds(name, 3)) for name in bare.names}
        asked = _count([reply.seconds for reply in ask(3)])
        turns: list[dict[str, float]] = []
        for turn in range(rounds):
            # In another order every time, or one of them would always run on a warmer processor.
            took = {}
            for name in [*bare.names, "hit"][:: 1 if turn % 2 else -1]:
                if name == "hit":
                    replies = ask(asked)
                    took["hit"] = median(reply.seconds for reply in replies)
                    took["exec"] = median(reply.exec_s for reply in replies)
                else:
                    took[name] = median(bare.seconds(name, counts[name]))
            turns.append(took)
    best = [min(took[name] for name in bare.names) for took in turns]
    return {
        "model": model_id,
        "form": forms[-1],
        **{name: 1000 * median(took[name] for took in turns) for name in (*bare.names, "exec", "hit")},
        "exec_ratio": median(took["exec"] / least for took, least in zip(turns, best, strict=True)),
        "hit_ratio": median(took["hit"] / least for took, least in zip(turns, best, strict=True)),
    }


def _count(seconds: Sequence[float]) -> int:
    return max(3, min(_MOST_IN_A_TURN, int(_TURN_S / median(seconds))))


def _print(rows: Sequence[dict[str, Any]]) -> None:
    console = Console(width=150)
    numbers = [name for name in ("eager", "onnxruntime", "openvino", "exec", "hit") if name in rows[0]]
    table = Table("model", "form", *(f"{name}, ms" for name in numbers), "execution / best", "request / best")
    for row in rows:
        cells = [f"{row[name]:.2f}" for name in (*numbers, "exec_ratio", "hit_ratio")]
        table.add_row(row["model"], row["form"], *cells)
    console.print(table)
    for key, what in (("exec_ratio", "execution"), ("hit_ratio", "whole request")):
        ratios = [row[key] for row in rows]
        worst = max(rows, key=lambda row: row[key])
        console.print(
            f"{what} over the best bare library: geometric mean {geometric_mean(ratios):.2f} (aim {_AIM}), "
            f"worst {worst[key]:.2f} (aim {_WORST_AIM}): {worst['model']}"
        )


@click.command(context_settings={"help_option_names": ["-h", "--help"]}, help=__doc__)
@click.option("--rounds", default=7, show_default=True, type=click.IntRange(min=3))
@click.option("--model", "wanted", multiple=True, help="Only these.  [default: all of the catalog]")
@click.option("--threads", default=1, show_default=True, help="Of one execution of the bare libraries.")
@click.option("--memory", default="3GiB", show_default=True, help="Of the location.")
@click.option("--json", "file", type=click.Path(dir_okay=False, path_type=Path), help="Write the rows here.")
def main(rounds: int, wanted: Sequence[str], threads: int, memory: str, file: Path | None) -> None:
    """Measure and print."""
    say = Console(stderr=True, highlight=False)
    try:
        settings = load_edge(_EDGE)
        entries: dict[str, dict[str, Any]] = yaml.safe_load(settings.catalog.read_text())["models"]
        chosen = {name: entry for name, entry in entries.items() if not wanted or name in wanted}
        if not chosen:
            raise click.ClickException(f"{settings.catalog} has none of {', '.join(wanted)}")
        catalog = {
            name: {key: value for key, value in entry.items() if key in ("builder", "input")} | {"weights": _WEIGHTS}
            for name, entry in chosen.items()
        }
        say.print(f"publishing and compiling {len(catalog)} models, where that is not done yet", style="dim")
        rows = []
        with edgeserve(catalog, {"bench": {"memory": memory}}, store=settings.store) as here:
            sides = _sides(here, list(catalog))
            for name, entry in catalog.items():
                rows.append(measure(here, name, entry["builder"], sides[name], rounds, threads))
                row = rows[-1]
                say.print(f"{name}: {row['form']}, {row['exec_ratio']:.2f}, {row['hit_ratio']:.2f}", style="dim")
    except (StartError, WireError, EdgeServeError) as error:
        raise click.ClickException(str(error)) from None
    _print(rows)
    if file is not None:
        file.write_text(json.dumps(rows, indent=1))


def _sides(here: Here, model_ids: Sequence[str]) -> dict[str, int]:
    """Return the pixels of the images that models take."""
    with httpx.Client(trust_env=False) as http:
        found = {}
        for model_id in model_ids:
            metadata = http.get(f"http://{HOST}:{here.port}/bench/v2/models/{model_id}").json()
            found[model_id] = int(metadata["inputs"][0]["shape"][-1])
    return found


if __name__ == "__main__":
    main()
