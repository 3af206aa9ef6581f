"""Forms of lower precision: what lets them in, what keeps them out, and who never gets one."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from model_support import classify, images, offline, tiny

from serve_app.core.catalog import ModelEntry
from serve_app.core.forms import key_of_tier
from serve_app.models.loader import ModelLoader
from serve_app.models.publishing import publish_forms
from serve_app.models.publishing.publish_catalog import PublishReport, publish
from serve_app.models.publishing.publish_forms import refused_forms
from serve_app.models.runtimes.environment import environments
from serve_app.models.runtimes.processor import computes_in_bfloat16
from serve_app.store.manifest import ManifestKey
from serve_app.store.model_store import ModelStore

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif("openvino" not in environments(), reason="openvino is not installed"),
]
needs_bfloat16 = pytest.mark.skipif(not computes_in_bfloat16(), reason="the processor has no bfloat16")

DECIDED = tiny("decided", "Deep", runtime="auto", lowered="auto")
UNDECIDED = tiny("undecided", "Undecided", runtime="auto", lowered="auto")


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> tuple[ModelStore, PublishReport]:
    """A store with a model whose lower precisions agree, and with one whose do not."""
    store = ModelStore(tmp_path_factory.mktemp("precisions"))
    return store, publish(store, [DECIDED, UNDECIDED], reachable=offline)


@pytest.fixture
def store(published: tuple[ModelStore, PublishReport], tmp_path: Path) -> ModelStore:
    """A copy of it to change."""
    return ModelStore(shutil.copytree(published[0].root, tmp_path / "store", copy_function=shutil.copy))


def key_of(store: ModelStore, entry: ModelEntry) -> ManifestKey:
    key = store.find(entry)
    assert key is not None
    return key


def forms(store: ModelStore, entry: ModelEntry) -> set[str]:
    """The forms that serve an entry, now and once it has gone over."""
    catalog = store.select([entry], environments=environments()).catalog
    return {model.form for model in (catalog[entry.model_id], *catalog.faster.get(entry.model_id, ()))}


@needs_bfloat16
def test_bfloat16_that_agrees_serves_and_its_manifest_says_how_far(
    published: tuple[ModelStore, PublishReport],
) -> None:
    store, report = published
    outcome = next(each for each in report.forms["decided"] if each.form == "openvino-bfloat16")
    assert outcome.refusal is None
    assert forms(store, DECIDED) & {"openvino-bfloat16", "onnxruntime-int8"}
    place = store.forms.keys(key_of(store, DECIDED), environments(), ("bfloat16",)).popitem()[1]
    agreement = store.read(place).agreement
    assert agreement == outcome.agreement
    assert agreement is not None
    assert agreement.share >= 0.99
    assert agreement.probes >= 100
    assert "photographs, with random weights" in agreement.inputs


@needs_bfloat16
def test_bfloat16_that_does_not_agree_is_refused_with_the_share(published: tuple[ModelStore, PublishReport]) -> None:
    store, report = published
    outcome = next(each for each in report.forms["undecided"] if each.form == "openvino-bfloat16")
    assert outcome.agreement is not None
    assert outcome.agreement.share < 0.99
    assert outcome.refusal is not None
    assert f"{outcome.agreement.share:.2%} of {outcome.agreement.probes}" in outcome.refusal
    assert "99.00% are asked for" in outcome.refusal
    assert refused_forms(store, UNDECIDED, key_of(store, UNDECIDED))["openvino-bfloat16"].reason == outcome.refusal
    assert forms(store, UNDECIDED) <= {"mapped", "onnxruntime", "openvino"}


def test_an_entry_that_says_nothing_is_never_served_in_lower_precision(
    published: tuple[ModelStore, PublishReport],
) -> None:
    plain = replace(DECIDED, lowered="no")
    assert key_of(published[0], plain) == key_of(published[0], DECIDED), "it is the same model"
    assert forms(published[0], plain) <= {"mapped", "onnxruntime", "openvino"}


@needs_bfloat16
def test_the_catalog_may_ask_for_less_agreement_and_for_more_again(store: ModelStore) -> None:
    lenient = replace(UNDECIDED, agreement=0.0)
    report = publish(store, [lenient], reachable=offline)
    assert "openvino-bfloat16" in [each.form for each in report.forms["undecided"] if each.refusal is None]
    assert forms(store, lenient) & {"openvino-bfloat16", "onnxruntime-int8"}
    assert forms(store, UNDECIDED) <= {"mapped", "onnxruntime", "openvino"}
    reasons = refused_forms(store, UNDECIDED, key_of(store, UNDECIDED))
    assert "99.00% are asked for" in reasons["openvino-bfloat16"].reason


def test_who_asks_for_int8_alone_is_told_how_far_it_agrees_where_that_is_too_little(store: ModelStore) -> None:
    (failure,) = publish(store, [replace(UNDECIDED, lowered="int8")], reachable=offline).failures
    assert failure.model_id == "undecided"
    assert "no form in int8" in failure.message
    assert "the same best class on " in failure.message
    assert forms(store, replace(UNDECIDED, lowered="int8")) <= {"mapped", "onnxruntime", "openvino"}


def test_who_asks_for_int8_alone_is_served_by_it_where_it_agrees(store: ModelStore) -> None:
    entry = replace(UNDECIDED, lowered="int8", agreement=0.0)
    assert not publish(store, [entry], reachable=offline).failures
    assert forms(store, entry) == {"onnxruntime-int8"}
    loader = ModelLoader(store)
    loader.select(store.select([entry], environments=environments()).manifests)
    model = loader.load(entry.model_id)
    assert model.form == "onnxruntime-int8"
    assert classify(model, images(1, 32)).shape == (1, 16)
    model.unload()


def test_a_processor_without_bfloat16_makes_no_such_form(store: ModelStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(publish_forms, "computes_in_bfloat16", lambda: False)
    report = publish(store, [DECIDED], reachable=offline, force=True)
    outcome = next(each for each in report.forms["decided"] if each.form == "openvino-bfloat16")
    assert outcome.refusal == "this processor has no instructions for bfloat16"
    assert "openvino-bfloat16" not in forms(store, DECIDED)


@needs_bfloat16
@pytest.mark.parametrize("harm", ["truncated", "deleted"])
def test_a_damaged_form_of_openvino_leaves_the_model_as_it_was_published(store: ModelStore, harm: str) -> None:
    place = store.forms.keys(key_of(store, DECIDED), environments(), ("bfloat16",)).popitem()[1]
    for file in store.read(place).files:
        path = store.blob_path(file.name)
        path.chmod(0o644)
        if harm == "truncated":
            path.write_bytes(b"\0" * 100)
        else:
            path.unlink()
    loader = ModelLoader(store)
    loader.select({"decided": place, key_of_tier("decided", 1): place})
    model = loader.load("decided")
    assert model.form == "mapped"
    assert classify(model, images(1, 32)).shape == (1, 16)
    model.unload()


def test_a_store_of_earlier_versions_is_read_and_gets_the_forms_that_are_missing(store: ModelStore) -> None:
    key = key_of(store, DECIDED)
    places = store.forms.keys(key, environments(), DECIDED.precisions)
    for kind, place in places.items():
        path = store.forms.path(place)
        refusal = store.forms.refusal(place)
        if kind.form != "onnxruntime":
            path.unlink(missing_ok=True)
            path.with_suffix(".refused").unlink(missing_ok=True)
        assert kind.form != "onnxruntime" or refusal is None
    # Earlier versions have written the reason alone, and this form has the name that they have given it.
    first = next(iter(places.values()))
    assert first.form.startswith("onnxruntime-")
    assert forms(store, DECIDED) <= {"mapped", "onnxruntime"}
    store.forms.path(places[list(places)[1]]).with_suffix(".refused").write_text("it crashes")
    report = publish(store, [DECIDED], reachable=offline)
    assert "openvino" not in [each.form for each in report.forms["decided"]], "it is not tried again"
    assert refused_forms(store, DECIDED, key)["openvino"].reason == "it crashes"
    assert {each.form for each in report.forms["decided"]} == {"openvino-bfloat16", "onnxruntime-int8"}
