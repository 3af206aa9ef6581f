"""How far forms of lower precision answer like the model as it was published, on the probes of the model.

Probes of models that take images are squares cut out of photographs: noise says little, because the answers to it are
far from every border between two classes. Other models are probed with made-up numbers. The criterion is what users of
the task see: the best class of a classifier, the classes of the pixels of a segmentation, and otherwise the numbers
themselves, which may be off by a share of their length.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import mean
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from serve_app.core.catalog import PublishedModel
from serve_app.core.contract import Contract
from serve_app.errors import StoreError
from serve_app.models.profiling.fresh_process import call_in_fresh_process
from serve_app.models.profiling.grid import trial_sizes
from serve_app.models.profiling.photographs import find_photographs, random_squares
from serve_app.models.readahead import ReadAhead
from serve_app.models.runtimes.registry import prepare
from serve_app.models.threads import one_thread
from serve_app.store.manifest import Agreement, Manifest
from serve_app.store.model_store import ModelStore
from serve_app.tasks.images import fit_image
from serve_app.tasks.tensors import NUMPY_TYPES, Tensors, probe

#: The most probes of a model, the least, and the seconds that the model as it was published may take for them.
_MOST, _LEAST, _WITHIN_S = 396, 100, 60.0

#: How far numbers may be off where there are no classes: the length of the difference, in parts of their own length.
_OFF: Final = 0.02


def measure_agreement(store: ModelStore, mapped: Manifest, forms: Sequence[Manifest]) -> list[Agreement]:
    """Run a model and forms of it on its probes, in a fresh process; return the agreement of each form.

    Args:
        store: has the files.
        mapped: the model as it was published.
        forms: whose files are in the store; their manifests need not be.

    Raises:
        StoreError: there is nothing to compare on, or a form crashes or does not run.
    """
    arguments = {"root": str(store.root), "manifests": [each.to_json().decode() for each in (mapped, *forms)]}
    raw = call_in_fresh_process(f"{__name__}:agreement_here", arguments, mapped.model.builder, "compared")
    return [Agreement(**each) for each in raw["agreements"]]


def agreement_here(root: str, manifests: list[str]) -> dict[str, Any]:
    """Measure the agreements in this process; the first manifest is that of the model as it was published."""
    store, read = ModelStore(Path(root)), [Manifest.from_json(each.encode(), "of the publisher") for each in manifests]
    model = read[0].model
    count, shares = _count(model.profile.exec_s), []
    with one_thread():
        original, *forms = [prepare(each, store).load(ReadAhead, None) for each in read]
        for inputs in probes(model, count):
            expected = original.run(inputs)
            shares.append([share_alike(model, expected, form.run(inputs)) for form in forms])
    made = [
        Agreement(share=mean(of_form), probes=len(shares), inputs=_inputs(model), criterion=_criterion(model))
        for of_form in zip(*shares, strict=True)
    ]
    return {"agreements": [asdict(each) for each in made]}


def probes(model: PublishedModel, count: int, seed: int = 0) -> Iterator[Tensors]:
    """Yield so many inputs on which a model can be compared with itself, each of the least batch.

    Raises:
        StoreError: what its inputs may be is not known.
    """
    contract = model.contract
    if _takes_images(model):
        (spec,), preset = contract.inputs, model.task.image
        assert preset is not None
        for square in random_squares(find_photographs(None), count, preset.channels, seed):
            yield {spec.name: fit_image(square, preset, spec, contract)[0][None].astype(NUMPY_TYPES[spec.datatype])}
        return
    _require_known_inputs(model.builder, contract)
    sizes = trial_sizes(contract.axes)
    for number in range(count):
        yield probe(contract, sizes[number % len(sizes)], seed=seed * count + number)


def share_alike(model: PublishedModel, expected: Tensors, actual: Tensors) -> float:
    """Return which share of the answers to one input are as expected, by the criterion of the task."""
    axis = _axis_of_classes(model)
    if axis is not None:
        name = model.outputs[0].name
        if actual[name].shape != expected[name].shape or not np.isfinite(actual[name]).all():
            return 0.0
        return float(np.mean(actual[name].argmax(axis) == expected[name].argmax(axis)))
    return float(all(_is_near(actual[spec.name], expected[spec.name]) for spec in model.outputs))


def _count(exec_s: float) -> int:
    return max(_LEAST, min(_MOST, math.ceil(_WITHIN_S / max(exec_s, 1e-6))))


def _takes_images(model: PublishedModel) -> bool:
    inputs, preset = model.inputs, model.task.image
    if (
        preset is None
        or not find_photographs(None)
        or len(inputs) != 1
        or len(inputs[0].shape) != 4
        or inputs[0].datatype != "FP32"
    ):
        return False
    return inputs[0].shape[1] == preset.channels


def _require_known_inputs(builder: str, contract: Contract) -> None:
    for spec in contract.inputs:
        if NUMPY_TYPES[spec.datatype].kind != "f" and spec.values is None and spec.default is None:
            raise StoreError(
                f"what {builder} takes as {spec.name!r} is not known, so there is nothing to compare it on; declare "
                "its values under inputs"
            )


def _axis_of_classes(model: PublishedModel) -> int | None:
    """Return the axis of the first output along which the best class is found; None if it has no classes."""
    shape, kind = model.outputs[0].shape, model.task.kind
    if kind.endswith("classification") and len(shape) == 2 and shape[-1] > 1:
        return 1
    if kind == "segmentation" and len(shape) == 4 and shape[1] > 1:
        return 1
    return None


def _is_near(actual: NDArray[Any], expected: NDArray[Any]) -> bool:
    if actual.shape != expected.shape:
        return False
    if expected.dtype.kind != "f":
        return bool(np.array_equal(actual, expected))
    difference, length = (float(np.linalg.norm(each.astype(np.float64))) for each in (actual - expected, expected))
    # False as well where a number is not finite.
    return difference <= _OFF * length


def _inputs(model: PublishedModel) -> str:
    if not _takes_images(model):
        return "inputs of random numbers"
    weights = ", with random weights" if model.has_random_weights else ""
    return f"squares of {len(find_photographs(None))} photographs{weights}"


def _criterion(model: PublishedModel) -> str:
    if _axis_of_classes(model) is None:
        return f"outputs that differ by at most {_OFF:.0%}"
    return "the same class of a pixel" if model.task.kind == "segmentation" else "the same best class"
