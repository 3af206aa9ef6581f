"""Compile published modules: publish the forms in which they run faster on this machine.

A form is made from what the store has, so it needs neither the builder nor the weights of the catalog, and can be made
at any time. All missing forms of a model are made from one exported graph, and compared in one run of turns. A module
that cannot be compiled, or answers otherwise, is served as it was published.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from serve_app.core.catalog import ModelEntry
from serve_app.errors import StoreError
from serve_app.models.agreement import agree
from serve_app.models.profiling.grid import grid
from serve_app.models.profiling.measure_published import measure_published
from serve_app.models.publishing.compare_forms import Times, compare, timed_like
from serve_app.models.publishing.described import with_measurement
from serve_app.models.publishing.export_graph import export_graph, trial_inputs
from serve_app.models.publishing.graph_files import WRITERS
from serve_app.models.publishing.probe_agreement import measure_agreement
from serve_app.models.publishing.publish_graph import TOLERANCE
from serve_app.models.publishing.quantize import quantize_graph
from serve_app.models.readahead import ReadAhead
from serve_app.models.runtimes.environment import environments
from serve_app.models.runtimes.processor import computes_in_bfloat16
from serve_app.models.runtimes.registry import prepare
from serve_app.models.threads import one_thread
from serve_app.store.forms import KINDS, FormKind, Refusal
from serve_app.store.manifest import Agreement, ExecutionFormat, Manifest, ManifestKey, is_allowed
from serve_app.store.model_store import ModelStore

logger = logging.getLogger(__name__)

#: What a further form may take at most of the time of those in float32 that are made before it.
_WORTH = 0.9

#: What the model as it was published takes, in its own hits.
_AS_PUBLISHED = "mapped", 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class FormOutcome:
    """What has come of an attempt to make a form.

    Attributes:
        form: its name, see ``form_name``.
        refusal: why there is none; None: it was made.
        agreement: of a form with lower precision, as far as that was measured.
        is_change: it was made, or there was one before.
    """

    form: str
    refusal: str | None
    agreement: Agreement | None
    is_change: bool


def wanted_forms(store: ModelStore, entry: ModelEntry, key: ManifestKey) -> dict[FormKind, ManifestKey]:
    """Return the places of all forms that a published model may have on this machine, whether or not they exist."""
    manifest = store.read(key)
    if entry.runtime != "auto" or manifest.execution.runtime != "torch" or manifest.model.dtype != "float32":
        return {}
    return store.forms.keys(key, environments(), entry.precisions)


def missing_forms(
    store: ModelStore, entry: ModelEntry, key: ManifestKey, *, force: bool = False
) -> dict[FormKind, ManifestKey]:
    """Return the forms that a published model does not have for this machine, and that nobody has tried to make.

    A form whose files are not what was written is missing, and one that was refused for less agreement than the entry
    asks for now; with ``force`` all are.
    """
    return {
        kind: form
        for kind, form in wanted_forms(store, entry, key).items()
        if force or not (_is_refused(store, entry, form) or _is_whole(store, form))
    }


def refused_forms(store: ModelStore, entry: ModelEntry, key: ManifestKey) -> dict[str, Refusal]:
    """Return why a published model does not have forms for this machine, or may not be served by them, by form."""
    refused = {}
    for kind, form in wanted_forms(store, entry, key).items():
        refusal = store.forms.refusal(form)
        if refusal is None and store.forms.path(form).is_file():
            manifest = store.read(form)
            if manifest.agreement is not None and not is_allowed(manifest, entry):
                refusal = _too_little(manifest.agreement, entry)
        if refusal is not None:
            refused[kind.form] = refusal
    return refused


def publish_forms(
    store: ModelStore, entry: ModelEntry, key: ManifestKey, on_begin: Callable[[], None], *, force: bool = False
) -> tuple[FormOutcome, ...]:
    """Make the missing forms of a published model, and return what has come of each.

    The caller holds ``store.exclusive``.

    Args:
        store: where.
        entry: of the catalog.
        key: of the model.
        on_begin: called before a form is made.
        force: make all of them.
    """
    missing = missing_forms(store, entry, key, force=force)
    if not missing:
        return ()
    on_begin()
    with tempfile.TemporaryDirectory() as folder, one_thread():
        return _Attempt(store, entry, key, missing, Path(folder)).run()


def _is_refused(store: ModelStore, entry: ModelEntry, form: ManifestKey) -> bool:
    refusal = store.forms.refusal(form)
    return refusal is not None and (refusal.agreement is None or refusal.agreement.share < entry.agreement)


def _is_whole(store: ModelStore, form: ManifestKey) -> bool:
    try:
        for file in store.read(form).files:
            store.require_verified(file, form.name)
    except StoreError:
        return False
    return True


def _too_little(agreement: Agreement, entry: ModelEntry) -> Refusal:
    reason = f"it has {agreement}, and {entry.agreement:.2%} are asked for"
    return Refusal(reason=reason, agreement=agreement)


class _Refused(StoreError):
    """A form that does not agree enough."""

    def __init__(self, refusal: Refusal) -> None:
        super().__init__(refusal.reason)
        self.agreement = refusal.agreement


class _Attempt:
    """Makes forms of one model: each step goes on with those that no step before has refused."""

    def __init__(
        self, store: ModelStore, entry: ModelEntry, key: ManifestKey, missing: Mapping[FormKind, ManifestKey],
        folder: Path,
    ) -> None:  # fmt: skip
        self._store = store
        self._entry = entry
        self._key = key
        self._missing = missing
        self._folder = folder
        self._mapped = store.read(key)
        self._forms: dict[FormKind, Manifest] = {}
        self._outcomes: dict[FormKind, FormOutcome] = {}

    def run(self) -> tuple[FormOutcome, ...]:
        """Make the forms; return the outcomes in the order of ``KINDS``."""
        with self._refusing(*self._missing):
            graph, answers = export_graph(self._store, self._key, self._entry.builder, self._folder)
            for kind in self._missing:
                with self._refusing(kind):
                    self._forms[kind] = self._write(kind, graph)
                    _verify(self._store, self._forms[kind], answers)
        times: Mapping[FormKind, Times] = {}
        with self._refusing(*self._forms):
            times = self._in_turns()
            self._refuse_slow(times)
        for kind in tuple(self._forms):
            with self._refusing(kind):
                self._forms[kind] = self._measured(self._forms[kind], times[kind])
        self._require_agreement()
        for kind, manifest in tuple(self._forms.items()):
            with self._refusing(kind):
                self._store.commit_form(self._missing[kind], manifest)
                self._outcomes[kind] = FormOutcome(
                    form=kind.form, refusal=None, agreement=manifest.agreement, is_change=True
                )
        return tuple(self._outcomes[kind] for kind in self._missing if kind in self._outcomes)

    @contextlib.contextmanager
    def _refusing(self, *kinds: FormKind) -> Iterator[None]:
        """Go on without these forms where a step fails: exporters and runtimes raise what they like."""
        try:
            yield
        except Exception as error:
            for kind in kinds:
                if kind not in self._outcomes:
                    self._refuse(kind, error)

    def _refuse(self, kind: FormKind, error: Exception) -> None:
        self._forms.pop(kind, None)
        name, form = self._entry.model_id, self._missing[kind]
        reason = str(error) if isinstance(error, StoreError) else f"{type(error).__name__}: {error}"
        agreement = error.agreement if isinstance(error, _Refused) else None
        # Deployments must not look for what is no more, either.
        existed = self._store.forms.path(form).is_file()
        self._outcomes[kind] = FormOutcome(form=kind.form, refusal=reason, agreement=agreement, is_change=existed)
        if isinstance(error.__cause__, OSError):
            # A full disk says nothing of the model: the next publisher tries again.
            logger.warning("model %s is not compiled for %s: %s", name, kind.form, reason)
            return
        logger.info("model %s has no form %s: %s", name, kind.form, reason)
        self._store.forms.refuse(form, Refusal(reason=reason, agreement=agreement))

    def _write(self, kind: FormKind, graph: Path) -> Manifest:
        """Write the files of a form; return its manifest, which is not measured yet."""
        if kind.precision == "bfloat16" and not computes_in_bfloat16():
            raise StoreError("this processor has no instructions for bfloat16")
        if kind.precision == "int8":
            graph = quantize_graph(self._mapped, graph, self._folder)
        model = self._mapped.model
        lower = kind.precision if kind.precision == "bfloat16" else "float32"
        entry = dataclasses.replace(self._entry, dtype=lower, lowered="no")
        files = WRITERS[kind.runtime](self._store, entry, graph, model.contract)
        others = tuple(file for file in self._mapped.files if file.role == "tokenizer")
        return dataclasses.replace(
            self._mapped,
            model=dataclasses.replace(model, runtime=kind.runtime, dtype=kind.precision, costs=()),
            execution=ExecutionFormat(runtime=kind.runtime, made_for=environments()[kind.runtime]),
            tensors=(),
            files=(*files, *others),
        )

    def _in_turns(self) -> dict[FormKind, Times]:
        """Measure all forms that were written, and those that were there, against the model as it was published."""
        present = {
            kind: self._store.read(form)
            for kind, form in self._store.forms.keys(self._key, environments()).items()
            if kind not in self._missing and _is_whole(self._store, form)
        }
        both = present | self._forms
        forms = {kind: both[kind] for kind in KINDS if kind in both}
        if not self._forms:
            return {}
        try:
            return dict(zip(forms, compare(self._store, self._mapped, list(forms.values())), strict=True))
        except StoreError:
            # One of them fails, and which one shows only alone.
            times: dict[FormKind, Times] = {}
            for kind, form in forms.items():
                with contextlib.suppress(StoreError) if kind in present else self._refusing(kind):
                    (times[kind],) = compare(self._store, self._mapped, [form])
            return times

    def _refuse_slow(self, times: Mapping[FormKind, Times]) -> None:
        """Refuse forms that are hardly faster than others, which load sooner and need no trust."""
        name, hit = _AS_PUBLISHED
        for kind, own in times.items():
            if kind in self._forms and kind.form != "onnxruntime" and own.hit > _WORTH * hit:
                self._refuse(kind, StoreError(
                    f"it takes {own.hit / hit:.2f} of the time of {name}; more than {_WORTH} is not worth it"
                ))  # fmt: skip
            elif kind.precision == "float32" and own.hit < hit:
                name, hit = kind.form, own.hit

    def _measured(self, manifest: Manifest, times: Times) -> Manifest:
        """Measure the memory of a form, and its times at all sizes, in a fresh process."""
        contract, model = self._mapped.model.contract, manifest.model
        sizes = grid(contract.axes)
        measurement = measure_published(manifest, self._store, sizes[:1] if model.row_by_row else sizes)
        measured = with_measurement(model, measurement, measurement.resident_bytes)
        if measured.contract != contract:
            raise StoreError("it does not run at all sizes that the model takes")
        return dataclasses.replace(manifest, model=timed_like(self._mapped.model, measured, times))

    def _require_agreement(self) -> None:
        """Refuse forms of lower precision that answer otherwise than float32 too often."""
        lower = [kind for kind in self._forms if kind.precision != "float32"]
        if not lower:
            return
        with self._refusing(*lower):
            agreements = measure_agreement(self._store, self._mapped, [self._forms[kind] for kind in lower])
            for kind, agreement in zip(lower, agreements, strict=True):
                if agreement.share >= self._entry.agreement:
                    self._forms[kind] = dataclasses.replace(self._forms[kind], agreement=agreement)
                    continue
                self._refuse(kind, _Refused(_too_little(agreement, self._entry)))


def _verify(store: ModelStore, manifest: Manifest, answers: Sequence[Sequence[Any]]) -> None:
    """Compare the answers of a form, as workers will run it, with those of the module.

    Of lower precisions it is known later how well they agree; here they must answer in the same shapes.
    """
    model = prepare(manifest, store).load(ReadAhead, None)
    is_exact = manifest.model.dtype == "float32"
    try:
        for inputs, expected in zip(trial_inputs(manifest.model.contract), answers, strict=True):
            for (name, answer), original in zip(model.run(inputs).items(), expected, strict=True):
                alike = agree(answer, original, TOLERANCE["float32"]) if is_exact else _has_form_of(answer, original)
                if not alike:
                    raise StoreError(f"its output {name!r} is another one than before")
    finally:
        model.unload()


def _has_form_of(answer: Any, original: Any) -> bool:
    return answer.shape == original.shape and bool(np.isfinite(answer).all() or not np.isfinite(original).all())
