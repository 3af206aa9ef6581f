"""Generated streams against what was measured on recorded ones.

Figures are means over the seeds, as one stream is one draw of a heavy-tailed population; the tolerances are several
standard errors of such a mean. "Measured" are the figures of the recorded traces. Where the mean of the recipe itself
lies elsewhere, a comment says so, and the test holds what the recipe gives.
"""

from __future__ import annotations

import math
from functools import cache
from itertools import islice
from typing import Any

import numpy as np
import pytest
from trace_statistics import (
    counts,
    iat_cvs,
    log10_count_deviation,
    lru_hit_ratio,
    repeat_share,
    reuse_distances,
    source_repeat_share,
    top_share,
    zipf_mle,
)

from serve_app.errors import TraceError
from serve_app.workload.azure_like import AzureLike
from serve_app.workload.diurnal import FULL_HOUR_FACTOR, HOUR_PROFILE, clock_times
from serve_app.workload.seeded_random import SeededRandom
from serve_app.workload.sessions import Sessions
from serve_app.workload.trace import Trace, column
from serve_app.workload.zipf import ZipfWorkload

pytestmark = pytest.mark.slow

SEEDS = range(8)
#: Of streams with all of their functions, which have millions of calls.
FEW_SEEDS = range(4)
SHARES = (0.05, 0.1, 0.2)


@cache
def functions(seed: int, everything: bool = False) -> Trace:
    kept: dict[str, Any] = {"max_quantile": 1.0, "drop_one_hit": False} if everything else {}
    return AzureLike(seed=seed, **kept).trace()


@cache
def sessions(seed: int) -> Trace:
    return Sessions(seed=seed).trace()


@cache
def lookalike(seed: int) -> Trace:
    """Independent draws with the exponent, the number of models and the requests of the sessions."""
    stream = sessions(seed)
    workload = ZipfWorkload(models=stream.models, locations=("local",), exponent=zipf_mle(stream), seed=seed)
    return workload.trace(len(stream))


def mean(values: Any) -> Any:
    return np.mean(list(values), axis=0)


def lru(stream: Trace) -> list[float]:
    return [lru_hit_ratio(stream, share=share) for share in SHARES]


class TestSeededRandom:
    def test_a_seed_and_a_purpose_always_give_the_same_numbers(self) -> None:
        assert list(SeededRandom(7, "test").uniform(3)) == pytest.approx(FIRST_UNIFORMS, abs=1e-15)

    @pytest.mark.parametrize("cv", [0.1, 0.7, 1.0, 1.3, 8.0])
    def test_gamma_gaps_have_mean_one_and_their_variation(self, cv: float) -> None:
        gaps = SeededRandom(1, f"{cv}").gamma_gaps(cv, 400_000)
        assert gaps.mean() == pytest.approx(1, abs=5 * cv / math.sqrt(len(gaps)))
        # The standard error of a deviation grows with the fourth moment: 3 + 6 cv^2 for the gamma distribution.
        assert gaps.std() == pytest.approx(cv, rel=5 * math.sqrt((2 + 6 * cv**2) / 4 / len(gaps)))

    def test_gamma_gaps_are_distributed_as_those_of_the_standard_library(self) -> None:
        gaps = np.sort(SeededRandom(1, "shape 4").gamma_gaps(0.5, 100_000))
        # Quantiles of the gamma distribution of shape 4, over its mean.
        wanted = {0.1: 0.43619, 0.5: 0.91802, 0.9: 1.67020}
        for share, value in wanted.items():
            assert np.quantile(gaps, share) == pytest.approx(value, rel=0.01)

    def test_normal_numbers_are_normal(self) -> None:
        drawn = SeededRandom(1, "normal").normal(200_000)
        assert np.quantile(drawn, [0.0228, 0.1587, 0.5, 0.8413, 0.9772]) == pytest.approx([-2, -1, 0, 1, 2], abs=0.03)

    def test_picks_follow_the_weights_and_orders_are_permutations(self) -> None:
        picked = np.bincount(SeededRandom(1, "pick").pick(np.array([1.0, 0.0, 3.0]), 40_000), minlength=3)
        assert picked[1] == 0
        assert picked[2] / picked[0] == pytest.approx(3, rel=0.05)
        assert sorted(SeededRandom(1, "order").order(100)) == list(range(100))


class TestDiurnal:
    def test_requests_follow_the_hours_of_the_day_and_peak_at_the_full_hour(self) -> None:
        times = clock_times(np.linspace(0, 1, 2_000_000, endpoint=False), start_hour=20, minutes=1440)
        by_minute = np.bincount((times // 60).astype(int), minlength=1440).reshape(24, 60)
        assert by_minute[:, 0] / by_minute[:, 1] == pytest.approx([FULL_HOUR_FACTOR] * 24, rel=0.01)
        by_hour = by_minute[:, 1:].mean(axis=1)
        assert by_hour / by_hour[4] == pytest.approx(np.roll(HOUR_PROFILE, 4) / HOUR_PROFILE[0], rel=0.01)

    def test_the_end_of_the_stream_is_not_part_of_it(self) -> None:
        assert clock_times(np.array([1.0]), start_hour=0, minutes=2)[0] < 120


class TestAzureLike:
    def test_a_tenth_of_the_functions_has_nearly_all_calls(self) -> None:
        # Measured: 0.98. One stream is 0.945 to 0.989, by how the few busiest functions turn out.
        assert mean(top_share(functions(seed, True), share=0.1) for seed in FEW_SEEDS) == pytest.approx(0.97, abs=0.02)

    def test_calls_spread_over_orders_of_magnitude(self) -> None:
        # Measured: 1.13.
        assert mean(log10_count_deviation(functions(s, True)) for s in FEW_SEEDS) == pytest.approx(1.15, abs=0.06)

    def test_as_many_functions_are_called_once_and_more_than_a_timer_can_be_as_recorded(self) -> None:
        calls = [counts(functions(seed, True)) for seed in FEW_SEEDS]
        # Measured: .134, and .092 above two calls a minute.
        assert mean((each == 1).mean() for each in calls) == pytest.approx(0.14, abs=0.02)
        assert mean((each > 2 * 480).mean() for each in calls) == pytest.approx(0.10, abs=0.02)

    def test_functions_are_as_regular_as_the_recorded_ones(self) -> None:
        # Measured: .11, .45, 1.15.
        quartiles = mean(np.quantile(iat_cvs(functions(seed, True)), [0.25, 0.5, 0.75]) for seed in FEW_SEEDS)
        assert list(quartiles) == pytest.approx([0.11, 0.45, 1.12], rel=0.15)

    def test_popularity_after_the_filter_is_that_of_the_recorded_functions(self) -> None:
        # Measured: exponent about 1.0, .59 (and .93 and .65 by the definitions used here on the public excerpt).
        assert mean(zipf_mle(functions(seed)) for seed in SEEDS) == pytest.approx(0.92, abs=0.05)
        assert mean(top_share(functions(seed), share=0.1) for seed in SEEDS) == pytest.approx(0.65, abs=0.06)

    def test_lru_after_the_filter_hits_somewhat_less_than_on_the_recorded_functions(self) -> None:
        # Measured: .39, .55, .77 (and .35, .54, .72 by the definitions used here on the public excerpt). The classes
        # are independent of each other, so fewer calls come in groups: the smallest cache loses most.
        small, middle, large = mean(lru(functions(seed)) for seed in SEEDS)
        assert small == pytest.approx(0.28, abs=0.06)
        assert middle == pytest.approx(0.50, abs=0.06)
        assert large == pytest.approx(0.69, abs=0.06)

    def test_the_filter_keeps_as_many_functions_as_of_the_recorded_ones(self) -> None:
        # Measured: 408 of 500.
        assert mean(len(functions(seed).models) for seed in SEEDS) == pytest.approx(404, abs=8)
        assert all(counts(functions(seed)).min() >= 2 for seed in SEEDS)

    def test_timers_tick(self) -> None:
        """A third of the functions is called in minutes that are a period apart, and mostly once in each."""
        stream = functions(1, True)
        model, minute = column(stream.model), column(stream.arrival_s) // 60
        calls = []
        for index in np.flatnonzero(counts(stream) >= 8):
            ticks, at_once = np.unique(minute[model == index], return_counts=True)
            if len(ticks) > 2 and len(set(np.diff(ticks))) == 1 and len(set(at_once)) == 1 and at_once[0] <= 2:
                calls.append(at_once[0])
        assert len(calls) / 500 == pytest.approx(0.336, abs=0.05)
        assert (np.median(calls), np.quantile(calls, 0.9)) == (1, 2)

    def test_arrivals_are_real_seconds_within_the_stream(self) -> None:
        arrival_s = column(functions(0).arrival_s)
        assert 0 <= arrival_s[0] < arrival_s[-1] < 480 * 60
        # Within a minute all arrivals differ, except in bursts whose gaps are below the resolution of the time.
        assert len(np.unique(arrival_s % 60)) > 0.9 * len(arrival_s)

    def test_functions_above_the_cap_are_dropped_and_the_others_stay_as_they_were(self) -> None:
        free, capped = functions(0, True), AzureLike(
            seed=0, rate_cap_per_min=2, max_quantile=1.0, drop_one_hit=False
        ).trace()  # fmt: skip
        before = dict(zip(free.models, counts(free), strict=True))
        after = dict(zip(capped.models, counts(capped), strict=True))
        assert after == {name: calls for name, calls in before.items() if calls <= 2 * 480}
        assert 0 < len(after) < len(before)

    def test_a_seed_always_gives_the_same_stream(self) -> None:
        assert AzureLike(seed=3, functions=50).trace() == AzureLike(seed=3, functions=50).trace()
        assert AzureLike(seed=3, functions=50).trace() != AzureLike(seed=4, functions=50).trace()

    def test_every_function_is_a_source(self) -> None:
        stream = AzureLike(functions=50).trace()
        pairs = set(zip(stream.model, stream.source, strict=True))
        assert len(pairs) == len(stream.models) == len(set(stream.source))

    def test_a_stream_without_functions_is_refused(self) -> None:
        with pytest.raises(TraceError, match="tiny: no function is left; make functions or minutes more"):
            AzureLike(functions=1, minutes=1, seed=1).trace("tiny")

    @pytest.mark.parametrize(
        ("changes", "complaint"),
        [
            ({"functions": 0}, "functions must be from 1 to 1000000, not 0"),
            ({"minutes": 0}, "minutes must be from 1 to"),
            ({"start_hour": 24}, "start_hour must be from 0 to 23, not 24"),
            ({"rate_cap_per_min": math.nan}, "rate_cap_per_min must be positive, not nan"),
            ({"max_quantile": 0.0}, "max_quantile must be above 0 and at most 1, not 0.0"),
        ],
    )
    def test_bad_arguments_are_named(self, changes: dict[str, Any], complaint: str) -> None:
        with pytest.raises(ValueError, match=complaint):
            AzureLike(**changes)


class TestSessions:
    def test_popularity_is_that_of_the_recorded_sessions(self) -> None:
        # Measured: 1.43, .31.
        assert mean(zipf_mle(sessions(seed)) for seed in SEEDS) == pytest.approx(1.40, abs=0.04)
        assert mean(counts(sessions(s)).max() / len(sessions(s)) for s in SEEDS) == pytest.approx(0.305, abs=0.02)

    def test_models_come_back_as_soon_as_in_the_recorded_sessions(self) -> None:
        # Measured: 2, 10, 41.
        distances = mean(np.quantile(reuse_distances(sessions(seed)), [0.5, 0.9, 0.99]) for seed in SEEDS)
        assert list(distances) == pytest.approx([2, 11, 38], abs=2)

    def test_lru_hits_as_on_the_recorded_sessions(self) -> None:
        # Measured: .66, .88, .95. Fewer sessions overlap than there, so the smallest cache hits more.
        assert list(mean(lru(sessions(seed)) for seed in SEEDS)) == pytest.approx([0.74, 0.86, 0.935], abs=0.02)

    def test_requests_for_a_model_come_in_bursts(self) -> None:
        # Measured: 2.5.
        assert mean(np.median(iat_cvs(sessions(seed))) for seed in SEEDS) == pytest.approx(2.15, abs=0.15)

    def test_users_stay_with_their_model(self) -> None:
        # Measured: .73 within a session. A redraw, with probability .27, may give the same model again.
        assert mean(source_repeat_share(sessions(seed)) for seed in SEEDS) == pytest.approx(0.75, abs=0.02)

    def test_a_request_is_often_for_the_model_of_the_one_before(self) -> None:
        # Measured: .25. The recipe's sessions overlap less: about 1.4 of them at a time.
        assert mean(repeat_share(sessions(seed)) for seed in SEEDS) == pytest.approx(0.355, abs=0.03)

    def test_independent_draws_of_the_same_popularity_do_not_reproduce_it(self) -> None:
        # Measured: LRU at a tenth of the models falls to .68.
        same, other = mean(lru(sessions(seed)) for seed in SEEDS), mean(lru(lookalike(seed)) for seed in SEEDS)
        steepness = [mean(zipf_mle(stream(seed)) for seed in SEEDS) for stream in (sessions, lookalike)]
        assert steepness[0] == pytest.approx(steepness[1], abs=0.02)
        assert other[1] == pytest.approx(0.65, abs=0.03)
        assert (same - other > [0.2, 0.15, 0.1]).all()
        assert mean(np.median(iat_cvs(lookalike(seed))) for seed in SEEDS) == pytest.approx(1, abs=0.05)

    def test_popularity_changes_from_day_to_day(self) -> None:
        stream = Sessions(days=2, sessions_per_day=30_000, seed=1).trace()
        model, day = column(stream.model), column(stream.arrival_s) // 86_400
        first, second = (np.bincount(model[day == number], minlength=86)[:40] for number in (0, 1))
        # The difference of two normal logarithms of deviation 0.5; that of 40 of them is known to a ninth of itself.
        assert np.log(second / first).std() == pytest.approx(0.5 * math.sqrt(2), abs=0.16)

    def test_weekends_are_quiet(self) -> None:
        days = [(column(sessions(seed).arrival_s) // 86_400).astype(int) for seed in SEEDS]
        by_day = sum(np.bincount(day, minlength=31)[:28] for day in days)
        by_weekday = np.reshape(by_day, (4, 7)).sum(axis=0)
        # The factors of the days are random, with a deviation of 0.65 over their mean: 32 and 80 days are compared.
        assert by_weekday[5:].mean() / by_weekday[:5].mean() == pytest.approx(0.45, abs=0.12)

    def test_sessions_per_day_are_as_configured(self) -> None:
        # The mean factor of a day is exp(0.6^2 / 2), that of a week (5 + 2 x 0.45) / 7; a session has 4.3 requests.
        wanted = 257 * 30 * math.exp(0.18) * 5.9 / 7 * 4.3
        assert mean(len(sessions(seed)) for seed in SEEDS) == pytest.approx(wanted, rel=0.1)

    def test_the_number_of_users_does_not_change_the_models(self) -> None:
        few, many = (Sessions(days=3, users=users).trace() for users in (20, 400))
        assert (few.arrival_s, few.model) == (many.arrival_s, many.model)
        assert len(set(few.source)) < len(set(many.source))

    def test_a_seed_always_gives_the_same_stream(self) -> None:
        assert Sessions(days=3, seed=3).trace() == Sessions(days=3, seed=3).trace()
        assert Sessions(days=3, seed=3).trace() != Sessions(days=3, seed=4).trace()

    def test_too_few_and_too_many_requests_are_refused(self) -> None:
        with pytest.raises(TraceError, match="no session begins"):
            Sessions(days=1, sessions_per_day=1e-9).trace()
        with pytest.raises(TraceError, match="more than 100000000 requests"):
            Sessions(days=1, sessions_per_day=1e12).trace()

    @pytest.mark.parametrize(
        ("changes", "complaint"),
        [
            ({"days": 0}, "days must be from 1 to 3660, not 0"),
            ({"models": 0}, "models must be from 1 to 1000000, not 0"),
            ({"sessions_per_day": math.inf}, "sessions_per_day must be positive and finite, not inf"),
            ({"users": 0}, "users must be at least 1, not 0"),
        ],
    )
    def test_bad_arguments_are_named(self, changes: dict[str, Any], complaint: str) -> None:
        with pytest.raises(ValueError, match=complaint):
            Sessions(**changes)


class TestZipf:
    def test_a_trace_is_the_beginning_of_the_stream(self) -> None:
        workload = ZipfWorkload(models=("a", "b", "c"), locations=("x", "y"), location_skew=0.5, seed=3)
        stream = workload.trace(500)
        assert stream.location is not None
        rows = zip(stream.arrival_s, stream.model, stream.location, strict=True)
        assert [(at, stream.models[model], stream.locations[where]) for at, model, where in rows] == [
            (request.arrival_s, request.model_id, request.location) for request in islice(workload.requests(), 500)
        ]

    def test_models_that_are_not_drawn_are_not_in_the_trace(self) -> None:
        stream = ZipfWorkload(models=tuple(map(str, range(1_000))), locations=("x",)).trace(50)
        assert len(stream.models) == len(set(stream.model)) < 50
        assert stream.location is None

    @pytest.mark.parametrize("cv", [0.3, 1.0, 3.0])
    def test_gamma_gaps_have_the_configured_rate_and_variation(self, cv: float) -> None:
        workload = ZipfWorkload(models=("a",), locations=("x",), rate_per_s=20.0, arrivals="gamma", cv=cv)
        gaps = np.diff(column(workload.trace(40_000).arrival_s))
        assert gaps.mean() == pytest.approx(1 / 20, rel=5 * cv / 200)
        assert gaps.std() / gaps.mean() == pytest.approx(cv, rel=0.08)

    def test_the_number_of_requests_is_bounded(self) -> None:
        with pytest.raises(ValueError, match="requests must be from 1 to 100000000, not 0"):
            ZipfWorkload(models=("a",), locations=("x",)).trace(0)


#: A change of these numbers changes every published stream.
FIRST_UNIFORMS = [0.16619329418618745, 0.8334321817038896, 0.8872123857195016]
