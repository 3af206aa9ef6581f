"""A trace split over locations: users stay at a location as far as skew says, and load follows the weights."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import numpy as np
import pytest

from serve_app.workload.locations import jensen_shannon_bits, split
from serve_app.workload.sessions import Sessions
from serve_app.workload.trace import Trace, column
from serve_app.workload.zipf import ZipfWorkload

SESSIONS = [Sessions(seed=seed).trace() for seed in range(4)]


def where(trace: Trace) -> Any:
    assert trace.location is not None
    return column(trace.location)


def homes(trace: Trace) -> dict[int, set[int]]:
    """The locations of every source."""
    found = defaultdict(set)
    for source, location in zip(trace.source, where(trace), strict=True):
        found[source].add(int(location))
    return found


def divergence_bits(skew: float) -> float:
    return float(np.mean([jensen_shannon_bits(split(stream, 4, seed=1, skew=skew)) for stream in SESSIONS]))


def test_locations_are_numbered_and_nothing_else_changes() -> None:
    before, after = SESSIONS[0], split(SESSIONS[0], 4, seed=1)
    assert after.locations == ("loc0", "loc1", "loc2", "loc3")
    assert set(where(after)) == {0, 1, 2, 3}
    for name in ("name", "models", "arrival_s", "model", "source"):
        assert getattr(after, name) == getattr(before, name)


def test_a_user_stays_at_one_location() -> None:
    assert {len(found) for found in homes(split(SESSIONS[0], 4, seed=1)).values()} == {1}


def test_without_skew_a_users_requests_come_from_everywhere() -> None:
    random = homes(split(SESSIONS[0], 4, seed=1, skew=0.0))
    often = [source for source, times in zip(*np.unique(SESSIONS[0].source, return_counts=True), strict=True)
             if times >= 50]  # fmt: skip
    assert often
    assert all(len(random[source]) == 4 for source in often)


def test_skew_is_the_share_of_requests_from_home() -> None:
    home, half = (where(split(SESSIONS[0], 4, seed=1, skew=skew)) for skew in (1.0, 0.5))
    # A quarter of those that come from anywhere come from home at random.
    assert (home == half).mean() == pytest.approx(0.5 + 0.5 / 4, abs=0.02)


def test_users_make_locations_as_different_as_recorded_ones_and_a_random_split_does_not() -> None:
    # Measured: .061 bit with users who stay, .005 bit with a random split.
    assert divergence_bits(1.0) == pytest.approx(0.061, abs=0.012)
    assert divergence_bits(0.0) == pytest.approx(0.004, abs=0.001)


def test_the_more_skew_the_more_different_locations_are() -> None:
    divergences = [divergence_bits(skew) for skew in (0.0, 0.25, 0.5, 0.75, 1.0)]
    assert divergences == sorted(divergences)


@pytest.mark.parametrize("skew", [0.0, 1.0])
def test_load_follows_the_weights(skew: float) -> None:
    stream = ZipfWorkload(models=("a", "b"), locations=("x",)).trace(40_000)
    load = np.bincount(where(split(stream, 5, seed=1, skew=skew, weights=(23, 7, 1, 5, 3))))
    assert load / load.sum() == pytest.approx(np.array([23, 7, 1, 5, 3]) / 39, abs=0.01)


def test_weights_are_repeated_for_further_locations() -> None:
    stream = ZipfWorkload(models=("a", "b"), locations=("x",)).trace(40_000)
    load = np.bincount(where(split(stream, 4, seed=1, weights=(3, 1))))
    assert load / load.sum() == pytest.approx([3 / 8, 1 / 8, 3 / 8, 1 / 8], abs=0.01)


def test_a_trace_keeps_its_own_locations_by_default() -> None:
    stream = ZipfWorkload(models=("a", "b"), locations=("x", "y")).trace(100)
    assert split(stream, None, seed=1) is stream
    assert split(stream, 3, seed=1).locations == ("loc0", "loc1", "loc2")


def test_a_seed_always_gives_the_same_split() -> None:
    one, again, other = (split(SESSIONS[0], 4, seed=seed) for seed in (1, 1, 2))
    assert one.location == again.location != other.location


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"locations": 0}, "locations must be at least 1, not 0"),
        ({"skew": 1.5}, "skew must be from 0 to 1, not 1.5"),
        ({"weights": ()}, "weights must be positive and finite"),
        ({"weights": (1, 0)}, "weights must be positive and finite"),
    ],
)
def test_bad_arguments_are_named(changes: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        split(SESSIONS[0], **{"locations": 2, "seed": 1, **changes})
