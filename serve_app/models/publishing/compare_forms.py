"""Compare forms of one model by time: in turns, in a fresh process, in processor time."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

from serve_app.core.catalog import PublishedModel
from serve_app.models.profiling.fresh_process import call_in_fresh_process
from serve_app.models.profiling.grid import grid
from serve_app.models.profiling.model_profile import in_turns
from serve_app.models.readahead import ReadAhead
from serve_app.models.runtimes.registry import prepare
from serve_app.models.threads import one_thread
from serve_app.store.manifest import Manifest
from serve_app.store.model_store import ModelStore
from serve_app.tasks.tensors import probe

#: In which the forms of a model are compared.
_ROUNDS = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class Times:
    """The load and the hit of a form, in hits of the model as it was published.

    What the first execution takes longer than later ones belongs to the load.
    """

    load: float
    hit: float


def compare(store: ModelStore, mapped: Manifest, forms: Sequence[Manifest]) -> list[Times]:
    """Measure forms against the model as it was published, all in the same turns; return the times of each form.

    In processor time: the forms are compared, and not what else the machine does.

    Raises:
        StoreError: one of them does not run, or crashes.
    """
    arguments = {"root": str(store.root), "forms": [each.to_json().decode() for each in (mapped, *forms)]}
    raw = call_in_fresh_process(f"{__name__}:compare_here", arguments, mapped.model.builder)
    return [Times(**each) for each in raw["times"]]


def compare_here(root: str, forms: list[str]) -> dict[str, Any]:
    """Load and run any number of forms in turns, in this process; times are in hits of the first."""
    store, manifests = ModelStore(Path(root)), [Manifest.from_json(each.encode(), "of the publisher") for each in forms]
    contract = manifests[0].model.contract
    with one_thread():
        loads = [partial(prepare(manifest, store).load, ReadAhead, None) for manifest in manifests]
        first, *others = in_turns(loads, probe(contract, grid(contract.axes)[0]), _ROUNDS)
    hit_s = median(each.cpu_hit_s for each in first)
    times = [
        Times(
            load=max(0.0, median(each.cpu_miss_s - each.cpu_hit_s for each in rounds)) / hit_s,
            hit=median(each.cpu_hit_s for each in rounds) / hit_s,
        )
        for rounds in others
    ]
    return {"times": [dataclasses.asdict(each) for each in times]}


def timed_like(mapped: PublishedModel, form: PublishedModel, times: Times) -> PublishedModel:
    """Return a form with times that can be compared with those of the model as it was published."""
    exec_s = mapped.profile.exec_s * times.hit
    faster = exec_s / form.profile.exec_s if form.profile.exec_s else 1.0
    return dataclasses.replace(
        form,
        profile=dataclasses.replace(form.profile, load_s=mapped.profile.exec_s * times.load, exec_s=exec_s),
        costs=tuple(dataclasses.replace(cost, exec_s=cost.exec_s * faster) for cost in form.costs),
    )
