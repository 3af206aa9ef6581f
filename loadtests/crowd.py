"""Crowds: ``python -m loadtests.crowd``.

Three locations on hosts of their own (``loadtests.testbed``; needs root).

**Cold requests that come together**: 50 requests at once, each for another model that nobody holds, to the locations in
turn, and then all to one of them. Printed are the loads at each location, and the most over the mean.

**A crowd on one model**, which one location holds: clients at all of them ask for nothing else. Printed is how long it
takes until every location holds a copy, and, when the crowd has gone, until only one is left.
"""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Callable, Sequence
from io import BytesIO

import click
import httpx
from PIL import Image
from rich.console import Console

from loadtests.support.testbed_cluster import HEAD, Lab, LabError, lab, until
from loadtests.testbed.machine import TestbedError

LOCATIONS = ("paris", "tokyo", "virginia")
COLD = 50
CROWDED = "crowded"
_CLIENTS = 3
_CROWD_S = 15.0
_WITHDRAW_AFTER = "5s"


def photo() -> bytes:
    """A small JPEG."""
    file = BytesIO()
    Image.new("RGB", (64, 64)).save(file, "JPEG")
    return file.getvalue()


def burst(made: Lab, at: Callable[[int], str]) -> dict[str, int]:
    """Ask for all cold models at once; how many each location has loaded for it."""
    for location in LOCATIONS:
        for number in range(COLD):
            httpx.post(f"{made.url(location)}/v2/repository/models/cold{number:02}/unload", timeout=30.0)
    until("nothing is held", lambda: not _held(made, "cold"), 30.0)
    before = _loads(made)
    content = photo()

    async def ask(http: httpx.AsyncClient, number: int) -> None:
        url = f"{made.url(at(number))}/v1/classify?model=cold{number:02}"
        (await http.post(url, content=content, headers={"Content-Type": "image/jpeg"})).raise_for_status()

    async def ask_all() -> None:
        async with httpx.AsyncClient(timeout=60.0, limits=httpx.Limits(max_connections=COLD)) as http:
            await asyncio.gather(*(ask(http, number) for number in range(COLD)))

    asyncio.run(ask_all())
    until("all loads are reported", lambda: sum(_loads(made).values()) - sum(before.values()) >= COLD, 10.0)
    after = _loads(made)
    return {location: after[location] - before[location] for location in LOCATIONS}


def crowd(made: Lab) -> tuple[float, float]:
    """Seconds until every location holds the model, and, after the crowd, until one does."""
    httpx.post(f"{made.url(LOCATIONS[0])}/v2/repository/models/{CROWDED}/load", timeout=30.0).raise_for_status()
    until("one location holds the model", lambda: len(_held(made, CROWDED)) == 1, 10.0)
    over = threading.Event()
    content = photo()

    def client(location: str) -> None:
        with httpx.Client(timeout=60.0, headers={"Content-Type": "image/jpeg"}) as http:
            while not over.is_set():
                http.post(f"{made.url(location)}/v1/classify?model={CROWDED}", content=content)

    threads = [threading.Thread(target=client, args=(location,)) for location in LOCATIONS for _ in range(_CLIENTS)]
    began_s = time.monotonic()
    for thread in threads:
        thread.start()
    try:
        spread_s = until("every location holds the model", lambda: len(_held(made, CROWDED)) == len(LOCATIONS), 30.0)
        over.wait(max(0.0, _CROWD_S - (time.monotonic() - began_s)))
    finally:
        over.set()
        for thread in threads:
            thread.join()
    return spread_s, until("one copy is left", lambda: len(_held(made, CROWDED)) == 1, 180.0)


def _held(made: Lab, prefix: str) -> Sequence[tuple[str, str]]:
    status = made.status(at=HEAD)
    return [
        (location, model["model"])
        for location in LOCATIONS
        for model in status[location]["resident"]
        if model["model"].startswith(prefix)
    ]


def _loads(made: Lab) -> dict[str, int]:
    status = made.status(at=HEAD)
    return {location: status[location]["model_loads"] for location in LOCATIONS}


@click.command(context_settings={"help_option_names": ["-h", "--help"]}, help=__doc__)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def main(as_json: bool) -> None:
    """Measure both and print them."""
    out = Console(stderr=True)
    models = {
        name: {"builder": "torchvision:squeezenet1_1", "weights": f"random:{number}"}
        for number, name in enumerate((*(f"cold{number:02}" for number in range(COLD)), CROWDED))
    }
    edge = {
        # One that loads nothing on its own: what moves is moved by requests and by placement.
        "policy": {"name": "gdsf"},
        "coordinator": {"withdraw_after": _WITHDRAW_AFTER},
    }
    try:
        with lab(LOCATIONS, models, memory="1GiB", edge=edge, say=lambda said: out.print(said, style="dim")) as made:
            spread_s, withdrawn_s = crowd(made)
            in_turn = burst(made, lambda number: LOCATIONS[number % len(LOCATIONS)])
            at_one = burst(made, lambda number: LOCATIONS[0])
    except (TestbedError, LabError, httpx.HTTPError) as error:
        raise click.ClickException(" ".join(str(error).split())) from None
    result = {
        "spread_s": spread_s,
        "withdrawn_s": withdrawn_s,
        **{
            name: {"loads": loads, "max_over_mean": max(loads.values()) * len(loads) / sum(loads.values())}
            for name, loads in (("in_turn", in_turn), ("at_one", at_one))
        },
    }
    if as_json:
        click.echo(json.dumps(result, indent=2))
        return
    console = Console()
    console.print(f"a crowd on one model: a copy at every location after {spread_s:.1f} s,")
    console.print(f"  and only one again {withdrawn_s:.1f} s after it (withdraw_after: {_WITHDRAW_AFTER})")
    for words, loads in (("to the locations in turn", in_turn), ("all to one location", at_one)):
        ratio = max(loads.values()) * len(loads) / sum(loads.values())
        console.print(f"{COLD} cold requests at once, {words}: loads {loads}, max/mean {ratio:.2f}")


if __name__ == "__main__":
    main()
