"""What requests may name: models, their versions, and families."""

from __future__ import annotations

import dataclasses

import pytest
from fakes import published

from serve_app.core.catalog import Catalog
from serve_app.core.versions import VersionRoute

MODELS = (published("m"), published("m@2"), dataclasses.replace(published("n"), family=None))


def keys(models: tuple[object, ...]) -> list[str]:
    return [model.model_id for model in models]


def test_a_name_means_the_current_version_and_any_other_is_asked_for_by_number() -> None:
    catalog = Catalog(MODELS, {"m": VersionRoute(current=1)})
    assert keys(catalog.named("m")) == ["m"]
    assert keys(catalog.named("m@2")) == ["m@2"]
    changed = Catalog(MODELS, {"m": VersionRoute(current=2)})
    assert keys(changed.named("m")) == ["m@2"]
    assert keys(changed.named("m@1")) == ["m"]
    assert changed.named("m@3") == ()


def test_a_family_has_the_current_version_of_each_member() -> None:
    catalog = Catalog(MODELS, {"m": VersionRoute(current=2)})
    assert keys(catalog.named("digits")) == keys(catalog.members("digits")) == ["m@2"]


def test_versions_and_names_are_listed_once() -> None:
    catalog = Catalog(MODELS)
    assert (catalog.names, catalog.versions("m"), catalog.versions("n")) == (("m", "n"), (1, 2), (1,))
    assert len(catalog) == 3


def test_a_canary_answers_beside_the_current_version() -> None:
    catalog = Catalog(MODELS, {"m": VersionRoute(current=1, canary=2, canary_share=0.1)})
    assert keys(catalog.answering()) == ["m", "m@2", "n"]
    assert catalog.canaries["m"] == (MODELS[1], 0.1)


def test_the_version_before_may_answer_for_a_while() -> None:
    catalog = Catalog(MODELS, {"m": VersionRoute(current=2)}, {"o": "not published"})
    before = catalog.with_current({"m": 1})
    assert (keys(before.named("m")), before.problems) == (["m"], catalog.problems)


def test_a_model_and_a_family_of_one_name_are_refused() -> None:
    with pytest.raises(ValueError, match="name both a model and a family"):
        Catalog((published("digits"),))
