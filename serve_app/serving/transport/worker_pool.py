"""What a router needs of the workers of all locations."""

from __future__ import annotations

from typing import Protocol

from serve_app.serving.transport.messages import InferenceRejected, InferenceTask, Reply


class WorkerLost(Exception):
    """A worker died, or could not be reached, with a request under way."""


class WorkerPool(Protocol):
    """Calls the workers of all locations."""

    async def infer(self, location: str, replica: str | None, work: InferenceTask) -> Reply:
        """Run one inference on a replica, or on any of the location if None; raises ``WorkerLost``."""

    async def ping(self, location: str, payload: bytes) -> None:
        """Send a payload to any replica of a location and wait for the answer; raises ``WorkerLost``."""

    async def preload(self, location: str, replica: str, model_id: str) -> None:
        """Have a replica load a model for later requests; raises ``WorkerLost``."""

    async def load(self, location: str, model_id: str) -> InferenceRejected | None:
        """Load a model at a location for an operator."""

    async def unload(self, location: str, replica: str, model_id: str) -> InferenceRejected | None:
        """Unload a model from a replica for an operator."""
