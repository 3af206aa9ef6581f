"""Memory that is bounded and returned: ``python -m loadtests.memory``.

Each part runs the real worker, without Ray and coordinator, in a process of its own, on the published models.

``--evictions``: every model is loaded, run and evicted. Printed is how much of what it had taken resident memory falls
by at once, how much more when free heap is given back, and what of its file stays in the page cache
(``release_page_cache: true``).
``--leak N``: N times a small model is loaded, run and evicted. Printed is the slope of resident memory.
``--form-changes N``: N times a model that has several forms goes over from one to the next, and is evicted in the last.
Printed is the slope of resident memory.
``--churn SECONDS``: models that are not there are asked for at ``--rate``, in a memory cgroup (root) of the capacity
and what the process took before its first model; as many of them run as there are slots for. Printed is whether it
lives, and what it took at most.

Without options all parts run, for about three minutes; with ``--full`` 10,000 cycles and 10 minutes of churn.
``--catalog loadtests/mixture.yaml`` does the same with models of all runtimes, which are published where they are
missing; what they are asked is made by their contracts.
"""

from __future__ import annotations

import asyncio
import ctypes
import gc
import itertools
import json
import mmap
import os
import random
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
import numpy as np
from rich.console import Console

from loadtests.support.memory_report import print_churn, print_evictions, print_leak
from loadtests.support.memory_worker import Bench, bench, publish_missing
from loadtests.testbed.machine import TestbedError, make_cgroup, remove_cgroups
from serve_app.core.cache.events import ExchangeSuggested
from serve_app.core.catalog import PublishedModel
from serve_app.errors import EdgeServeError, StoreError
from serve_app.models.process_memory import give_back_free_memory, process_memory

_GROUP = "edgeserve-memory"
_UNLIMITED = 2**50
_SMALL_S = 0.02
_SAMPLES = 20
_WAITING = 32


async def evictions(made: Bench) -> dict[str, Any]:
    """Load, run and evict every model that fits, one at a time."""
    rows = []
    for model in made.models:
        path = made.weights(model)
        # Libraries set themselves up with the first load of each, and heaps come to their size.
        await made.infer_all(model)
        await made.worker.unload(model.model_id)
        await _settle()
        before = process_memory()
        await made.infer_all(model)
        await made.infer_all(model)
        await _settle()
        resident = process_memory()
        await made.worker.unload(model.model_id)
        at_once_bytes = resident.rss_bytes - process_memory().rss_bytes
        await _settle()
        rows.append(
            {
                "model": model.model_id,
                "runtime": model.runtime,
                "bytes": model.profile.size_bytes,
                "taken": resident.rss_bytes - before.rss_bytes,
                "fall": at_once_bytes,
                "later": resident.rss_bytes - process_memory().rss_bytes - at_once_bytes,
                "cached": _cached_bytes(path),
            }
        )
    return {"rows": rows}


async def _settle() -> None:
    """Wait until files are released, and give back what executions have freed: it is not the model's."""
    await asyncio.sleep(0.3)
    give_back_free_memory()


async def leak(made: Bench, cycles: int) -> dict[str, Any]:
    """Load, run and evict small models again and again; resident memory every now and then."""
    small = [model for model in made.models if model.profile.exec_s < _SMALL_S]
    samples: list[tuple[int, int]] = []
    for cycle, model in zip(range(cycles + 1), itertools.cycle(small), strict=False):
        if cycle % max(1, cycles // _SAMPLES) == 0:
            gc.collect()
            give_back_free_memory()
            samples.append((cycle, process_memory().rss_bytes))
        await made.infer(model)
        await made.worker.unload(model.model_id)
    return {"samples": samples, "models": len(small)}


async def form_changes(made: Bench, changes: int) -> dict[str, Any]:
    """Let models go over to their faster forms again and again; resident memory every now and then."""
    several = [model for model in made.models if made.faster(model)]
    if not several:
        raise StoreError("no model has several forms here; run edgeserve publish first")
    samples: list[tuple[int, int]] = []
    done = 0
    for model in itertools.cycle(several):
        if not samples or done - samples[-1][0] >= changes // _SAMPLES:
            gc.collect()
            give_back_free_memory()
            samples.append((done, process_memory().rss_bytes))
        if done >= changes:
            break
        await made.infer(model)
        for form in made.faster(model):
            made.manager.handle(ExchangeSuggested(form.profile))
            while await made.infer(model) != form.form:
                pass
            done += 1
        await made.worker.unload(model.model_id)
    return {"samples": samples, "models": len(several)}


async def churn(made: Bench, seconds: float, rate: float) -> dict[str, Any]:
    """Ask for absent models at a rate, small ones more often; as many run as there are slots for."""
    for model in made.models:
        # Pages that are in memory already count for whoever has read them.
        with made.weights(model).open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    rng = random.Random(0)
    loop = asyncio.get_running_loop()
    cache, memory = made.manager.cache, made.memory
    under_way: set[asyncio.Task[None]] = set()
    running = done = failed = peak = unaccounted = looks = over = 0
    over_counted = False
    began_s = loop.time()

    async def ask(model: PublishedModel) -> None:
        nonlocal running, done, failed
        if running >= made.slots:
            await made.worker.preload(model.model_id)
            return
        running += 1
        try:
            await made.infer(model)
            done += 1
        except EdgeServeError:
            failed += 1
        finally:
            running -= 1

    while loop.time() - began_s <= seconds:
        absent = [model for model in made.models if cache.state(model.model_id) is None]
        # Some wait for models that are in use, some are joined: what counts is loads that have begun.
        behind = cache.counters.loads < rate * (loop.time() - began_s)
        if absent and behind and len(under_way) < _WAITING:
            (model,) = rng.choices(absent, [1 / model.profile.size_bytes for model in absent])
            task = asyncio.create_task(ask(model))
            under_way.add(task)
            task.add_done_callback(under_way.discard)
        beyond = memory.rss_bytes - memory.base_bytes
        looks += 1
        peak, unaccounted = max(peak, beyond), max(unaccounted, memory.unaccounted_bytes)
        over += beyond > cache.capacity_bytes
        over_counted |= cache.used_bytes > cache.model_capacity_bytes
        await asyncio.sleep(0.25 / rate)
    await asyncio.gather(*under_way)
    took_s = loop.time() - began_s
    counters = cache.counters
    return {
        "models": len(made.models),
        "runtimes": sorted({model.runtime for model in made.models}),
        "loads_per_s": counters.loads / took_s,
        "evictions": counters.evictions,
        "preloads_per_s": counters.preloads / took_s,
        "runs_per_s": done / took_s,
        "failed": failed,
        "seconds": took_s,
        "capacity": cache.capacity_bytes,
        "base": memory.base_bytes,
        "peak": peak,
        "over_share": over / looks,
        "over_counted": over_counted,
        "unaccounted": unaccounted,
    }


def _cached_bytes(path: Path) -> int:
    """How much of a file the kernel has in memory."""
    size = path.stat().st_size
    with path.open("rb") as file, mmap.mmap(file.fileno(), size, access=mmap.ACCESS_COPY) as mapped:
        pages = np.zeros(-(-size // mmap.PAGESIZE), np.uint8)
        start = np.frombuffer(mapped, np.uint8)
        ctypes.CDLL(None).mincore(ctypes.c_void_p(start.ctypes.data), ctypes.c_size_t(size), pages.ctypes)
        # It holds the mapping open.
        del start
        return int(np.count_nonzero(pages & 1)) * mmap.PAGESIZE


# The other process


def _in_process(
    part: str, *, common: Sequence[str], timeout_s: float, group: bool = False, **options: float
) -> dict[str, Any]:
    """Run one part in a process, in a cgroup where asked; what it found, and how the kernel judged it."""
    command = [sys.executable, "-m", "loadtests.memory", "--part", part, *common]
    for name, value in options.items():
        command += [f"--{name.replace('_', '-')}", str(value)]
    if group:
        folder = make_cgroup(_GROUP, _UNLIMITED)
        command = ["sh", "-c", f'echo $$ > {folder}/cgroup.procs && exec "$@"', "sh", *command]
    # As workers have it, see ``serve_app/serving/app.py``.
    environment = os.environ | {"MALLOC_ARENA_MAX": "2"}
    child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)
    assert child.stdin is not None
    assert child.stdout is not None
    try:
        budget = json.loads(child.stdout.readline() or "{}")
        found: dict[str, Any] = {}
        if group and budget:
            make_cgroup(_GROUP, budget["base"] + budget["capacity"])
            found["limit"] = budget["base"] + budget["capacity"]
        output, _ = child.communicate("go\n", timeout=timeout_s)
        found |= {"exit": child.returncode, **json.loads(output or "{}")}
        if child.returncode and not group:
            raise StoreError(f"the process that measures {part} ended with {child.returncode}; see above")
        if group:
            found["group_peak"] = _peak_bytes(folder)
    finally:
        child.kill()
        child.wait()
        if group:
            remove_cgroups(_GROUP)
    return found


def _peak_bytes(folder: Path) -> int:
    """The most that a cgroup, of version 1 or 2, has used."""
    version_1 = folder / "memory.max_usage_in_bytes"
    return int((version_1 if version_1.exists() else folder / "memory.peak").read_text())


def _as_part(part: str, memory: str, catalog: Path | None, cycles: int, seconds: float, rate: float) -> None:
    """What the other process does: say what it took to start, wait, work, say what came of it."""

    async def run() -> dict[str, Any]:
        # What nobody has asked for must not come in between where single models are measured.
        preloads = {"churn": 2, "form_changes": 1}.get(part, 0)
        async with bench(
            memory,
            preloads=preloads,
            release_page_cache=part == "evictions",
            models_of=catalog,
            policy="lru" if part == "form_changes" else None,
        ) as made:
            budget = {
                "base": made.memory.base_bytes,
                "capacity": made.manager.cache.capacity_bytes,
            }
            click.echo(json.dumps(budget))
            await asyncio.to_thread(sys.stdin.readline)
            match part:
                case "evictions":
                    return await evictions(made)
                case "leak":
                    return await leak(made, cycles)
                case "form_changes":
                    return await form_changes(made, cycles)
                case _:
                    return await churn(made, seconds, rate)

    click.echo(json.dumps(asyncio.run(run())))


@click.command()
@click.option("--evictions", "want_evictions", is_flag=True, help="Only how memory falls with evictions.")
@click.option("--leak", "cycles", type=int, help="Only so many cycles of load, inference and eviction.")
@click.option("--form-changes", "changes", type=int, help="Only so many changes of the form of models.")
@click.option("--churn", "seconds", type=float, help="Only so many seconds of churn in a cgroup (root).")
@click.option("--rate", default=50.0, show_default=True, help="Loads a second of the churn.")
@click.option("--memory", default="512MiB", show_default=True, help="Capacity of the worker.")
@click.option(
    "--catalog",
    type=click.Path(path_type=Path, exists=True),
    help="Models of this catalog instead of those of deploy/edge.yaml, such as loadtests/mixture.yaml.",
)
@click.option("--full", is_flag=True, help="10,000 cycles, and 10 minutes of churn.")
@click.option("--part", hidden=True)
def main(
    want_evictions: bool,
    cycles: int | None,
    changes: int | None,
    seconds: float | None,
    rate: float,
    memory: str,
    catalog: Path | None,
    full: bool,
    part: str | None,
) -> None:
    """Show that a worker's memory is bounded, and given back."""
    if part is not None:
        _as_part(part, memory, catalog, cycles or changes or 0, seconds or 0.0, rate)
        return
    console = Console()
    common = ["--memory", memory, *(["--catalog", str(catalog)] if catalog else [])]
    everything = not want_evictions and cycles is None and changes is None and seconds is None
    if everything:
        cycles, changes, seconds = (10_000, 10_000, 600.0) if full else (2_000, 1_000, 60.0)
    try:
        if catalog is not None:
            publish_missing(catalog)
        if everything or want_evictions:
            print_evictions(console, _in_process("evictions", common=common, timeout_s=240.0))
        if cycles is not None:
            found = _in_process("leak", common=common, timeout_s=60 + cycles * 0.1, leak=cycles)
            print_leak(console, found, "cycles")
        if changes is not None:
            found = _in_process("form_changes", common=common, timeout_s=60 + changes * 0.5, form_changes=changes)
            print_leak(console, found, "changes of form")
        if seconds is not None and os.geteuid() != 0:
            console.print("churn needs root: it makes a memory cgroup")
        elif seconds is not None:
            churned = _in_process(
                "churn", common=common, timeout_s=120 + 2 * seconds, group=True, churn=seconds, rate=rate
            )
            print_churn(console, churned, rate)
    except (EdgeServeError, TestbedError, subprocess.TimeoutExpired) as error:
        raise SystemExit(f"memory: {error}") from None


if __name__ == "__main__":
    main()
