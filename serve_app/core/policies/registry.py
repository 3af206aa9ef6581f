"""All eviction policies that can serve, by name.

A policy never owns a cache and never evicts. ``ModelCache`` calls its hooks and asks for ``utility``; the model with
the lowest utility leaves first. To add one: write the class, add a line to ``POLICIES``.
"""

from __future__ import annotations

import inspect
import random
from collections.abc import Callable

from serve_app.core.policies.base import EvictionPolicy
from serve_app.core.policies.classic import BeladyAmOnline, Fifo, Gdsf, Lfu, LoadTime, Lru, ModelMesh, Random
from serve_app.core.policies.edgeserve import EdgeServe

POLICIES: dict[str, Callable[..., EvictionPolicy]] = {
    "random": Random,
    "fifo": Fifo,
    "lru": Lru,
    "lfu": Lfu,
    "gdsf": Gdsf,
    "load-time": LoadTime,
    "modelmesh": ModelMesh,
    "belady-am-online": BeladyAmOnline,
    "edgeserve": EdgeServe,
}


#: Policies that know the future: only a simulator can offer them one.
ORACLES = ("belady", "belady-am")


def make_policy(name: str, rng: random.Random, **parameters: float) -> EvictionPolicy:
    """A fresh policy by its name in ``POLICIES``.

    Raises:
        ValueError: no such policy, or a parameter that it does not take.
    """
    taken = policy_parameters(name)
    for unknown in sorted(parameters.keys() - set(taken)):
        raise ValueError(f"policy {name!r} does not take {unknown}; it takes {', '.join(taken) or 'no parameters'}")
    return POLICIES[name](rng, **parameters)


def policy_parameters(name: str) -> tuple[str, ...]:
    """The parameters that a policy takes beside its random generator.

    Raises:
        ValueError: no such policy.
    """
    if name in ORACLES:
        raise ValueError(f"policy {name!r} knows the future: it exists in edgeserve simulate only; use edgeserve")
    if name not in POLICIES:
        raise ValueError(f"unknown policy {name!r}; there are {', '.join(POLICIES)}")
    return tuple(inspect.signature(POLICIES[name]).parameters)[1:]
