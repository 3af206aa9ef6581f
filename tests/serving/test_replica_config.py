"""What follows from the configuration of a replica."""

from __future__ import annotations

import pytest
from fakes import published

from serve_app.config.edge import EdgeSettings
from serve_app.core.catalog import Catalog, ModelEntry
from serve_app.core.versions import VersionRoute
from serve_app.errors import ConfigError
from serve_app.serving.replica_config import ReplicaConfig

MIB = 2**20
CATALOG = Catalog((published("small"), published("big")))
SETTINGS = {
    "locations": {"paris": {"memory": 8 * MIB, "preload": ["small"]}, "tokyo": {"memory": 4 * MIB}},
    "links": [{"between": ["paris", "tokyo"], "rtt": "100ms"}],
    "policy": {"name": "lru"},
    "worker": {"idle_unload": "60s", "hand_over": "3s"},
    "coordinator": {"report_every": "200ms", "horizon": "7s", "withdraw_after": "9s"},
}


def entry(model_id: str, min_copies: int = 0) -> ModelEntry:
    return ModelEntry(model_id=model_id, builder="tests:factory", family="digits", min_copies=min_copies)


def config(location: str | None = "paris", **changes: object) -> ReplicaConfig:
    settings = EdgeSettings.model_validate({**SETTINGS, **changes})
    return ReplicaConfig(settings=settings, entries=(entry("small", 2), entry("big")), location=location, issued=5)


@pytest.mark.parametrize("location", ["paris", None])
def test_a_configuration_survives_the_way_to_its_replica(location: str | None) -> None:
    assert ReplicaConfig.from_json(config(location).to_json()) == config(location)


def test_the_memory_of_a_worker_is_that_of_its_location() -> None:
    for location, memory_bytes in (("paris", 8 * MIB), ("tokyo", 4 * MIB)):
        budget = config(location).memory_budget(CATALOG)
        assert budget.capacity_bytes == memory_bytes


def test_the_gateway_has_neither_memory_nor_models() -> None:
    gateway = config(None)
    for ask in (
        gateway.worker_location,
        lambda: gateway.retention_rules(CATALOG),
        lambda: gateway.memory_budget(CATALOG),
    ):
        with pytest.raises(ConfigError, match="gateway"):
            ask()


def test_a_worker_retains_what_its_location_lists_and_what_must_have_copies() -> None:
    rules = config().retention_rules(CATALOG)
    assert rules.preload == ("small",)
    assert rules.min_copies == {"small": 2}
    assert (rules.idle_unload_s, rules.hand_over_s) == (60.0, 3.0)


def test_routing_expects_a_view_to_be_two_reports_old() -> None:
    rules = config().routing_rules(CATALOG)
    assert rules.staleness_s == pytest.approx(0.4)
    assert rules.horizon_s == 7.0
    assert rules.links["paris", "tokyo"].rtt_s == pytest.approx(0.1)
    assert rules.profiles == CATALOG.profiles()


def test_the_coordinator_follows_the_configuration_that_was_issued_last() -> None:
    rules = config().coordinator_rules(CATALOG)
    assert rules.issued == 5
    assert rules.placement is not None
    assert rules.placement.min_copies == {"small": 2}
    assert rules.placement.rules.withdraw_after_s == 9.0


def test_without_a_period_there_is_no_placement() -> None:
    assert config(coordinator={"placement_every": "off"}).coordinator_rules(CATALOG).placement is None


def test_the_policy_is_the_one_that_is_configured() -> None:
    assert type(config().eviction_policy("paris-1")).__name__.lower() == "lru"


def test_the_coordinator_follows_versions_that_were_published_since() -> None:
    assert config().coordinator_rules(CATALOG).issued == 5
    assert config().coordinator_rules(CATALOG, published_ns=9).issued == 9
    assert config().coordinator_rules(CATALOG, published_ns=4).issued == 5


def test_the_version_that_answers_has_the_copies_that_its_model_must_have() -> None:
    changed = Catalog((published("small"), published("small@2")), {"small": VersionRoute(current=2)})
    assert config().retention_rules(changed).min_copies == {"small@2": 2}
