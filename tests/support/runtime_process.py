"""What a model takes and gives back in a process of its own: ``python runtime_process.py STORE MODEL CYCLES``."""

from __future__ import annotations

import gc
import json
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from serve_app.models.loader import ModelLoader
from serve_app.models.process_memory import give_back_free_memory, process_memory
from serve_app.models.profiling.grid import grid
from serve_app.models.profiling.measure import run_in_every_thread
from serve_app.models.threads import parallel_inferences, use_threads
from serve_app.store.model_store import ModelStore
from serve_app.tasks.tensors import probe


def resident_bytes() -> int:
    gc.collect()
    give_back_free_memory()
    return process_memory().rss_bytes


def main() -> None:
    use_threads(1)
    root, model_id, cycles = sys.argv[1:]
    loader = ModelLoader(ModelStore(Path(root)))
    contract = loader.prepare(model_id).manifest.model.contract
    sizes = grid(contract.axes)
    inputs = probe(contract, sizes[len(sizes) // 2])

    threads = ThreadPoolExecutor(parallel_inferences())

    def cycle() -> tuple[int, int]:
        model = loader.load(model_id)
        run_in_every_thread(model, inputs, threads)
        loaded = resident_bytes()
        model.unload()
        left = resident_bytes()
        return loaded - left, left

    # Libraries set up what they keep, and the heaps of the threads grow to their size.
    warm = [cycle() for _ in range(30)][-10:]
    later = [cycle() for _ in range(int(cycles))]
    # A heap keeps a block now and then until the next cycle; a leak would raise the least that is left.
    growth = min(left for _, left in later) - min(left for _, left in warm)
    given_back = max(given for given, _ in warm)
    found = {"given_back": given_back, "growth": growth, "mapped": root in Path("/proc/self/maps").read_text()}
    sys.stdout.write(json.dumps(found))


main()
