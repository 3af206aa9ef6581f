"""Publish the models of a catalog: build, write, load back, compare, measure, commit.

A model is in the store only once its manifest is, and the manifest is written last. A publisher may therefore be
killed at any moment: finished models stay, and the next publisher sweeps the rest.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from serve_app.core.catalog import ModelEntry, runtime_of
from serve_app.errors import DownloadFailed, StoreError, WeightsUnavailable
from serve_app.models.builders import registry
from serve_app.models.profiling.fresh_process import prepare_server
from serve_app.models.publishing.described import ModuleStage, OnStage
from serve_app.models.publishing.publish_apart import publish_apart
from serve_app.models.publishing.publish_forms import FormOutcome, missing_forms, publish_forms, wanted_forms
from serve_app.models.runtimes.registry import is_made_here
from serve_app.models.sources.download_cache import OnBytes
from serve_app.models.sources.fetcher import Fetcher
from serve_app.models.sources.labels import read_labels
from serve_app.models.sources.pretrained import FALLBACK, PRETRAINED, Probe, WeightSource
from serve_app.store.manifest import Manifest
from serve_app.store.model_store import ModelStore
from serve_app.store.project_recorder import ProjectRecorder
from serve_app.store.projects import Project

logger = logging.getLogger(__name__)

_YIELD_S = 0.05

#: Of one model in a run of the publisher.
PublishStage = (
    Literal["waiting", "skipped", "downloading", "building", "published", "compiling", "failed"] | ModuleStage
)


@dataclass(frozen=True, slots=True, kw_only=True)
class PublishEvent:
    """Progress: model ``index`` (from 0) of ``total`` has reached ``stage``; ``bytes`` of weights, 0 while unknown.

    ``waiting`` means that another publisher holds the store. While ``downloading``, there are ``bytes`` of
    ``total_bytes``, 0 where nobody knows.
    """

    model_id: str
    stage: PublishStage
    index: int
    total: int
    bytes: int = 0
    total_bytes: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class PublishFailure:
    """A model that could not be published, and why."""

    model_id: str
    message: str


@dataclass(frozen=True, slots=True, kw_only=True)
class PublishReport:
    """The outcome of a run, by model name.

    ``fallbacks`` are all models of the run, published now or before, that serve seeded random weights because the
    pretrained ones could not be fetched; ``refused`` those that would, and were not published for that reason.
    ``versions`` has the new version of each model that had one before, and ``forms`` what has come of every attempt to
    compile a model.
    """

    published: tuple[str, ...] = ()
    skipped: tuple[str, ...] = ()
    fallbacks: tuple[str, ...] = ()
    refused: tuple[str, ...] = ()
    failures: tuple[PublishFailure, ...] = ()
    versions: Mapping[str, int] = field(default_factory=dict)
    forms: Mapping[str, tuple[FormOutcome, ...]] = field(default_factory=dict)

    @property
    def warning(self) -> str | None:
        """Return one sentence about fallback weights that the user must see; None if no model has them."""
        if not self.fallbacks:
            return None
        total = len(self.published) + len(self.skipped) + len(self.refused) + len(self.failures)
        return (
            f"pretrained weights cannot be downloaded: {len(self.fallbacks)} of {total} models serve seeded random "
            f"weights ({FALLBACK}), whose predictions mean nothing; publish again once the network is there"
        )


def publish(
    store: ModelStore,
    entries: Sequence[ModelEntry],
    *,
    on_progress: Callable[[PublishEvent], None] = lambda event: None,
    force: bool = False,
    reachable: Probe | None = None,
    project: Project | None = None,
    canary: float | None = None,
    fetcher: Fetcher | None = None,
    require_weights: bool = False,
    compiled: bool = True,
) -> PublishReport:
    """Publish every entry that is missing, incomplete, changed, or on fallback weights that can now be replaced.

    One model that fails does not stop the others. If nothing is to be done, the store is only read. Modules are
    compiled when all models are published, each under a lock of its own: that takes longer than all the rest.

    Args:
        store: where to.
        entries: the catalog.
        on_progress: called at every stage of every model.
        force: publish again also what is published already.
        reachable: whether a URL can be fetched; called once per host.
        project: the catalog file, whose versions the models become; None: of no catalog.
        canary: new versions answer this share of the requests, and the versions before go on with the rest.
        fetcher: fetches what references name.
        require_weights: publish no model with random weights in the place of pretrained ones.
        compiled: make the missing forms of the models for this machine, too.

    Raises:
        StoreError: the store cannot be written at all.
    """
    entries = store.fingerprinted(entries)
    recorder = ProjectRecorder(store, project, canary)
    publisher = Publisher(store, entries, on_progress, WeightSource(fetcher, reachable), recorder, require_weights)
    if not force and not any(publisher.is_pending(entry) for entry in entries):
        publisher.skip_all()
    else:
        prepare_server()
        with store.exclusive(on_wait=publisher.report_wait):
            store.sweep()
            for index, entry in enumerate(entries):
                # Checked again: another publisher may have finished it meanwhile.
                if force or publisher.is_pending(entry):
                    publisher.publish(index, entry)
                else:
                    publisher.skip(index, entry)
            store.sweep()
    if compiled:
        for index, entry in enumerate(entries):
            if publisher.compile(index, entry, force=force):
                # Who waits for the store has it between two models.
                time.sleep(_YIELD_S)
            publisher.require_precision(entry)
    return publisher.report()


class Publisher:
    """One run over a catalog: publishes or skips single models, and keeps the outcome of each.

    Args:
        store: where to.
        entries: the catalog.
        on_progress: called at every stage of every model.
        source: decides which weights a model gets.
        recorder: makes what is published a version of its project.
        require_weights: see ``publish``.
    """

    def __init__(
        self,
        store: ModelStore,
        entries: Sequence[ModelEntry],
        on_progress: Callable[[PublishEvent], None],
        source: WeightSource,
        recorder: ProjectRecorder,
        require_weights: bool = False,
    ) -> None:
        self._store = store
        self._entries = entries
        self._on_progress = on_progress
        self._source = source
        self._recorder = recorder
        self._require_weights = require_weights
        self._published: list[str] = []
        self._skipped: list[str] = []
        self._refused: list[str] = []
        self._failures: list[PublishFailure] = []
        self._forms: dict[str, tuple[FormOutcome, ...]] = {}

    def is_pending(self, entry: ModelEntry) -> bool:
        """Return whether the store does not have the model as the entry asks for it."""
        try:
            key = self._store.find(entry, self._recorder.state())
            if key is None:
                return True
            manifest = self._store.read(key)
            if not is_made_here(manifest):
                # The library or the processor is another one since.
                return True
            for file in manifest.files:
                self._store.require_verified(file, entry.model_id)
            return manifest.model.fallback and self._available_weights(entry) != manifest.model.weights_actual
        except StoreError:
            return True

    def lacks_forms(self, entry: ModelEntry) -> bool:
        """Return whether the store has the model, but not in all forms that this machine can run."""
        key = self._store.find(entry, self._recorder.state())
        return key is not None and bool(missing_forms(self._store, entry, key))

    def report_wait(self) -> None:
        """Report that another publisher holds the store."""
        if self._entries:
            self._report_stage(0, self._entries[0], "waiting")

    def skip_all(self) -> None:
        """Skip every model."""
        for index, entry in enumerate(self._entries):
            self.skip(index, entry)

    def skip(self, index: int, entry: ModelEntry) -> None:
        """Leave a model as it is in the store; it may be new to the project."""
        self._skipped.append(entry.model_id)
        with contextlib.suppress(StoreError):
            # A store that only others write to is served as it is.
            self._recorder.record(entry, is_new=False)
        self._report_stage(index, entry, "skipped")

    def publish(self, index: int, entry: ModelEntry) -> None:
        """Build and publish a model; a failure is logged and kept for the report. The caller holds ``exclusive``."""

        def on_stage(stage: PublishStage, weights_bytes: int) -> None:
            self._report_stage(index, entry, stage, weights_bytes)

        try:
            on_stage("building", 0)

            def on_bytes(done: int, total: int) -> None:
                self._report_stage(index, entry, "downloading", done, total)

            entry = self._with_task_files(entry, on_bytes)
            manifest = self._made(entry, on_bytes, on_stage)
            self._store.commit(manifest)
            on_stage("published", manifest.model.weights_bytes)
            self._recorder.record(entry, is_new=True)
        except WeightsUnavailable as error:
            logger.error("model %s is not published: %s", entry.model_id, error)
            self._refused.append(entry.model_id)
            on_stage("failed", 0)
        except Exception as error:
            is_foreseen = isinstance(error, StoreError)
            message = str(error) if is_foreseen else f"{type(error).__name__}: {error}"
            logger.error("model %s is not published: %s", entry.model_id, message, exc_info=not is_foreseen)
            self._failures.append(PublishFailure(model_id=entry.model_id, message=message))
            on_stage("failed", 0)
        else:
            self._published.append(entry.model_id)

    def compile(self, index: int, entry: ModelEntry, *, force: bool) -> bool:
        """Make the forms in which a model runs faster; return whether there was one to make.

        One that cannot be made is no failure, unless the entry asks for its precision and no other.
        """
        if not force and not self.lacks_forms(entry):
            return False
        with self._store.exclusive(on_wait=self.report_wait):
            key = self._store.find(entry, self._recorder.state())
            if key is not None:
                outcomes = self._forms[entry.model_id] = publish_forms(
                    self._store, entry, key, lambda: self._report_stage(index, entry, "compiling"), force=force
                )
                if any(each.is_change for each in outcomes):
                    self._recorder.renew()
                if any(each.refusal is not None for each in outcomes):
                    self._store.sweep()
        return True

    def require_precision(self, entry: ModelEntry) -> None:
        """Add a failure where the entry asks for a precision in which the model has no form that agrees enough."""
        key = self._store.find(entry, self._recorder.state())
        if key is None or entry.lowered in ("no", "auto"):
            return
        for kind, form in wanted_forms(self._store, entry, key).items():
            refusal = self._store.forms.refusal(form)
            if kind.precision == entry.lowered and refusal is not None:
                message = (
                    f"it has no form in {entry.lowered}: {refusal.reason}; lower agreement, or write precision: auto"
                )
                self._failures.append(PublishFailure(model_id=entry.model_id, message=message))

    def report(self) -> PublishReport:
        """Return the outcome of the run so far, and log its warning."""
        failed = {failure.model_id for failure in self._failures} | set(self._refused)
        done = [entry for entry in self._entries if entry.model_id not in failed]
        report = PublishReport(
            published=tuple(self._published),
            skipped=tuple(self._skipped),
            fallbacks=tuple(entry.model_id for entry in done if self._falls_back(entry)),
            refused=tuple(self._refused),
            failures=tuple(self._failures),
            versions=self._recorder.versions,
            forms=self._forms,
        )
        if report.warning:
            logger.warning("%s", report.warning)
        return report

    def _falls_back(self, entry: ModelEntry) -> bool:
        key = self._store.find(entry, self._recorder.state())
        return key is not None and self._store.read(key).model.fallback

    def _available_weights(self, entry: ModelEntry) -> str:
        if entry.builder.startswith("onnx:"):
            return entry.weights
        return self._source.choose(entry.weights, registry.pretrained_source(entry))

    def _with_task_files(self, entry: ModelEntry, on_bytes: OnBytes) -> ModelEntry:
        """Return the entry with the files of its task on this machine."""
        task = entry.task
        if task is None:
            return entry
        if task.tokenizer is not None:
            task = dataclasses.replace(task, tokenizer=f"file:{self._source.fetcher.fetch(task.tokenizer, on_bytes)}")
        if task.labels_from is not None:
            labels = read_labels(self._source.fetcher.fetch(task.labels_from, on_bytes))
            task = dataclasses.replace(task, labels=labels)
        return dataclasses.replace(entry, task=task)

    def _made(self, entry: ModelEntry, on_bytes: OnBytes, on_stage: OnStage) -> Manifest:
        """Build and write a model with the weights that can be had; return the manifest that makes it published."""
        kind, _, place = entry.builder.partition(":")
        if kind == "onnx":
            graph = self._source.fetcher.fetch(place, on_bytes)
            return publish_apart(self._store, entry, entry.weights, graph, on_stage)
        if runtime_of(entry) != "torch":
            raise StoreError(f"{entry.builder} is a module, which {entry.runtime} cannot run; leave runtime out")
        weights = self._available_weights(entry)
        if weights != FALLBACK or entry.weights == FALLBACK:
            try:
                file = registry.fetch(entry, weights, self._source, on_bytes)
                return publish_apart(self._store, entry, weights, file, on_stage)
            except DownloadFailed as error:
                if entry.weights != PRETRAINED:
                    raise
                logger.warning("model %s: %s", entry.model_id, error)
        if self._require_weights:
            raise WeightsUnavailable(f"the pretrained weights of {entry.model_id} cannot be fetched")
        logger.warning("model %s gets %s", entry.model_id, FALLBACK)
        return publish_apart(self._store, entry, FALLBACK, None, on_stage)

    def _report_stage(
        self, index: int, entry: ModelEntry, stage: PublishStage, weights_bytes: int = 0, total_bytes: int = 0
    ) -> None:
        self._on_progress(
            PublishEvent(
                model_id=entry.model_id, stage=stage, index=index, total=len(self._entries), bytes=weights_bytes,
                total_bytes=total_bytes,
            )
        )  # fmt: skip
