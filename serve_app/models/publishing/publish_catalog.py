"""Puts models into the store: build, write, load back, compare, measure, commit.

A model is in the store only once its manifest is, and the manifest is written last. A publisher may therefore be
killed at any moment: what was finished stays, the rest is swept by the next one.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from torch import nn

from serve_app.core.catalog import ModelEntry
from serve_app.errors import StoreError
from serve_app.models.builders import registry
from serve_app.models.publishing.publish_model import Step, publish_module
from serve_app.models.weights import FALLBACK, DownloadFailed, Probe, WeightSource
from serve_app.store.model_store import ModelStore, is_publication_of

logger = logging.getLogger(__name__)

Stage = Literal["waiting", "skipped", "building", "failed"] | Step


@dataclass(frozen=True, slots=True, kw_only=True)
class PublishEvent:
    """Progress: model ``index`` (from 0) of ``total`` has reached ``stage``; ``bytes`` of weights, 0 while unknown.

    ``waiting`` means that another publisher holds the store.
    """

    model_id: str
    stage: Stage
    index: int
    total: int
    bytes: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class PublishFailure:
    """A model that could not be published, and why."""

    model_id: str
    message: str


@dataclass(frozen=True, slots=True, kw_only=True)
class PublishReport:
    """What a run did, by model name.

    ``fallbacks`` are all models of the run, published now or before, that serve seeded random weights because the
    pretrained ones could not be fetched.
    """

    published: tuple[str, ...] = ()
    skipped: tuple[str, ...] = ()
    fallbacks: tuple[str, ...] = ()
    failures: tuple[PublishFailure, ...] = ()

    @property
    def warning(self) -> str | None:
        """One sentence about fallback weights that the user must see; None if there is nothing to say."""
        if not self.fallbacks:
            return None
        total = len(self.published) + len(self.skipped) + len(self.failures)
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
) -> PublishReport:
    """Publishes every entry that is missing, incomplete, changed, or on fallback weights that can now be replaced.

    One model that fails does not stop the others. If nothing is to be done, the store is only read.

    Args:
        store: where to.
        entries: the catalogue.
        on_progress: called at every step.
        force: publish again what is there, too.
        reachable: whether a URL can be fetched; asked once per host.

    Raises:
        StoreError: the store cannot be written at all.
    """
    run = _Run(store, entries, on_progress, WeightSource(reachable))
    if not force and not any(run.is_pending(entry) for entry in entries):
        return run.skip_all()
    with store.exclusive(on_wait=run.waiting):
        store.sweep()
        for index, entry in enumerate(entries):
            if force or run.is_pending(entry):  # asked again: another publisher may just have done it
                run.publish(index, entry)
            else:
                run.skip(index, entry)
        store.sweep()
    return run.report()


class _Run:
    """One run of the publisher: what it is to do, and what it has done."""

    def __init__(
        self,
        store: ModelStore,
        entries: Sequence[ModelEntry],
        on_progress: Callable[[PublishEvent], None],
        source: WeightSource,
    ) -> None:
        self._store = store
        self._entries = entries
        self._on_progress = on_progress
        self._source = source
        self._published: list[str] = []
        self._skipped: list[str] = []
        self._failures: list[PublishFailure] = []

    def is_pending(self, entry: ModelEntry) -> bool:
        try:
            manifest = self._store.manifest(entry.model_id)
            self._store.check_sizes(entry.model_id)
            if not is_publication_of(manifest, entry):
                return True
            return manifest.model.fallback and self._actual(entry) != manifest.model.weights_actual
        except StoreError:
            return True

    def waiting(self) -> None:
        if self._entries:
            self._tell(0, self._entries[0], "waiting")

    def skip_all(self) -> PublishReport:
        for index, entry in enumerate(self._entries):
            self.skip(index, entry)
        return self.report()

    def skip(self, index: int, entry: ModelEntry) -> None:
        self._skipped.append(entry.model_id)
        self._tell(index, entry, "skipped")

    def publish(self, index: int, entry: ModelEntry) -> None:
        def tell(stage: Stage, weights_bytes: int) -> None:
            self._tell(index, entry, stage, weights_bytes)

        try:
            tell("building", 0)
            publish_module(self._store, entry, *self._build(entry), tell)
        except Exception as error:
            foreseen = isinstance(error, StoreError)
            message = str(error) if foreseen else f"{type(error).__name__}: {error}"
            logger.error("model %s is not published: %s", entry.model_id, message, exc_info=not foreseen)
            self._failures.append(PublishFailure(model_id=entry.model_id, message=message))
            tell("failed", 0)
        else:
            self._published.append(entry.model_id)

    def report(self) -> PublishReport:
        failed = {failure.model_id for failure in self._failures}
        done = [entry.model_id for entry in self._entries if entry.model_id not in failed]
        report = PublishReport(
            published=tuple(self._published),
            skipped=tuple(self._skipped),
            fallbacks=tuple(model_id for model_id in done if self._store.manifest(model_id).model.fallback),
            failures=tuple(self._failures),
        )
        if report.warning:
            logger.warning("%s", report.warning)
        return report

    def _actual(self, entry: ModelEntry) -> str:
        return self._source.actual(entry.weights, registry.download(entry))

    def _build(self, entry: ModelEntry) -> tuple[str, nn.Module]:
        weights = self._actual(entry)
        try:
            return weights, registry.build(entry, weights)
        except DownloadFailed as error:
            logger.warning("model %s gets %s: %s", entry.model_id, FALLBACK, error)
            download = registry.download(entry)
            if download is not None:
                self._source.give_up(download)
            return FALLBACK, registry.build(entry, FALLBACK)

    def _tell(self, index: int, entry: ModelEntry, stage: Stage, weights_bytes: int = 0) -> None:
        self._on_progress(
            PublishEvent(
                model_id=entry.model_id, stage=stage, index=index, total=len(self._entries), bytes=weights_bytes
            )
        )
