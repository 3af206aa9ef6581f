"""A publisher that kills its own process when one model reaches a given stage."""

import os
import signal
from collections.abc import Iterable
from pathlib import Path

from model_support import offline, tiny

from serve_app.models.publishing import module_files
from serve_app.models.publishing.publish_catalog import PublishEvent, publish
from serve_app.models.threads import use_threads
from serve_app.store.model_store import ModelStore
from serve_app.store.safetensors_writer import BlobLayout

ENTRIES = [tiny("first"), tiny("second", weights="random:4"), tiny("third", weights="random:5")]


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def die_half_written(path: Path, layout: BlobLayout, data: Iterable[memoryview]) -> None:
    path.write_bytes(layout.header)
    die()


def main(root: Path, victim: str, moment: str) -> None:
    """Publish ``ENTRIES``; die when the model ``victim`` reaches ``moment``."""

    def on_progress(event: PublishEvent) -> None:
        if event.model_id == victim and event.stage == "writing" and moment == "half-written":
            module_files.write_blob = die_half_written
        if event.model_id == victim and event.stage == moment:
            die()

    use_threads(1)
    report = publish(ModelStore(root), ENTRIES, on_progress=on_progress, reachable=offline)
    assert not report.failures
