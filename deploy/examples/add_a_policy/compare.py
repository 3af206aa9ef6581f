"""An eviction policy of your own, compared with others on one request stream; without Ray or torch.

Run it from anywhere::

    python deploy/examples/add_a_policy/compare.py
    python deploy/examples/add_a_policy/compare.py --trace sessions:days=2 --capacity 10% --seed 3

To serve with the policy, move the class to ``serve_app/core/policies`` and the line of ``POLICIES`` to
``serve_app/core/policies/registry.py``; ``serve_app/docs/add-a-policy.md`` says what else.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Sequence

from serve_app.core.catalog import ModelProfile
from serve_app.core.policies.base import EvictionPolicy
from serve_app.core.policies.registry import POLICIES
from serve_app.simulator.result_row import ResultRow
from serve_app.simulator.runner import ExperimentPlan, ReplaySpec, run
from serve_app.simulator.scenario import PolicyChoice, make_workload, parse_capacities

NAME = "recent-cost"


class RecentCost(EvictionPolicy):
    """Evicts the model of which a request would cost least per byte, if requests come as they came lately.

    Each request adds 1 to a model's count, and all counts halve in ``half_life_s``. Instead of lowering all counts all
    the time, new requests count for more and more: only the order of utilities matters.
    """

    def __init__(self, _rng: random.Random, *, half_life_s: float = 600.0) -> None:
        if half_life_s <= 0:
            raise ValueError(f"half_life_s must be positive, not {half_life_s}")
        self._half_life_s = half_life_s
        self._began_s: float | None = None
        self._counts: dict[str, float] = {}

    def on_request(self, model: ModelProfile, now: float) -> None:
        """Count the request, for more than those before it."""
        began_s = self._began_s
        if began_s is None or now - began_s > 500 * self._half_life_s:
            # 2.0 ** 500 is near enough to the largest number: start again from what the counts are worth now.
            scale = 0.0 if began_s is None else 2.0 ** -((now - began_s) / self._half_life_s)
            self._counts = {name: count * scale for name, count in self._counts.items()}
            self._began_s = began_s = now
        weight = 2.0 ** ((now - began_s) / self._half_life_s)
        self._counts[model.model_id] = self._counts.get(model.model_id, 0.0) + weight

    def utility(self, model: ModelProfile, now: float) -> float:
        """Seconds of loads that the model's memory saves, per byte."""
        return self._counts.get(model.model_id, 0.0) * model.load_s / model.size_bytes


def compare(trace: str, capacity: str, seed: int, policies: Sequence[str]) -> list[ResultRow]:
    """Replay a stream through every policy; one row for each."""
    POLICIES[NAME] = RecentCost
    plan = ExperimentPlan(
        workloads=(make_workload(trace=trace, seed=seed),),
        replays=tuple(
            ReplaySpec(policy=PolicyChoice(label=name, name=name), capacity=size)
            for name in policies
            for size in parse_capacities([capacity])
        ),
    )
    # In this process: others would not know of the line in POLICIES.
    return list(run(plan, jobs=1))


def main(arguments: Sequence[str] | None = None) -> None:
    """Print load over exec, hits and evictions of every policy."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument(
        "--trace", default="azure-like:functions=100&minutes=240", help="as `edgeserve simulate` takes it"
    )
    parser.add_argument("--capacity", default="25%", help="memory, such as 2GiB or 25%%")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    print(f"{'policy':<18} {'load/exec':>9} {'hits':>7} {'evictions':>9}")
    for row in compare(options.trace, options.capacity, options.seed, (NAME, "lru", "gdsf", "edgeserve")):
        print(f"{row.policy:<18} {row.load_over_exec or 0:>9.2%} {row.hits / row.requests:>7.1%} {row.evictions:>9}")


if __name__ == "__main__":
    main()
