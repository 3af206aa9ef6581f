"""Compile published modules: publish the forms in which they run faster on this machine.

A form is made from what the store has, so it needs neither the builder nor the weights of the catalog, and can be made
at any time. A module that cannot be compiled, or answers otherwise, is served as it was published.
"""

from __future__ import annotations

import dataclasses
import logging
import tempfile
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

from serve_app.core.catalog import ModelEntry, PublishedModel, RuntimeName
from serve_app.errors import StoreError
from serve_app.models.agreement import agree
from serve_app.models.profiling.fresh_process import call_in_fresh_process
from serve_app.models.profiling.grid import grid
from serve_app.models.profiling.measure_published import measure_published
from serve_app.models.profiling.model_profile import in_turns
from serve_app.models.publishing.described import with_measurement
from serve_app.models.publishing.export_graph import export_graph, trial_inputs
from serve_app.models.publishing.graph_files import WRITERS
from serve_app.models.publishing.publish_graph import TOLERANCE
from serve_app.models.readahead import ReadAhead
from serve_app.models.runtimes.environment import environments
from serve_app.models.runtimes.registry import prepare
from serve_app.models.threads import one_thread
from serve_app.store.manifest import ExecutionFormat, Manifest, ManifestKey
from serve_app.store.model_store import ModelStore
from serve_app.tasks.tensors import probe

logger = logging.getLogger(__name__)

#: In which the forms of a model are compared.
_ROUNDS = 5


def missing_forms(
    store: ModelStore, entry: ModelEntry, key: ManifestKey, *, force: bool = False
) -> dict[RuntimeName, ManifestKey]:
    """Return the forms that a published model does not have for this machine, and that nobody has tried to make.

    A form whose files are not what was written is missing; with ``force`` all are.
    """
    manifest = store.read(key)
    if entry.runtime != "auto" or manifest.execution.runtime != "torch" or manifest.model.dtype != "float32":
        return {}
    forms = {runtime: store.forms.key(key, runtime, made_for) for runtime, made_for in environments().items()}
    return {
        runtime: form
        for runtime, form in forms.items()
        if force or (store.forms.refusal(form) is None and not _is_whole(store, form))
    }


def publish_forms(
    store: ModelStore, entry: ModelEntry, key: ManifestKey, on_begin: Callable[[], None], *, force: bool = False
) -> bool:
    """Make the missing forms of a published model, and return whether others are there now.

    The caller holds ``store.exclusive``.

    Args:
        store: where.
        entry: of the catalog.
        key: of the model.
        on_begin: called before a form is made.
        force: make all of them.
    """
    made = False
    for runtime, form in missing_forms(store, entry, key, force=force).items():
        on_begin()
        try:
            _publish_form(store, entry, key, runtime, form)
            made = True
        except Exception as error:
            # Exporters and runtimes raise what they like. The model is served as it was published.
            reason = str(error) if isinstance(error, StoreError) else f"{type(error).__name__}: {error}"
            if isinstance(error.__cause__, OSError):
                # A full disk says nothing of the model: the next publisher tries again.
                logger.warning("model %s is not compiled for %s: %s", entry.model_id, runtime, reason)
                continue
            logger.info("model %s has no form for %s: %s", entry.model_id, runtime, reason)
            # Deployments must not look for what is no more, either.
            made = made or store.forms.path(form).is_file()
            store.forms.refuse(form, reason)
    return made


def _is_whole(store: ModelStore, form: ManifestKey) -> bool:
    try:
        for file in store.read(form).files:
            store.require_verified(file, form.name)
    except StoreError:
        return False
    return True


def _publish_form(
    store: ModelStore, entry: ModelEntry, key: ManifestKey, runtime: RuntimeName, form: ManifestKey
) -> None:
    mapped = store.read(key)
    contract = mapped.model.contract
    with tempfile.TemporaryDirectory() as folder, one_thread():
        path, answers = export_graph(store, key, entry.builder, Path(folder))
        files = WRITERS[runtime](store, entry, path, contract)
    others = tuple(file for file in mapped.files if file.role == "tokenizer")
    model = dataclasses.replace(mapped.model, runtime=runtime, costs=())
    manifest = dataclasses.replace(
        mapped,
        model=model,
        execution=ExecutionFormat(runtime=runtime, made_for=environments()[runtime]),
        tensors=(),
        files=(*files, *others),
    )
    _verify(store, manifest, answers)
    sizes = grid(contract.axes)
    measurement = measure_published(manifest, store, sizes[:1] if model.row_by_row else sizes)
    measured = with_measurement(model, measurement, measurement.resident_bytes)
    measured = _timed_like(mapped.model, measured, _compare(store, mapped, manifest))
    if measured.contract != contract:
        raise StoreError("it does not run at all sizes that the model takes")
    store.commit_form(form, dataclasses.replace(manifest, model=measured))


def _compare(store: ModelStore, mapped: Manifest, form: Manifest) -> dict[str, float]:
    """Measure a form against the model as it was published, in a fresh process, see ``compare_here``."""
    arguments = {"root": str(store.root), "forms": [each.to_json().decode() for each in (mapped, form)]}
    return call_in_fresh_process(f"{__name__}:compare_here", arguments, mapped.model.builder)


def compare_here(root: str, forms: list[str]) -> dict[str, float]:
    """Load and run the two forms of a model in turns; return the load and the hit of the second in hits of the first.

    In processor time: the forms are compared, and not what else the machine does.
    """
    store, manifests = ModelStore(Path(root)), [Manifest.from_json(each.encode(), "of the publisher") for each in forms]
    contract = manifests[0].model.contract
    with one_thread():
        loads = [partial(prepare(manifest, store).load, ReadAhead, None) for manifest in manifests]
        first, second = in_turns(loads, probe(contract, grid(contract.axes)[0]), _ROUNDS)
    hit_s = median(each.cpu_hit_s for each in first)
    return {
        "load": median(each.cpu_load_s for each in second) / hit_s,
        "hit": median(each.cpu_hit_s for each in second) / hit_s,
    }


def _timed_like(mapped: PublishedModel, form: PublishedModel, ratios: Mapping[str, float]) -> PublishedModel:
    """Return a form with times that can be compared with those of the model as it was published."""
    exec_s = mapped.profile.exec_s * ratios["hit"]
    faster = exec_s / form.profile.exec_s if form.profile.exec_s else 1.0
    return dataclasses.replace(
        form,
        profile=dataclasses.replace(form.profile, load_s=mapped.profile.exec_s * ratios["load"], exec_s=exec_s),
        costs=tuple(dataclasses.replace(cost, exec_s=cost.exec_s * faster) for cost in form.costs),
    )


def _verify(store: ModelStore, manifest: Manifest, answers: list[list[Any]]) -> None:
    """Compare the answers of the form, as workers will run it, with those of the module."""
    model = prepare(manifest, store).load(ReadAhead, None)
    try:
        for inputs, expected in zip(trial_inputs(manifest.model.contract), answers, strict=True):
            for (name, answer), original in zip(model.run(inputs).items(), expected, strict=True):
                if not agree(answer, original, TOLERANCE["float32"]):
                    raise StoreError(f"its output {name!r} is another one than before")
    finally:
        model.unload()
