"""A publisher that kills its own process when one model reaches a given stage."""

import dataclasses
import os
import signal
from pathlib import Path

from model_support import offline, tiny

from serve_app.models.publishing.publish_catalog import PublishEvent, publish
from serve_app.models.threads import use_threads
from serve_app.store.model_store import ModelStore

ENTRIES = [
    tiny("first"),
    dataclasses.replace(tiny("second", weights="random:4"), builder="crashing_models:half_written"),
    tiny("third", weights="random:5"),
]


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def main(root: Path, victim: str, moment: str) -> None:
    """Publish ``ENTRIES``; die when the model ``victim`` reaches ``moment``."""

    def on_progress(event: PublishEvent) -> None:
        if event.model_id == victim and event.stage == "building" and moment == "half-written":
            os.environ["DIE_HALF_WRITTEN"] = str(os.getpid())
        if event.model_id == victim and event.stage == moment:
            die()

    use_threads(1)
    report = publish(ModelStore(root), ENTRIES, on_progress=on_progress, reachable=offline)
    assert not report.failures
