"""What the prediction of next uses promises. The figures are bounds with room to spare: constants may be tuned."""

from __future__ import annotations

import math
import random
from collections.abc import Iterable
from statistics import fmean

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from serve_app.core.policies.rate_forecast import AGE_EDGES_S, RateForecast, RequestHistory

SHORT_S, LONG_S = 100.0, 86400.0
LEAD_S = 0.5


def fresh(now: float = 0.0) -> RateForecast:
    return RateForecast(short_s=SHORT_S, long_s=LONG_S, now=now)


def asked(predictor: RateForecast, times_s: Iterable[float]) -> RequestHistory:
    """A model that was asked for at these times."""
    times = list(times_s)
    known = RequestHistory(times[0])
    for now in times:
        predictor.request(known, now)
    return known


def timer(predictor: RateForecast, period_s: float, ticks: int = 30) -> tuple[RequestHistory, float]:
    """A model that is asked for strictly at intervals, and when that was last."""
    return asked(predictor, (tick * period_s for tick in range(ticks))), (ticks - 1) * period_s


def everything_about(known: RequestHistory) -> list[float]:
    return [
        known.last_s, known.requests, known.counted_s, known.age, known.fast, known.slow, known.gain,
        *known.seen, *known.expected, *known.factor,
    ]  # fmt: skip


# How often


@pytest.mark.parametrize("true_rate", [1.0, 0.1, 0.01, 0.001])
@pytest.mark.parametrize("seed", range(3))
def test_independent_requests_are_predicted_at_about_their_rate(true_rate: float, seed: int) -> None:
    """As each request finds it, which is the mean over time."""
    rng, predictor, known = random.Random(seed), fresh(), RequestHistory(0.0)
    now, found = 0.0, []
    for _ in range(2000):
        now += rng.expovariate(true_rate)
        found.append(predictor.rate(known, LEAD_S, now))
        predictor.request(known, now)
    assert fmean(found[500:]) == pytest.approx(true_rate, rel=0.25)


def test_what_is_asked_for_more_often_has_the_higher_rate() -> None:
    rng, predictor = random.Random(0), fresh()
    models = {true_rate: RequestHistory(0.0) for true_rate in (0.001, 0.01, 0.1)}
    arrivals = sorted(
        (rng.uniform(0, 20_000), true_rate) for true_rate in models for _ in range(int(true_rate * 20_000))
    )
    for now, true_rate in arrivals:
        predictor.request(models[true_rate], now)
    rare, middling, frequent = (predictor.rate(known, LEAD_S, 20_000.0) for known in models.values())
    assert rare < middling < frequent


def test_a_model_without_a_request_has_a_small_rate_that_falls_with_time() -> None:
    predictor, cold = fresh(), RequestHistory(0.0)
    known, now = timer(predictor, 300.0)
    rates = [predictor.rate(cold, LEAD_S, now + later_s) for later_s in (0.0, 3600.0, 86400.0)]
    assert rates == sorted(rates, reverse=True)
    assert rates[-1] > 0
    assert rates[0] < predictor.rate(known, LEAD_S, now) / 5


def test_all_models_without_a_request_have_the_same_rate_whenever_they_were_met() -> None:
    predictor = fresh()
    early, late = RequestHistory(0.0), RequestHistory(5000.0)
    assert predictor.rate(early, LEAD_S, 9000.0) == pytest.approx(predictor.rate(late, LEAD_S, 9000.0))


def test_sessions_teach_it_that_a_new_request_is_followed_by_more_and_steady_demand_that_it_is_not() -> None:
    def rate_after_one_request(gaps_s: tuple[float, ...]) -> float:
        """Of a new model, after others were asked for with these gaps in turn."""
        predictor, now = fresh(), 0.0
        for _ in range(40):
            known = RequestHistory(now)
            for gap_s in gaps_s:
                now += gap_s
                predictor.request(known, now)
            # Nothing else happens until the next model; the time counts as what was promised for this one in vain.
            predictor.rate(known, LEAD_S, now + 3600.0)
        return predictor.rate(asked(predictor, [now]), LEAD_S, now)

    session = (10.0,) * 20
    once_an_hour = (3600.0,) * 20
    assert rate_after_one_request(session) > 5 * rate_after_one_request(once_an_hour)


# How long since the last time


@pytest.mark.parametrize("period_s", [60.0, 300.0, 600.0, 3600.0])
def test_a_timer_is_predicted_when_it_is_due_and_at_no_other_time(period_s: float) -> None:
    predictor = fresh()
    known, last_s = timer(predictor, period_s)
    rate = {share: predictor.rate(known, LEAD_S, last_s + share * period_s) for share in (0.3, 0.5, 1.0, 3.0)}
    assert rate[1.0] > 1 / period_s > 2 * rate[0.3]
    assert rate[1.0] > 5 * max(rate[0.3], rate[0.5], rate[3.0])


def test_a_long_load_sees_a_timer_coming() -> None:
    predictor = fresh()
    known, last_s = timer(predictor, 600.0)
    at_s = last_s + 300.0
    assert predictor.rate(known, 300.0, at_s) > 5 * predictor.rate(known, LEAD_S, at_s)


def test_a_burst_that_has_ended_is_known_to_have_ended() -> None:
    """Ten requests, a second apart, at the top of every hour: two minutes later none is expected."""
    predictor = fresh()
    known = asked(predictor, (hour * 3600.0 + second for hour in range(20) for second in range(10)))
    last_s = 19 * 3600.0 + 9
    during = predictor.rate(known, LEAD_S, last_s + 1.0)
    after = predictor.rate(known, LEAD_S, last_s + 120.0)
    before_the_next = predictor.rate(known, LEAD_S, last_s + 3591.0)
    # The short-term rate alone would have fallen by half.
    assert after < during / 20
    assert before_the_next > after


# When it changes


PASTS = {
    "timer": [tick * 600.0 for tick in range(30)],
    "fast timer": [tick * 60.0 for tick in range(30)],
    "bursts": [hour * 3600.0 + second for hour in range(20) for second in range(10)],
    "two periods": [day * 7200.0 + shift for day in range(20) for shift in (0.0, 500.0)],
    "random": [float(second) for second in sorted(random.Random(3).sample(range(40_000), 60))],
    "once": [100.0],
}


@pytest.mark.parametrize("lead_s", [0.01, 1.0, 30.0])
@pytest.mark.parametrize("past", PASTS)
def test_without_requests_the_rate_rises_only_when_it_was_announced(past: str, lead_s: float) -> None:
    predictor = fresh()
    known = asked(predictor, PASTS[past])
    now = known.last_s
    for _ in range(60):
        rate, rise_s = predictor.rate(known, lead_s, now), predictor.next_rise_s(known, now)
        assert rise_s > now
        until_s = min(rise_s, now + 1e6)
        # A rise that was announced a rounding error too early is announced again, for the next moment.
        if until_s - now > 2 * RateForecast.STEP_S:
            for step in range(1, 20):
                # How far the factors are trusted may move a little meanwhile.
                assert predictor.rate(known, lead_s, now + (until_s - now) * step / 20) <= 1.1 * rate
        now = until_s
        if rise_s == math.inf:
            return
    raise AssertionError("there is no end to the rises")


@pytest.mark.parametrize("past", ["timer", "fast timer", "bursts"])
def test_a_rise_that_was_announced_comes(past: str) -> None:
    predictor = fresh()
    known = asked(predictor, PASTS[past])
    # Well after the last request, so that the rates have little left to decay.
    now = known.last_s + 20.0
    predictor.rate(known, LEAD_S, now)
    rise_s = predictor.next_rise_s(known, now)
    assert rise_s < math.inf
    before = predictor.rate(known, LEAD_S, rise_s - 1e-3)
    assert predictor.rate(known, LEAD_S, rise_s + 1e-3) > before


@pytest.mark.parametrize("past", ["timer", "fast timer", "bursts", "two periods"])
def test_until_a_fall_is_announced_the_rate_falls_hardly_faster_than_the_rates_decay(past: str) -> None:
    predictor = fresh()
    known = asked(predictor, PASTS[past])
    now = known.last_s
    for _ in range(20):
        rate, fall_s = predictor.rate(known, LEAD_S, now), predictor.next_fall_s(known, now)
        assert fall_s > now
        if fall_s == math.inf:
            return
        just_before_s = fall_s - 1e-3
        forgotten = 2 ** -((just_before_s - now) / SHORT_S)
        assert predictor.rate(known, LEAD_S, just_before_s) > 0.4 * forgotten * rate
        now = fall_s


@pytest.mark.parametrize("announce", [RateForecast.next_fall_s, RateForecast.next_rise_s])
@given(
    last_s=st.floats(0, 1e9, allow_subnormal=False),
    edge=st.sampled_from(AGE_EDGES_S[1:-1]),
    lead_s=st.floats(1e-4, 100, allow_subnormal=False),
)
@settings(max_examples=100, deadline=None, derandomize=True)
def test_what_is_announced_lies_ahead(announce: type, last_s: float, edge: float, lead_s: float) -> None:
    """Also where an age ends, where sums of floats do not come out even."""
    predictor = fresh()
    known = asked(predictor, [last_s])
    now = last_s + edge
    predictor.rate(known, lead_s, now)
    assert announce(predictor, known, now) > now


@pytest.mark.parametrize("announce", [RateForecast.next_fall_s, RateForecast.next_rise_s])
@given(last_s=st.floats(0, 1e6, allow_subnormal=False), edge=st.sampled_from(AGE_EDGES_S[1:-1]))
@example(last_s=63.6, edge=4.0)
@settings(max_examples=100, deadline=None, derandomize=True)
def test_what_is_announced_for_a_model_that_loads_in_no_time_lies_ahead(
    announce: type, last_s: float, edge: float
) -> None:
    predictor = fresh()
    known = asked(predictor, [last_s])
    now = last_s + edge
    predictor.rate(known, 0.0, now)
    assert announce(predictor, known, now) > now


# Corners


def test_it_stays_finite_after_years_of_silence() -> None:
    predictor = fresh()
    models = [asked(predictor, past) for past in PASTS.values()]
    for now in (1e6, 1e8, 1e10):
        for known in models:
            rate = predictor.rate(known, LEAD_S, now)
            assert 0 < rate < 1e-3
            predictor.next_fall_s(known, now)
            predictor.next_rise_s(known, now)
    for known in models:
        predictor.request(known, 1e10)
        assert math.isfinite(predictor.rate(known, LEAD_S, 1e10))
        assert all(math.isfinite(value) for value in everything_about(known))


def test_requests_of_the_same_instant_each_count() -> None:
    predictor, known = fresh(), RequestHistory(7.0)
    rates = []
    for _ in range(100):
        predictor.request(known, 7.0)
        rates.append(predictor.rate(known, LEAD_S, 7.0))
    assert known.requests == 100
    assert all(0 < rate < math.inf for rate in rates)
    assert rates[-1] > 10 * rates[0]


def test_while_time_stands_still_nothing_changes() -> None:
    predictor = fresh()
    known = asked(predictor, PASTS["random"])
    now = known.last_s + 100.0
    rate, before = predictor.rate(known, LEAD_S, now), everything_about(known)
    for _ in range(3):
        assert predictor.rate(known, LEAD_S, now) == rate
        predictor.next_fall_s(known, now)
        predictor.next_rise_s(known, now)
    assert everything_about(known) == before


@pytest.mark.parametrize("cuts", [(1.0,), (3.0, 3.5, 200.0), tuple(range(10, 5000, 10)), (4.0, 8.0, 64.0)])
def test_to_ask_on_the_way_changes_nothing(cuts: tuple[float, ...]) -> None:
    """Time may be accounted for in any number of pieces."""
    apart, at_once = fresh(), fresh()
    often, once = (asked(predictor, PASTS["bursts"]) for predictor in (apart, at_once))
    for cut in cuts:
        apart.rate(often, LEAD_S, often.last_s + cut)
    for predictor, known in ((apart, often), (at_once, once)):
        predictor.request(known, known.last_s + 6000.0)
    assert everything_about(often) == pytest.approx(everything_about(once), rel=3e-2)
    assert apart.rate(often, LEAD_S, 1e5) == pytest.approx(at_once.rate(once, LEAD_S, 1e5), rel=3e-2)


def test_each_forecast_begins_at_its_own_time() -> None:
    """Only differences of times count."""
    shift_s = 1e6
    early, late = fresh(), fresh(now=shift_s)
    first = asked(early, PASTS["random"])
    second = asked(late, (shift_s + at_s for at_s in PASTS["random"]))
    now = first.last_s + 50.0
    assert early.rate(first, LEAD_S, now) == pytest.approx(late.rate(second, LEAD_S, now + shift_s))


# Versions


def test_next_version_is_predicted_as_the_one_before_was() -> None:
    predictor = fresh()
    known, now = timer(predictor, 300.0)
    successor = RequestHistory(0.0)
    expected = [predictor.rate(known, lead_s, now + 20) for lead_s in (LEAD_S, 290.0)]
    predictor.hand_over(known, successor, now + 20)
    assert [predictor.rate(successor, lead_s, now + 20) for lead_s in (LEAD_S, 290.0)] == pytest.approx(expected)
    assert predictor.rate(known, LEAD_S, now + 20) == predictor.rate(RequestHistory(0.0), LEAD_S, now + 20)


@pytest.mark.parametrize("since_s", [1.0, 50.0, 1e6])
def test_requests_for_both_versions_add_up(since_s: float) -> None:
    predictor, alone = fresh(), fresh()
    known, successor = asked(predictor, [1.0, 2.0, 4.0]), asked(predictor, [10.0, 11.0])
    both = asked(alone, [1.0, 2.0, 4.0, 10.0, 11.0])
    predictor.rate(known, LEAD_S, 11.0)
    predictor.hand_over(known, successor, 11.0 + since_s)
    alone.rate(both, LEAD_S, 11.0 + since_s)
    assert (successor.last_s, successor.requests, successor.age) == (both.last_s, both.requests, both.age)
    assert (successor.fast, successor.slow) == pytest.approx((both.fast, both.slow))
    assert (successor.fast_left, successor.slow_left) == pytest.approx((both.fast_left, both.slow_left))
