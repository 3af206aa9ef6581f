"""Measure a model whose files are in the store, in a process of its own, and refuse one that takes what it hides.

An eviction is only worth what it gives back. So a model is refused whose memory does not fall by what it counts, or
which holds more than it counts: weights that are neither parameters nor buffers are in memory from the moment at which
a worker prepares the model, whether or not it is loaded.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Any

from serve_app.core.contract import SizeCost
from serve_app.errors import StoreError
from serve_app.models.profiling.fresh_process import call_in_fresh_process
from serve_app.models.profiling.measure import KNOWN_MODULE, MODULE, Measurement, Repetitions, Skipped, measure
from serve_app.models.runtimes import registry
from serve_app.models.runtimes.base import PreparedModel
from serve_app.models.threads import expect_parallel, parallel_inferences
from serve_app.store.manifest import Manifest
from serve_app.store.model_store import ModelStore

#: Memory that a model may keep, or take beyond what it counts, whatever its size: pages of code, heap in use.
FREE_BYTES = 2 * 2**20

#: The same in parts of its size.
FREE_SHARE = 0.05

#: What a process may keep of a model that is not in memory, in parts of its size: the objects of its structure.
PREPARED_BYTES = 4 * 2**20
PREPARED_SHARE = 0.1

#: Builders of libraries that are imported already, and whose modules have no weights but parameters and buffers.
KNOWN_BUILDERS = ("torchvision:", "timm:", "efficientnet-lite:")

_MEGABYTE = 1e6


def measure_published(
    manifest: Manifest,
    store: ModelStore,
    sizes: Sequence[tuple[int, ...]],
    highest: Mapping[str, int] = MappingProxyType({}),
) -> Measurement:
    """Measure a model in a fresh process.

    Args:
        manifest: of the model; its files are in the store, and the manifest itself need not be.
        store: has the files.
        sizes: of the free axes, at which executions are measured; the least first.
        highest: the largest whole number of an input, by its name, where it is known.

    Raises:
        StoreError: the model cannot be loaded and run, or does not give its memory back, or its process crashes.
    """
    model = manifest.model
    raw = call_in_fresh_process(
        f"{__name__}:measure_here",
        {
            "root": str(store.root),
            "manifest": manifest.to_json().decode(),
            "sizes": [list(each) for each in sizes],
            "highest": dict(highest),
            "parallel": parallel_inferences(),
        },
        f"{model.builder}",
    )
    costs = tuple(SizeCost(**{**cost, "sizes": tuple(cost["sizes"])}) for cost in raw.pop("costs"))
    skipped = tuple(Skipped(sizes=tuple(each["sizes"]), reason=each["reason"]) for each in raw.pop("skipped"))
    measurement = Measurement(costs=costs, skipped=skipped, **raw)
    if model.runtime != "torch":
        # Prepared, it is the place of its files and no more. What is seen besides is the library's, and comes and goes.
        measurement = dataclasses.replace(measurement, prepared_bytes=0)
    require_given_back(model.builder, measurement, model.weights_bytes)
    return measurement


def measure_here(
    root: str, manifest: str, sizes: list[list[int]], highest: dict[str, int], parallel: int
) -> dict[str, Any]:
    """Measure a model in this process; the arguments and the result are those that JSON can carry."""
    read = Manifest.from_json(manifest.encode(), "of the publisher")
    store = ModelStore(Path(root))
    expect_parallel(parallel)

    def prepare() -> PreparedModel:
        return registry.prepare(read, store)

    is_known = read.model.builder.startswith(KNOWN_BUILDERS)
    sizes_of_axes = [tuple(each) for each in sizes]
    # Other runtimes keep memory of their own, also for modules that were exported for them.
    of_module = KNOWN_MODULE if is_known else MODULE
    repetitions = of_module if read.model.runtime == "torch" else Repetitions()
    measured = measure(
        cache(prepare) if is_known else prepare, read.model.contract, sizes_of_axes, highest, repetitions
    )
    return dataclasses.asdict(measured)


def require_given_back(builder: str, measurement: Measurement, size_bytes: int) -> None:
    """Require that an unload gives the memory of a model back, and that a process keeps little of it otherwise.

    Args:
        builder: of the model, for the message.
        measurement: what was measured.
        size_bytes: what the model counts with.

    Raises:
        StoreError: it keeps memory.
    """
    counted = max(size_bytes, measurement.resident_bytes)
    if measurement.kept_bytes > max(FREE_BYTES, FREE_SHARE * counted):
        raise StoreError(
            f"{builder} keeps {measurement.kept_bytes / _MEGABYTE:.1f} MB when it is unloaded, every time, so its "
            "eviction would free nothing; name another runtime, or export the model (torch.export or ONNX)"
        )
    # The module of a known builder hides no weights; what it takes includes what its library imports for it.
    hides_nothing = builder.startswith(KNOWN_BUILDERS)
    if not hides_nothing and measurement.prepared_bytes > max(PREPARED_BYTES, PREPARED_SHARE * counted):
        raise StoreError(
            f"{builder} holds {measurement.prepared_bytes / _MEGABYTE:.1f} MB while it is not loaded: weights that are "
            "neither parameters nor buffers; register them, or export the model (torch.export or ONNX)"
        )


def require_counted(builder: str, measurement: Measurement, weights_bytes: int) -> None:
    """Require that a model takes no more than its weights, where an unload drops these and nothing else.

    Args:
        builder: of the model, for the message.
        measurement: what was measured.
        weights_bytes: what the model counts with.

    Raises:
        StoreError: it takes more.
    """
    if measurement.resident_bytes > weights_bytes + max(FREE_BYTES, FREE_SHARE * weights_bytes):
        raise StoreError(
            f"{builder} takes {measurement.resident_bytes / _MEGABYTE:.1f} MB when it is loaded, but its parameters "
            f"and buffers are {weights_bytes / _MEGABYTE:.1f} MB; keep all weights in parameters and buffers"
        )
