"""EdgeServe beside Ray Serve's model multiplexing and MLServer: ``python -m loadtests.compare``.

All sides have the same models with the same weights, the same memory, the same image, prepared by the same code, and
get the same requests on the same machine: deployed at the same time, they take turns, in another order in every repeat.
They run one inference with one thread, and have one replica.

\b
edgeserve            one location, as `edgeserve up` deploys it
edgeserve-mapped     the same without compiled forms: torch runs every model eagerly, on mapped weights
multiplexed          @serve.multiplexed as its documentation shows it, with Serve's default proxy
multiplexed-haproxy  the same with HAProxy and throughput mode, which EdgeServe uses, too
multiplexed-tuned    the same, but loads and runs models in two threads, as EdgeServe does, and unpickles whole modules
mlserver             MLServer 1.7, whose models a client loads and unloads within memory, least recently used first

A load delay is what a request waited for a load, as its side reports it, and what its execution and its queue then
took longer than those of hits; the mean is over all requests. A miss is a request whose model was not in memory.

The first run publishes and saves the models (6 GB in the cache folder) and installs MLServer, which is not measured.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
from rich.console import Console

from loadtests.compare.processes import SideFailed
from loadtests.compare.report import Result, as_json, show
from loadtests.compare.run import Load, run
from loadtests.compare.sides import OURS, SIDES, TUNED
from loadtests.compare.stream import Stream
from loadtests.compare.zoo import SETTINGS, prepare
from serve_app.errors import EdgeServeError
from serve_app.workload.spec import parse_trace

_REQUESTS = 20_000
_WIDTH = 130


@click.command(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110}, help=__doc__)
@click.option("--setting", "settings", multiple=True, type=click.Choice(list(SETTINGS)), help="Default: all of them.")
@click.option("--side", "sides", multiple=True, type=click.Choice(list(SIDES)), help="Beside edgeserve; default: all.")
@click.option("--quick", is_flag=True, help="Two short repeats of the setting small.")
@click.option("--share", type=click.FloatRange(0, 1, min_open=True), default=0.25, show_default=True, help="Memory.")
@click.option("--repeats", type=click.IntRange(1), default=3, show_default=True)
@click.option("--connections", type=click.IntRange(1), default=4, show_default=True, help="Of the closed loop.")
@click.option("--closed-seconds", type=click.FloatRange(0.5), default=4.0, show_default=True)
@click.option("--open-seconds", type=click.FloatRange(0.5), default=8.0, show_default=True)
@click.option(
    "--rate",
    type=click.FloatRange(0, min_open=True),
    help="Requests per second of the open loop; default: half of what the slowest side has served in the closed loop.",
)
@click.option("--trace", help="As `edgeserve simulate` takes it; default: Zipf's law, Poisson arrivals.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of the requests.")
@click.option("--cache", type=click.Path(path_type=Path), help="Default: ~/.cache/edgeserve/compare.")
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Write everything that was measured.")
@click.option("--plot", "plot_file", type=click.Path(path_type=Path), help="Draw a picture (PNG).")
def main(
    settings: Sequence[str],
    sides: Sequence[str],
    quick: bool,
    share: float,
    repeats: int,
    connections: int,
    closed_seconds: float,
    open_seconds: float,
    rate: float | None,
    trace: str | None,
    seed: int,
    cache: Path | None,
    json_file: Path | None,
    plot_file: Path | None,
) -> None:
    """Measure every setting and print the tables."""
    began_s = time.monotonic()
    err, out = Console(stderr=True, highlight=False), Console(highlight=False, width=_WIDTH)

    def say(message: str) -> None:
        err.print(f"{time.monotonic() - began_s:5.0f} s  {message}", style="dim")

    load = Load(repeats=repeats, connections=connections, closed_s=closed_seconds, open_s=open_seconds, rate_per_s=rate)
    if quick:
        load = replace(load, repeats=2, closed_s=3.0, open_s=6.0)
    chosen = [name for name in SIDES if name == OURS or not sides or name in sides]
    folder = (cache or _default_cache()).expanduser().absolute()
    results = []
    try:
        _require_writable(json_file, plot_file)
        for name in settings or (["small"] if quick else SETTINGS):
            zoo = prepare(SETTINGS[name], folder, share=share, whole=TUNED in chosen, say=say)
            spec = trace or f"zipf:models={len(zoo.sizes)}&requests={_REQUESTS}"
            stream = Stream(parse_trace(spec, seed=seed), list(zoo.sizes), repeats=load.repeats, seed=seed)
            results.append(Result(zoo=zoo, load=load, outcome=run(zoo, chosen, stream, load, say)))
            show(results[-1], out)
        if json_file is not None:
            content = {"machine": _machine(), "trace": trace, "seed": seed, "results": [*map(as_json, results)]}
            json_file.write_text(json.dumps(content, indent=1))
        if plot_file is not None:
            # It takes a second to import, and most runs draw nothing.
            from loadtests.compare.plot import plot

            plot(results, plot_file)
    except (SideFailed, EdgeServeError, ValueError, OSError) as error:
        raise click.ClickException(" ".join(str(error).split())) from None
    except KeyboardInterrupt:
        raise click.ClickException("interrupted") from None


def _require_writable(*files: Path | None) -> None:
    """Say now, and not after minutes, that results cannot be kept."""
    for file in files:
        if file is not None and not os.access(file if file.exists() else file.absolute().parent, os.W_OK):
            raise SideFailed(f"{file} cannot be written")


def _default_cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "edgeserve" / "compare"


def _machine() -> dict[str, Any]:
    return {"cores": len(os.sched_getaffinity(0)), "python": sys.version.split()[0], "load": os.getloadavg()}


if __name__ == "__main__":
    main()
