"""One execution on all cores, or in one thread: ``python -m loadtests.cores``.

The executor of a worker runs models of torch, without a server around it: once so that an execution on an idle machine
may use all cores, once so that none may, in turns. Clients ask again as soon as they are answered. Then two processes
ask at the same time, as two locations on one machine do. Printed are requests a second and p50 in milliseconds, and the
ratios of all cores over one thread.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import tempfile
import time
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from statistics import median
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from serve_app.core.catalog import ModelEntry
from serve_app.core.memory_budget import MemoryBudget
from serve_app.core.vocabulary import Outcome
from serve_app.models.loader import ModelLoader
from serve_app.models.process_memory import process_memory
from serve_app.models.publishing.publish_catalog import publish
from serve_app.models.threads import use_threads
from serve_app.serving.worker.execution import Execution
from serve_app.serving.worker.executor import InferenceExecutor
from serve_app.serving.worker.machine import usable_cores
from serve_app.serving.worker.model_manager import Lease
from serve_app.serving.worker.process_budget import ProcessBudget
from serve_app.store.model_store import ModelStore
from serve_app.tasks.tensors import probe

CLIENTS = (1, 2, 4, 16)
_SLOTS = 2
_BYTES = 2**30


def ask(root: str, model_id: str, cores: int, clients: int, seconds: float) -> tuple[float, float]:
    """Return requests a second, and the median of their seconds."""
    use_threads(1, _SLOTS)
    return asyncio.run(_ask(Path(root), model_id, cores, clients, seconds))


async def _ask(root: Path, model_id: str, cores: int, clients: int, seconds: float) -> tuple[float, float]:
    loader = _loader(root)
    model = loader.prepare(model_id).manifest.model
    loaded = loader.load(model_id)
    budget = MemoryBudget(capacity_bytes=_BYTES, workspace_bytes=_BYTES // 2)
    executor = InferenceExecutor(
        slots=_SLOTS,
        budget=ProcessBudget(budget, read=process_memory),
        release=lambda lease: None,
        name="bench",
        clock=time.monotonic,
        cores=cores,
    )
    lease = Lease(model_id=model_id, runnable=loaded, outcome=Outcome.HIT, wait_s=0.0, load_s=0.0, evicted=())
    execution = Execution(contract=model.contract, inputs=probe(model.contract, (1,)), solution=None)
    taken_s: list[float] = []

    async def one() -> None:
        began_s = time.perf_counter()
        await executor.execute(lease, execution, least_s=model.profile.exec_s, times_longer=1.0, workspace_bytes=0)
        taken_s.append(time.perf_counter() - began_s)

    async def client(until_s: float) -> None:
        while time.perf_counter() < until_s:
            await one()

    await one()
    await one()
    taken_s.clear()
    began_s = time.perf_counter()
    await asyncio.gather(*(client(began_s + seconds) for _ in range(clients)))
    elapsed_s = time.perf_counter() - began_s
    await asyncio.to_thread(executor.shutdown)
    loaded.unload()
    return len(taken_s) / elapsed_s, median(taken_s)


@cache
def _loader(root: Path) -> ModelLoader:
    # It keeps the modules that it has built.
    return ModelLoader(ModelStore(root))


def measure(root: str, model_id: str, rounds: int, seconds: float) -> list[list[str]]:
    """Return the rows of the table for one model."""
    rows = []
    with multiprocessing.get_context("spawn").Pool(2) as processes:

        def two(cores: int) -> tuple[float, float]:
            both = processes.starmap(ask, [(root, model_id, cores, 1, seconds)] * 2, 1)
            return sum(per_s for per_s, _ in both), median(taken_s for _, taken_s in both)

        for clients in (*CLIENTS, 0):
            found: dict[int, list[tuple[float, float]]] = {usable_cores(): [], 1: []}
            for turn in range(rounds):
                for cores in list(found) if turn % 2 else list(found)[::-1]:
                    found[cores].append(ask(root, model_id, cores, clients, seconds) if clients else two(cores))
            rows.append([model_id, str(clients or "1 in each of two processes"), *_cells(*found.values())])
    return rows


def _cells(wide: Sequence[tuple[float, float]], narrow: Sequence[tuple[float, float]]) -> list[str]:
    cells = []
    for at, factor in ((0, 1.0), (1, 1000.0)):
        cells += [f"{median(each[at] for each in kind) * factor:.1f}" for kind in (wide, narrow)]
        ratios = [one[at] / other[at] for one, other in zip(wide, narrow, strict=True)]
        cells.append(f"{min(ratios):.2f} / {median(ratios):.2f} / {max(ratios):.2f}")
    return cells


@click.command(context_settings={"help_option_names": ["-h", "--help"]}, help=__doc__)
@click.option("--rounds", default=3, show_default=True, type=click.IntRange(min=2))
@click.option("--seconds", default=1.0, show_default=True, help="Of each round.")
@click.option("--store", type=click.Path(file_okay=False, path_type=Path), help="Publish into this one, and keep it.")
@click.argument("names", nargs=-1)
def main(rounds: int, seconds: float, store: Path | None, names: Sequence[str]) -> None:
    """Measure and print; NAMES are models of torchvision."""
    table = Table(title="all cores, one thread, and least / median / most of the ratios of the rounds")
    for title in ("model", "clients", "requests/s", "one thread", "ratio", "p50 ms", "one thread", "ratio"):
        table.add_column(title)
    with tempfile.TemporaryDirectory() as folder:
        root = str(store or folder)
        entries = [
            ModelEntry(model_id=name, builder=f"torchvision:{name}", weights="random:0", runtime="torch")
            for name in names or ("densenet121", "resnet50", "vit_b_16")
        ]
        failures: Any = publish(ModelStore(Path(root)), entries).failures
        if failures:
            raise click.ClickException(str(failures))
        for entry in entries:
            for row in measure(root, entry.model_id, rounds, seconds):
                table.add_row(*row)
    Console(width=150).print(table)


if __name__ == "__main__":
    main()
