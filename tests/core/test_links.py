"""The measured links between locations."""

from __future__ import annotations

import random

import pytest

from serve_app.core.links import Link, LinkEstimate, LinkTable

CONFIGURED = Link(rtt_s=0.02, bytes_per_s=1e8)
TRUE = Link(rtt_s=0.08, bytes_per_s=5e7)


def measured(estimate: LinkEstimate, link: Link, count: int, *, noise_s: float = 0.0, seed: int = 0) -> LinkEstimate:
    rng = random.Random(seed)
    for number in range(count):
        payload_bytes = (0, 602_000)[number % 2]
        estimate.add(payload_bytes, link.seconds(payload_bytes) + rng.random() * noise_s)
    return estimate


def test_before_anything_is_measured_the_configured_link_counts() -> None:
    assert LinkEstimate(CONFIGURED).link == CONFIGURED


def test_round_trip_and_bandwidth_are_learned_from_small_and_large_payloads() -> None:
    link = measured(LinkEstimate(CONFIGURED), TRUE, 40).link
    assert link.rtt_s == pytest.approx(TRUE.rtt_s)
    assert link.bytes_per_s == pytest.approx(TRUE.bytes_per_s)


@pytest.mark.parametrize("seed", range(5))
def test_noise_is_smoothed(seed: int) -> None:
    link = measured(LinkEstimate(CONFIGURED), TRUE, 40, noise_s=0.01, seed=seed).link
    assert link.seconds(602_000) == pytest.approx(TRUE.seconds(602_000) + 0.005, abs=0.006)


def test_a_few_calls_that_took_far_too_long_change_nothing() -> None:
    estimate = measured(LinkEstimate(CONFIGURED), TRUE, 40)
    before = estimate.link
    for payload_bytes in (0, 602_000, 0, 602_000):
        estimate.add(payload_bytes, 5.0)
    assert estimate.link.seconds(602_000) == pytest.approx(before.seconds(602_000))


@pytest.mark.parametrize("rtt_s", [0.001, 0.3])
def test_a_link_that_changes_is_followed_within_a_few_measurements(rtt_s: float) -> None:
    estimate = measured(LinkEstimate(CONFIGURED), TRUE, 40)
    measured(estimate, Link(rtt_s=rtt_s, bytes_per_s=TRUE.bytes_per_s), 20)
    assert estimate.link.rtt_s == pytest.approx(rtt_s)


def test_a_payload_that_took_less_than_the_round_trip_makes_no_negative_bandwidth() -> None:
    estimate = LinkEstimate(CONFIGURED)
    for _ in range(20):
        estimate.add(100_000, 0.001)
    assert estimate.link.bytes_per_s > 0
    assert estimate.link.seconds(100_000) == pytest.approx(CONFIGURED.rtt_s, rel=1e-3)


def test_a_table_sends_a_link_when_it_is_new_and_when_it_has_changed() -> None:
    table = LinkTable("paris", lambda here, there: CONFIGURED)
    assert table.changes() == {}
    assert table.link("paris", "tokyo") == CONFIGURED
    for _ in range(9):
        table.add("tokyo", 0, 0.05)
    assert set(table.changes()) == {("paris", "tokyo")}
    table.add("tokyo", 0, 0.0501)
    assert table.changes() == {}
    for _ in range(9):
        table.add("tokyo", 0, 0.2)
    assert table.changes()["paris", "tokyo"].rtt_s == pytest.approx(0.2)
    assert table.changes() == {}
    table.resend()
    assert set(table.changes()) == {("paris", "tokyo")}
