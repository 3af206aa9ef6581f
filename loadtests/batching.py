"""Requests that meet, executed at once or one by one: ``python -m loadtests.batching``.

Every model is published twice, and one of the two is not to be joined. One worker serves both, and the same clients ask
them in turns, with 1, 4, 16 and 64 connections, each of which sends its next request when the last one is answered.
Printed are requests a second and p50, p99 in milliseconds, and the ratios of joined over one by one, round by round;
further the largest difference of any answer from the first one, in parts of its largest number.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import click
import numpy as np
import orjson
from rich.console import Console
from rich.table import Table

from loadtests.support.local_deployment import HOST, StartError, edgeserve
from loadtests.support.small_models import FEATURES
from loadtests.support.wire import Reply, WireError, ask_many, request

CONNECTIONS = (1, 4, 16, 64)
#: Ends the names of models that are executed one by one.
ALONE = "-alone"
_WORDS = 16


def catalog() -> dict[str, dict[str, Any]]:
    """Three models, each under two names."""
    small, tensors = "loadtests.support.small_models", {"weights": "random:0", "task": "tensors"}
    models: dict[str, dict[str, Any]] = {
        "table": {
            "builder": f"{small}:table",
            "inputs": [{"name": "input", "datatype": "FP32", "shape": ["batch", FEATURES]}],
            "limits": {"batch": 64},
            **tensors,
        },
        "sentences": {
            "builder": f"{small}:sentences",
            "inputs": [{"name": "input", "datatype": "INT64", "shape": ["batch", "sequence"]}],
            "limits": {"batch": 16, "sequence": 32},
            **tensors,
        },
        "squeezenet": {"builder": "torchvision:squeezenet1_1", "weights": "random:0"},
    }
    return {name + ending: model for name, model in models.items() for ending in ("", ALONE)}


def payloads() -> dict[str, np.ndarray]:
    """What each model is asked."""
    random = np.random.default_rng(0)
    return {
        "table": random.standard_normal((1, FEATURES), dtype=np.float32),
        "sentences": random.integers(0, 2, (1, _WORDS)),
        "squeezenet": random.standard_normal((1, 3, 224, 224), dtype=np.float32),
    }


def keep_alone(store: Path) -> dict[str, int]:
    """Have half of the models be executed one by one; return the limits of the others, by model and form."""
    limits = {}
    for path in sorted(store.rglob("*.json")):
        content = json.loads(path.read_bytes())
        model = content.get("model") if isinstance(content, dict) else None
        if not isinstance(model, dict) or "joined_elements" not in model:
            continue
        if model["model_id"].endswith(ALONE):
            model["joined_elements"] = 0
            path.chmod(0o644)
            path.write_text(json.dumps(content))
        else:
            limits[f"{model['model_id']} {model['runtime']}"] = model["joined_elements"]
    return limits


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One model in one round."""

    model: str
    connections: int
    turn: int
    requests_per_s: float
    p50_ms: float
    p99_ms: float
    difference: float


def measure(port: int, rounds: int, seconds: float) -> list[Row]:
    """One row for each model, number of connections and round."""
    rows = []
    for name, payload in payloads().items():
        for connections in CONNECTIONS:
            speed: dict[str, float] = {}
            for turn in range(-1, rounds):
                # Round -1 warms up, and finds out how many requests take so long.
                endings = ("", ALONE) if turn % 2 else (ALONE, "")
                for model in (name + ending for ending in endings):
                    message = _message(f"/bench/v2/models/{model}/infer", payload)
                    count = max(4, int(seconds * speed.get(model, 40.0) / connections))
                    began_s = time.perf_counter()
                    replies = asyncio.run(ask_many(HOST, port, message, count=count, connections=connections))
                    per_s = len(replies) / (time.perf_counter() - began_s)
                    speed.setdefault(model, per_s)
                    if turn >= 0:
                        rows.append(_row(model, connections, turn, per_s, replies))
    return rows


def _message(path: str, array: np.ndarray) -> bytes:
    data = array.tobytes()
    datatype = {"float32": "FP32", "int64": "INT64"}[array.dtype.name]
    tensor = {"name": "input", "shape": array.shape, "datatype": datatype}
    head = orjson.dumps({
        "inputs": [{**tensor, "parameters": {"binary_data_size": len(data)}}],
        "parameters": {"binary_data_output": True},
    })  # fmt: skip
    headers = {"Content-Type": "application/octet-stream", "Inference-Header-Content-Length": str(len(head))}
    return request(HOST, 0, path, head + data, headers)


def _row(model: str, connections: int, turn: int, per_s: float, replies: list[Reply]) -> Row:
    times_ms = [reply.seconds * 1000 for reply in replies]
    answers = [_numbers(reply) for reply in replies]
    return Row(
        model=model,
        connections=connections,
        turn=turn,
        requests_per_s=per_s,
        p50_ms=median(times_ms),
        p99_ms=quantiles(times_ms, n=100)[98],
        difference=max(float(np.abs(each - answers[0]).max()) for each in answers) / float(np.abs(answers[0]).max()),
    )


def _numbers(reply: Reply) -> np.ndarray:
    return np.frombuffer(reply.body[int(reply.headers["inference-header-content-length"]) :], np.float32)


def ratios(rows: list[Row], model: str, connections: int, of: Callable[[Row], float]) -> list[float]:
    """Joined over one by one, round by round."""
    values = {(row.model, row.turn): of(row) for row in rows if row.connections == connections}
    return [value / values[model + ALONE, turn] for (name, turn), value in values.items() if name == model]


def _spread(values: list[float], digits: int = 2) -> str:
    return " / ".join(f"{value:.{digits}f}" for value in (min(values), median(values), max(values)))


def _print(rows: list[Row], limits: Mapping[str, int]) -> None:
    console = Console(width=150)
    for name, elements in limits.items():
        console.print(f"{name}: up to {elements} elements at once" if elements else f"{name}: one by one")
    table = Table(title="least / median / most of the rounds")
    for title in ("model", "connections", "requests/s", "p50 ms", "p99 ms", "difference"):
        table.add_column(title)
    names = list(payloads())
    for name in names:
        for connections in CONNECTIONS:
            for model in (name, name + ALONE):
                own = [row for row in rows if (row.model, row.connections) == (model, connections)]
                table.add_row(
                    model, str(connections), _spread([row.requests_per_s for row in own], 0),
                    _spread([row.p50_ms for row in own]), _spread([row.p99_ms for row in own]),
                    f"{max(row.difference for row in own):.1e}",
                )  # fmt: skip
            table.add_row(
                f"{name}: joined over one by one", str(connections),
                _spread(ratios(rows, name, connections, lambda row: row.requests_per_s)),
                _spread(ratios(rows, name, connections, lambda row: row.p50_ms)),
                _spread(ratios(rows, name, connections, lambda row: row.p99_ms)), "", style="bold",
            )  # fmt: skip
    console.print(table)


@click.command(context_settings={"help_option_names": ["-h", "--help"]}, help=__doc__)
@click.option("--rounds", default=3, show_default=True, type=click.IntRange(min=2))
@click.option("--seconds", default=1.0, show_default=True, help="Of each model, number of connections and round.")
@click.option("--json", "file", type=click.Path(dir_okay=False, path_type=Path), help="Write the rows here.")
def main(rounds: int, seconds: float, file: Path | None) -> None:
    """Measure and print."""
    limits: dict[str, int] = {}
    try:
        with edgeserve(
            catalog(), {"bench": {"memory": "1GiB"}}, prepare=lambda store: limits.update(keep_alone(store))
        ) as here:
            rows = measure(here.port, rounds, seconds)
    except (StartError, WireError) as error:
        raise click.ClickException(str(error)) from None
    _print(rows, limits)
    if file is not None:
        file.write_text(json.dumps({"limits": limits, "rows": [asdict(row) for row in rows]}, indent=2))


if __name__ == "__main__":
    main()
