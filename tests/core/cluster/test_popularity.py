"""Rates that forget: what is read back is what was asked for, lately."""

from __future__ import annotations

import pytest

from serve_app.core.cluster.popularity import DecayedRate, Popularity
from serve_app.core.placement.demand import DemandTracker

LN2 = 0.6931471805599453


def test_a_steady_stream_reads_its_rate() -> None:
    rate = DecayedRate(half_life_s=60.0)
    for step in range(10_000):
        rate.add(now=step * 0.25)
    assert rate.per_s(10_000 * 0.25) == pytest.approx(4.0, rel=0.01)


def test_a_request_counts_half_after_every_half_life() -> None:
    rate = DecayedRate(half_life_s=10.0)
    rate.add(now=100.0)
    assert rate.per_s(100.0) == pytest.approx(LN2 / 10)
    assert rate.per_s(110.0) == pytest.approx(LN2 / 20)
    assert rate.per_s(130.0) == pytest.approx(LN2 / 80)


def test_what_was_never_asked_for_has_no_rate() -> None:
    assert DecayedRate(1.0).per_s(5.0) == 0.0


def test_many_at_once_count_as_many_one_by_one() -> None:
    together, apart = DecayedRate(10.0), DecayedRate(10.0)
    together.add(3.0, count=3)
    for _ in range(3):
        apart.add(3.0)
    assert together.per_s(4.0) == pytest.approx(apart.per_s(4.0))
    assert together.requests(3.0) == pytest.approx(3.0)
    assert together.requests(13.0) == pytest.approx(1.5)


def test_reading_changes_nothing() -> None:
    rate = DecayedRate(10.0)
    rate.add(0.0)
    rate.per_s(1000.0)
    assert rate.per_s(0.0) == pytest.approx(LN2 / 10)


def test_a_clock_that_stumbles_back_makes_no_rate_grow() -> None:
    rate = DecayedRate(10.0)
    rate.add(100.0)
    assert rate.per_s(50.0) == rate.per_s(100.0)
    rate.add(90.0)
    assert rate.per_s(100.0) == pytest.approx(2 * LN2 / 10)


@pytest.mark.parametrize("half_life_s", [0.0, -3.0])
def test_a_half_life_must_be_positive(half_life_s: float) -> None:
    with pytest.raises(ValueError, match=f"positive, not {half_life_s}"):
        DecayedRate(half_life_s)


def test_popularity_is_counted_per_location_and_model() -> None:
    popularity = Popularity(half_life_s=10.0)
    popularity.add("paris", "a", 2, now=0.0)
    popularity.add("paris", "b", 1, now=0.0)
    popularity.add("tokyo", "a", 1, now=0.0)
    unit = LN2 / 10
    assert popularity.rates(0.0) == {
        "paris": {"a": pytest.approx(2 * unit), "b": pytest.approx(unit)},
        "tokyo": {"a": pytest.approx(unit)},
    }


def test_models_without_requests_are_forgotten() -> None:
    popularity = Popularity(half_life_s=10.0)
    popularity.add("paris", "old", 1, now=0.0)
    popularity.add("tokyo", "old", 1, now=0.0)
    popularity.add("paris", "new", 1, now=140.0)
    assert popularity.rates(140.0).keys() == {"paris"}
    assert popularity.rates(140.0)["paris"].keys() == {"new"}
    # What is hidden is gone once its memory is asked back.
    assert popularity.pairs == 3
    popularity.forget(140.0)
    assert popularity.pairs == 1
    assert popularity.rates(0.0).keys() == {"paris"}


@pytest.mark.parametrize("half_life_s", [0.001, 60.0, 30 * 86400.0, 1e12])
def test_a_single_request_is_remembered_however_long_the_half_life(half_life_s: float) -> None:
    popularity = Popularity(half_life_s)
    popularity.add("paris", "a", 1, now=0.0)
    assert popularity.rates(half_life_s)["paris"]["a"] > 0


def test_rates_handed_out_do_not_change_afterwards() -> None:
    popularity = Popularity(half_life_s=10.0)
    popularity.add("paris", "a", 1, now=0.0)
    before = popularity.rates(0.0)
    popularity.add("paris", "a", 1, now=0.0)
    popularity.add("paris", "b", 1, now=0.0)
    assert before == {"paris": {"a": pytest.approx(LN2 / 10)}}


def test_a_location_that_asks_for_nothing_any_more_is_forgotten() -> None:
    demand = DemandTracker(10.0, 1.0)
    demand.add("paris", "a", 5, 0.0)
    demand.add("tokyo", "a", 5, 300.0)
    assert set(demand.steady(300.0)) == {"tokyo"}
    assert set(demand.flash_crowds(300.0)) == {"tokyo"}
