"""How many threads models in memory bring: ``python thread_process.py STORE MODEL THREADS PARALLEL``."""

from __future__ import annotations

import json
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from runtime_models import inputs

from serve_app.models.loader import ModelLoader
from serve_app.models.profiling.measure import run_in_every_thread
from serve_app.models.runtimes.base import LoadedModel
from serve_app.models.threads import use_threads
from serve_app.store.model_store import ModelStore

MODELS = 5


def main() -> None:
    root, model_id, threads, parallel = sys.argv[1:]
    use_threads(int(threads), int(parallel))
    store, executor, given = ModelStore(Path(root)), ThreadPoolExecutor(int(parallel)), inputs()

    def count_with(loaded: list[LoadedModel], more: int) -> int:
        for _ in range(more):
            # A loader has a model in memory once.
            loaders.append(ModelLoader(store))
            loaded.append(loaders[-1].load(model_id))
            run_in_every_thread(loaded[-1], given, executor)
        return len(list(Path("/proc/self/task").iterdir()))

    loaders: list[ModelLoader] = []
    loaded: list[LoadedModel] = []
    counts = [count_with(loaded, 1), count_with(loaded, MODELS - 1)]
    answers = [float(model.run(given)["mixed"].sum()) for model in loaded]
    for model in loaded:
        model.unload()
    for loader in loaders:
        loader.wait_for_releases()
    # Every loader has a thread that gives memory back.
    given_back = len(loaders)
    counts.append(count_with([], MODELS) - given_back)
    sys.stdout.write(json.dumps({"counts": counts, "answers": answers}))


main()
