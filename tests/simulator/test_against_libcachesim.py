"""The classical policies hit and miss exactly where the implementation of libCacheSim does.

Sizes are distinct, so that GDSF knows no ties. Every load takes the same time, so that its cost is 1 as in libCacheSim,
in the unit that libCacheSim counts in: so the sums of floats are the same as well.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from serve_app.core.cache.decisions import Hit, Load
from serve_app.core.cache.events import LoadEnded
from serve_app.core.cache.model_cache import ModelCache
from serve_app.core.catalog import ModelProfile
from serve_app.core.policies.base import EvictionPolicy
from serve_app.core.policies.registry import make_policy
from serve_app.simulator.oracles import Belady, next_uses
from serve_app.workload.zipf import ZipfWorkload

libcachesim = pytest.importorskip("libcachesim")

MODELS, REQUESTS = 60, 4000
#: Sizes go up to 1000: the first capacities hold one or two models, and some not even one; the last nearly all.
CAPACITIES = (300, 900, 1200, 3000, 10_000, 25_000)
_NEVER = 2**63 - 1


class Stream:
    def __init__(self, seed: int) -> None:
        trace = ZipfWorkload(
            models=tuple(f"m{number}" for number in range(MODELS)), locations=("local",), exponent=0.8, seed=seed
        ).trace(REQUESTS)
        rng = random.Random(seed)
        sizes = rng.sample(range(1, 1001), len(trace.models))
        self.arrival_s: Sequence[float] = trace.arrival_s
        self.model: Sequence[int] = trace.model
        self.next_use = next_uses(trace.model)
        self.profiles = [
            ModelProfile(model_id=name, size_bytes=size, load_s=1e6, exec_s=0.1)
            for name, size in zip(trace.models, sizes, strict=True)
        ]


def our_hits(stream: Stream, policy: EvictionPolicy, capacity: int) -> list[bool]:
    cache = ModelCache(capacity_bytes=capacity, policy=policy)
    hits = []
    for now, number in zip(stream.arrival_s, stream.model, strict=True):
        profile = stream.profiles[number]
        answer = cache.request(profile, now)
        hits.append(isinstance(answer, Hit))
        if isinstance(answer, Load):
            cache.handle(LoadEnded(profile.model_id), now)
        if isinstance(answer, Hit | Load):
            cache.finish(profile.model_id, now)
    return hits


def their_hits(stream: Stream, cache: Any, get: Callable[[Any, Any], bool]) -> list[bool]:
    hits = []
    for position, (number, following) in enumerate(zip(stream.model, stream.next_use, strict=True)):
        size = stream.profiles[number].size_bytes
        if size > cache.cache_size:
            # It would say the same, with a warning on the terminal.
            hits.append(False)
            continue
        request = libcachesim.Request(
            obj_id=number,
            obj_size=size,
            clock_time=position,
            next_access_vtime=_NEVER if following == math.inf else int(following),
        )
        hits.append(get(cache, request))
    return hits


def whole(cache: Any, request: Any) -> bool:
    return bool(cache.get(request))


def evict_before_insert(cache: Any, request: Any) -> bool:
    """A model has to be in memory to answer: its request may not be turned away, as ``get`` of its GDSF may do.

    That inserts first and evicts then, the new object among the others, as Cherkasova writes. Its parts in the order of
    Cao and Irani's GreedyDual-Size, on which GDSF rests, are what is left to compare with.
    """
    if cache.find(request, True):
        return True
    while cache.get_occupied_byte() + request.obj_size > cache.cache_size:
        cache.evict(request)
    cache.insert(request)
    return False


@pytest.fixture(scope="module", params=range(3))
def stream(request: pytest.FixtureRequest) -> Stream:
    return Stream(request.param)


@pytest.mark.parametrize("capacity", CAPACITIES)
@pytest.mark.parametrize(
    ("name", "theirs", "get"),
    [
        ("lru", "LRU", whole),
        ("fifo", "FIFO", whole),
        ("gdsf", "GDSF", evict_before_insert),
        ("belady", "Belady", whole),
    ],
)
def test_hits_and_misses_are_those_of_libcachesim(
    stream: Stream, name: str, theirs: str, get: Callable[[Any, Any], bool], capacity: int
) -> None:
    policy = Belady(stream.next_use) if name == "belady" else make_policy(name, random.Random(0))
    ours = our_hits(stream, policy, capacity)
    # Sizes of the objects alone, without the metadata of libCacheSim.
    other = getattr(libcachesim, theirs)(capacity, hashpower=12, consider_obj_metadata=False)
    assert 0 < sum(ours) < REQUESTS
    assert ours == their_hits(stream, other, get)
