"""Whether forward-or-load follows the cheaper side: ``python -m loadtests.forwarding``.

Two locations on hosts of their own (``loadtests.testbed``; needs root). Tokyo holds all models; Paris has memory for
few, and reads them from its disk again when it needs them (``release_page_cache``). One client sends requests to Paris,
one after the other, to models drawn by Zipf's law, while the round trip between the two is set to one value after the
other. The same requests are sent three times, in turns: as the router chooses, always loaded (``forward: never``), and
always forwarded where Paris does not hold the model (``forward: prefer``). A round that does not count comes first: it
takes a few requests to know what a link or a load takes.

The last column is the mean latency of the choice over the better of the two others: 1 is as good as knowing beforehand
which of the two it will be, below 1 is better than either, because the choice is made for each request.
"""

from __future__ import annotations

import json
import random
import statistics
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field

import click
import httpx
import numpy as np
from rich.console import Console
from rich.table import Table

from loadtests.support.testbed_cluster import Lab, LabError, lab, until
from loadtests.testbed.machine import TestbedError
from serve_app.config.units import parse_duration

HERE, THERE = "paris", "tokyo"
#: From 5 to 102 MB: on a short link all are better forwarded, on a long one the small ones better loaded.
MODELS = ("squeezenet1_1", "mobilenet_v3_small", "shufflenet_v2_x1_0", "googlenet", "resnet18", "resnet50")
MODES = {"choice": "auto", "load": "never", "forward": "prefer"}
_MEMORY_HERE, _MEMORY_THERE = "130MiB", "1GiB"


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One link: mean latencies in milliseconds, what became of the requests, and the choice over the better side."""

    rtt_ms: float
    mean_ms: dict[str, float]
    outcomes: dict[str, dict[str, int]] = field(default_factory=dict)

    @property
    def ratio(self) -> float:
        """The choice over the better of the two others."""
        return self.mean_ms["choice"] / min(self.mean_ms["load"], self.mean_ms["forward"])


class Client:
    """Sends one request after the other to Paris."""

    def __init__(self, made: Lab, seed: int) -> None:
        self._url = made.url(HERE)
        self._rng = random.Random(seed)
        self._http = httpx.Client(timeout=60.0)
        self._batch = np.random.default_rng(seed).standard_normal((1, 3, 224, 224)).astype(np.float32)

    def draw(self, count: int) -> list[str]:
        """Models by Zipf's law."""
        return self._rng.choices(MODELS, [1 / rank for rank in range(1, len(MODELS) + 1)], k=count)

    def send(self, model: str, forward: str) -> tuple[float, str]:
        """Seconds until the answer, and what it was."""
        tensor = {
            "name": "input",
            "shape": list(self._batch.shape),
            "datatype": "FP32",
            "parameters": {"binary_data_size": self._batch.nbytes},
        }
        parameters = {"binary_data_output": True, "forward": forward}
        head = json.dumps({"inputs": [tensor], "parameters": parameters}).encode()
        began_s = time.monotonic()
        answer = self._http.post(
            f"{self._url}/v2/models/{model}/infer",
            content=head + self._batch.tobytes(),
            headers={
                "Inference-Header-Content-Length": str(len(head)),
                "Content-Type": "application/octet-stream",
            },
        )
        took_s = time.monotonic() - began_s
        if answer.status_code != httpx.codes.OK:
            raise LabError(f"{model}: {answer.status_code} {answer.text[:200]}")
        return took_s, answer.headers["X-EdgeServe-Outcome"]


def measure(made: Lab, client: Client, rtt_s: float, requests: int, rounds: int) -> Row:
    """One link."""
    made.testbed.delay(rtt_s, HERE, THERE)
    took_s: dict[str, list[float]] = {mode: [] for mode in MODES}
    outcomes: dict[str, Counter[str]] = {mode: Counter() for mode in MODES}
    for number in range(rounds + 1):
        models = client.draw(requests)
        for mode, forward in MODES.items():
            for model in models:
                seconds, outcome = client.send(model, forward)
                if number:
                    took_s[mode].append(seconds)
                    outcomes[mode][outcome] += 1
    return Row(
        rtt_ms=rtt_s * 1000,
        mean_ms={mode: statistics.fmean(seconds) * 1000 for mode, seconds in took_s.items()},
        outcomes={mode: dict(counted) for mode, counted in outcomes.items()},
    )


@click.command(context_settings={"help_option_names": ["-h", "--help"]}, help=__doc__)
@click.option("--rtt", "rtts", multiple=True, default=("1ms", "20ms", "80ms"), show_default=True)
@click.option("--requests", type=click.IntRange(1), default=60, show_default=True, help="Of a round and a mode.")
@click.option("--rounds", type=click.IntRange(1), default=3, show_default=True, help="That count, of each link.")
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def main(rtts: Sequence[str], requests: int, rounds: int, seed: int, as_json: bool) -> None:
    """Measure every link and print the table."""
    out = Console(stderr=True)
    entry = {"weights": "random:0", "family": "imagenet"}
    models = {name: {"builder": f"torchvision:{name}", **entry} for name in MODELS}
    edge = {
        "locations": {
            HERE: {"memory": _MEMORY_HERE, "pin_to_nodes": True},
            THERE: {"memory": _MEMORY_THERE, "pin_to_nodes": True, "preload": list(MODELS)},
        },
        "worker": {"release_page_cache": True},
        # What is preferred must not change under the feet of who compares.
        "coordinator": {"placement_every": "off"},
        "policy": {"name": "gdsf"},
    }
    try:
        links = [parse_duration(rtt) for rtt in rtts]
        with lab(
            (HERE, THERE), models, memory=_MEMORY_HERE, edge=edge, say=lambda said: out.print(said, style="dim")
        ) as made:
            until("tokyo holds all models", lambda: len(made.status()[THERE]["resident"]) == len(MODELS), 60.0)
            client = Client(made, seed)
            rows = []
            for rtt_s in links:
                out.print(f"round trip {rtt_s * 1000:g} ms", style="dim")
                rows.append(measure(made, client, rtt_s, requests, rounds))
    except (TestbedError, LabError, ValueError) as error:
        raise click.ClickException(" ".join(str(error).split())) from None
    if as_json:
        click.echo(json.dumps([{**asdict(row), "ratio": row.ratio} for row in rows], indent=2))
        return
    table = Table("round trip", *(f"{mode} (ms)" for mode in MODES), "what was chosen", "choice / better")
    for row in rows:
        chosen = ", ".join(f"{outcome} {count}" for outcome, count in sorted(row.outcomes["choice"].items()))
        means = [f"{row.mean_ms[mode]:.1f}" for mode in MODES]
        table.add_row(f"{row.rtt_ms:g} ms", *means, chosen, f"{row.ratio:.2f}")
    Console().print(table)


if __name__ == "__main__":
    main()
