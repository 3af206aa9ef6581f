import math
from collections import Counter
from itertools import combinations, islice, pairwise
from typing import Any

import pytest

from serve_app.workload.request import Request
from serve_app.workload.zipf import ZipfWorkload

MODELS = tuple(f"m{number}" for number in range(20))
LOCATIONS = ("paris", "tokyo", "virginia")


def workload(**changes: Any) -> ZipfWorkload:
    return ZipfWorkload(**{"models": MODELS, "locations": LOCATIONS, "seed": 7, **changes})


def take(stream: ZipfWorkload, count: int) -> list[Request]:
    return list(islice(stream.requests(), count))


def agreement(stream: ZipfWorkload) -> float:
    """Mean Spearman correlation between the rankings of any two locations."""
    count, coefficients = len(stream.models), []
    for one, other in combinations(stream.locations, 2):
        place = {model: rank for rank, model in enumerate(stream.ranking(other))}
        squares = sum((rank - place[model]) ** 2 for rank, model in enumerate(stream.ranking(one)))
        coefficients.append(1 - 6 * squares / (count * (count**2 - 1)))
    return sum(coefficients) / len(coefficients)


@pytest.mark.parametrize("exponent", [0.0, 0.8, 1.4])
def test_frequencies_follow_the_definition(exponent: float) -> None:
    requests = take(workload(exponent=exponent), 30_000)
    counted = Counter(request.model_id for request in requests)
    harmonic = sum(rank**-exponent for rank in range(1, len(MODELS) + 1))
    chi_square = 0.0
    for rank, model in enumerate(MODELS, start=1):
        expected = len(requests) * rank**-exponent / harmonic
        chi_square += (counted[model] - expected) ** 2 / expected
    # 43.8 is the 99.9th percentile with 19 degrees of freedom.
    assert chi_square < 43.8


def test_probabilities_add_up_to_one_and_fall_as_a_power_of_the_rank() -> None:
    probabilities = workload(exponent=1.2).probabilities()
    assert math.isclose(sum(probabilities), 1.0)
    assert math.isclose(probabilities[0] / probabilities[9], 10**1.2)


def test_locations_send_equal_shares() -> None:
    counted = Counter(request.location for request in take(workload(), 30_000))
    assert set(counted) == set(LOCATIONS)
    assert all(abs(count - 10_000) < 350 for count in counted.values())


def test_consecutive_requests_are_independent() -> None:
    requests = take(workload(exponent=1.0), 30_000)
    repeats = sum(one.model_id == other.model_id for one, other in pairwise(requests))
    expected = sum(probability**2 for probability in workload(exponent=1.0).probabilities())
    assert repeats / len(requests) == pytest.approx(expected, rel=0.06)


def test_without_skew_every_location_has_the_order_of_the_models() -> None:
    assert {workload(location_skew=0.0).ranking(location) for location in LOCATIONS} == {MODELS}


def test_rankings_are_permutations_whatever_the_skew() -> None:
    for skew in (0.0, 0.3, 1.0):
        assert all(set(workload(location_skew=skew).ranking(location)) == set(MODELS) for location in LOCATIONS)


def test_scores_of_two_locations_correlate_by_one_minus_the_skew() -> None:
    many = {"models": tuple(f"m{number}" for number in range(500)), "locations": tuple("abcdef")}
    for skew in (0.25, 0.5, 0.75, 1.0):
        # Spearman's coefficient of two normal variables whose correlation is 1 - skew.
        expected = 6 / math.pi * math.asin((1 - skew) / 2)
        assert agreement(workload(**many, location_skew=skew)) == pytest.approx(expected, abs=0.06)


def test_the_requests_of_a_location_follow_its_own_ranking() -> None:
    stream = workload(exponent=1.4, location_skew=1.0)
    requests = take(stream, 30_000)
    for location in LOCATIONS:
        counted = Counter(request.model_id for request in requests if request.location == location)
        assert [model for model, _ in counted.most_common(3)] == list(stream.ranking(location)[:3])


def test_poisson_gaps_have_mean_and_deviation_of_the_exponential() -> None:
    arrivals = [request.arrival_s for request in take(workload(rate_per_s=50.0), 30_000)]
    gaps = [after - before for before, after in pairwise(arrivals)]
    mean = sum(gaps) / len(gaps)
    deviation = math.sqrt(sum((gap - mean) ** 2 for gap in gaps) / len(gaps))
    assert mean == pytest.approx(1 / 50, rel=0.03)
    assert deviation == pytest.approx(mean, rel=0.03)


def test_even_arrivals_do_not_drift() -> None:
    arrivals = [request.arrival_s for request in take(workload(rate_per_s=3.0, arrivals="even"), 3_001)]
    assert arrivals[0] == 0.0
    assert arrivals[3_000] == 1_000.0


def test_same_seed_same_stream() -> None:
    assert take(workload(location_skew=0.5), 1_000) == take(workload(location_skew=0.5), 1_000)
    assert take(workload(seed=1), 100) != take(workload(seed=2), 100)


def test_the_stream_starts_again_for_every_reader() -> None:
    stream = workload()
    assert take(stream, 100) == take(stream, 100)


def test_the_stream_of_a_seed_stays_what_it_was() -> None:
    requests = take(workload(location_skew=0.5, arrivals="even"), 6)
    assert [(request.location, request.model_id) for request in requests] == [
        ("virginia", "m1"),
        ("virginia", "m10"),
        ("tokyo", "m5"),
        ("paris", "m1"),
        ("paris", "m10"),
        ("paris", "m17"),
    ]


def test_arrivals_do_not_change_the_models() -> None:
    slow, fast = take(workload(arrivals="even"), 500), take(workload(rate_per_s=100.0), 500)
    assert [(r.location, r.model_id) for r in slow] == [(r.location, r.model_id) for r in fast]


def test_another_location_does_not_change_the_popularity_at_the_others() -> None:
    skewed = {"location_skew": 0.7}
    assert workload(**skewed).ranking("tokyo") == workload(locations=(*LOCATIONS, "oslo"), **skewed).ranking("tokyo")


def test_with_one_model_all_requests_are_for_it() -> None:
    assert {request.model_id for request in take(workload(models=("only",)), 50)} == {"only"}


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"models": ()}, "models must not be empty"),
        ({"models": ("a", "a")}, r"models must be distinct, not \('a', 'a'\)"),
        ({"locations": ()}, "locations must not be empty"),
        ({"exponent": -0.1}, "exponent must be finite and not negative, not -0.1"),
        ({"exponent": math.nan}, "exponent must be finite"),
        ({"location_skew": 1.1}, "location_skew must be from 0 to 1, not 1.1"),
        ({"location_skew": math.nan}, "location_skew must be from 0 to 1"),
        ({"rate_per_s": 0.0}, "rate_per_s must be finite and positive, not 0.0"),
        ({"arrivals": "bursty"}, "arrivals must be one of even, poisson, gamma, not 'bursty'"),
        ({"cv": 0.0}, "cv must be from 0.001 to 100, not 0.0"),
    ],
)
def test_bad_arguments_are_named(changes: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        workload(**changes)
