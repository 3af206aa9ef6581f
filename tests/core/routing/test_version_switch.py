"""When a router goes over to the next version of a model."""

from __future__ import annotations

import dataclasses

from fakes import published, report

from serve_app.core.catalog import Catalog
from serve_app.core.routing.version_switch import VersionSwitch
from serve_app.core.versions import VersionRoute, version_key


def catalog(current: int, *, versions: int = 2, **route: object) -> Catalog:
    models = tuple(published(version_key("m", number)) for number in range(1, versions + 1))
    return Catalog(models, {"m": VersionRoute(current=current, **route)})


def switched(*reports: object, then: Catalog | None = None, now: float = 0.0) -> dict[str, int]:
    """Which other version than the current one answers, after the catalog has gone from version 1 to 2."""
    switch = VersionSwitch()
    switch.advance(catalog(1), reports, 0.0)
    switch.advance(then or catalog(2), reports, 0.0)
    return switch.advance(then or catalog(2), reports, now)


def test_the_version_before_answers_while_it_is_held_and_the_next_is_not_loaded() -> None:
    assert switched(report("paris", "m")) == {"m": 1}


def test_the_next_version_answers_once_a_worker_has_loaded_it() -> None:
    assert switched(report("paris", "m"), report("tokyo", "m", "m@2")) == {}


def test_a_version_that_still_loads_does_not_answer() -> None:
    loading = report("paris", "m", "m@2")
    models = {key: dataclasses.replace(model) for key, model in loading.models.items()}
    models["m@2"] = dataclasses.replace(models["m@2"], state=type(models["m"].state).LOADING)
    assert switched(dataclasses.replace(loading, models=models)) == {"m": 1}


def test_where_nobody_holds_the_version_before_the_next_answers_at_once() -> None:
    assert switched(report("paris")) == {}
    assert switched() == {}


def test_a_rollback_waits_for_nothing() -> None:
    assert switched(report("paris", "m"), then=catalog(2, at_once=True)) == {}


def test_a_version_that_is_gone_does_not_answer() -> None:
    only_second = Catalog((published("m@2"),), {"m": VersionRoute(current=2)})
    assert switched(report("paris", "m"), then=only_second) == {}


def test_after_a_while_the_next_version_answers_though_there_was_no_room_to_load_it() -> None:
    held = report("paris", "m")
    assert switched(held, now=VersionSwitch.SWITCH_WITHIN_S - 0.1) == {"m": 1}
    assert switched(held, now=VersionSwitch.SWITCH_WITHIN_S) == {}


def test_a_version_that_no_worker_can_load_never_answers() -> None:
    broken = report("paris", "m", unusable={"m@2": "its factory fails"})
    assert switched(broken, now=1000.0) == {"m": 1}
    assert switched(broken, report("paris"), now=1000.0) == {}
