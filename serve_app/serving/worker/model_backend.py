"""What ``ModelManager`` works with: a backend that loads models, an observer of what happens, and a timer."""

from __future__ import annotations

from typing import Protocol

from serve_app.core.cache.decisions import EvictionReason
from serve_app.tasks.tensors import Tensors


class RunnableModel(Protocol):
    """A model in memory."""

    @property
    def form(self) -> str:
        """How it is in memory, see ``PublishedModel.form``."""

    @property
    def own_bytes(self) -> int:
        """What of its memory is no page of a file."""

    def run(self, inputs: Tensors, threads: int = 0) -> Tensors:
        """Execute the model; returns its outputs. ``threads``: of this execution; 0: as many as usual."""

    def unload(self) -> None:
        """Give its memory back."""


class ModelBackend(Protocol):
    """Brings models into memory."""

    def check(self, model_id: str) -> None:
        """Look, in microseconds, whether a load could work; raises ``StoreError`` if not."""

    def load(self, model_id: str) -> RunnableModel:
        """Load one model; called in a thread, for several models at a time."""


class ModelObserver(Protocol):
    """Records what happened, for metrics."""

    def preload_started(self) -> None:
        """A load that no request has asked for begins."""

    def loaded(self, model_id: str, seconds: float) -> None:
        """A load has ended well."""

    def load_failed(self, model_id: str) -> None:
        """A load has failed."""

    def evicted(self, model_id: str, reason: EvictionReason) -> None:
        """A model has been unloaded, or its background load canceled."""


class Timer(Protocol):
    """Something that will be done later."""

    def cancel(self) -> None:
        """Do not do it."""
