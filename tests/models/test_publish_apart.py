"""Whatever the code of a model does, the publisher lives, says so, and publishes the other models."""

from __future__ import annotations

import dataclasses
import logging
import os
import signal

import pytest
from model_support import check_content, offline, tiny

from serve_app.core.catalog import ModelEntry
from serve_app.models.publishing.publish_catalog import PublishReport, publish
from serve_app.store.model_store import ModelStore

pytestmark = pytest.mark.slow


def crashing(factory: str) -> ModelEntry:
    return dataclasses.replace(tiny("odd"), builder=f"crashing_models:{factory}")


def published_between(store: ModelStore, odd: ModelEntry) -> PublishReport:
    return publish(store, [tiny("before"), odd, tiny("after", weights="random:9")], reachable=offline)


@pytest.mark.parametrize(
    ("factory", "sentence"),
    [
        ("segfault", "crashes its process (SIGSEGV) when it is built and run; it cannot be served"),
        ("abort", "crashes its process (SIGABRT) when it is built and run; it cannot be served"),
        ("CrashesWhenRun", "crashes its process (SIGABRT) when it is built and run; it cannot be served"),
        ("leave_at_once", "ends its process (status 4) when it is built and run; it cannot be served"),
        ("out_of_memory", "has used up the memory of this machine when it was built and run"),
    ],
)
def test_model_that_ends_its_process_is_a_sentence_and_the_others_are_published(
    store: ModelStore, factory: str, sentence: str
) -> None:
    report = published_between(store, crashing(factory))
    (failure,) = report.failures
    assert failure.message.startswith(f"crashing_models:{factory} {sentence}")
    assert "\n" not in failure.message
    assert (report.published, store.published()) == (("before", "after"), ("after", "before"))
    for name in report.published:
        check_content(store, name)
    assert len(list((store.root / "blobs").iterdir())) == len(report.published)


def test_module_that_ends_its_process_when_it_is_imported_is_refused(
    store: ModelStore, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path_factory.mktemp("code")
    (folder / "ends_when_imported.py").write_text("import os\nos.abort()\n")
    monkeypatch.syspath_prepend(folder)
    odd = ModelEntry(model_id="odd", builder="ends_when_imported:model", weights="pretrained")
    report = published_between(store, odd)
    assert report.published == ("before", "after")
    assert "crashes its process (SIGABRT)" in report.failures[0].message


def test_what_a_factory_logs_is_logged_by_the_publisher(store: ModelStore, caplog: pytest.LogCaptureFixture) -> None:
    report = publish(store, [crashing("tells")], reachable=offline)
    assert report.published == ("odd",)
    assert ("hospital.models", logging.WARNING, "weights of 2019 are old") in caplog.record_tuples


def test_interrupted_publisher_leaves_nothing_and_can_go_on(store: ModelStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PUBLISHER", str(os.getpid()))
    # Whoever starts the tests in the background of a shell script has them ignore it.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            published_between(store, crashing("interrupted"))
    finally:
        signal.signal(signal.SIGINT, before)
    assert store.published() == ("before",)
    report = published_between(store, tiny("odd", weights="random:7"))
    assert (report.published, report.skipped) == (("odd", "after"), ("before",))
