"""Small workloads on which every policy has something to decide, and how the tests run the command."""

from __future__ import annotations

from array import array
from collections.abc import Callable

from click.testing import Result

from serve_app.core.catalog import ModelProfile
from serve_app.simulator.scenario import Workload
from serve_app.workload.trace import Trace

SMALL = "zipf:models=12&requests=2000&rate=0.2"

Simulate = Callable[..., Result]


def workload(models: str, *, locations: str | None = None, sizes: dict[str, int] | None = None) -> Workload:
    """One request a second for the models of a string, a letter each; executions take 1 s, loads 2 s.

    ``locations`` has a digit for every request: where it comes from.
    """
    names = tuple(sorted(set(models)))
    return Workload(
        trace=Trace(
            name="letters",
            models=names,
            locations=("local",) if locations is None else tuple(f"loc{digit}" for digit in sorted(set(locations))),
            arrival_s=array("d", range(len(models))),
            model=array("I", (names.index(model) for model in models)),
            source=array("I", range(len(models))),
            location=None if locations is None else array("I", (int(digit) for digit in locations)),
        ),
        profiles=tuple(
            ModelProfile(model_id=name, size_bytes=(sizes or {}).get(name, 10), load_s=2.0, exec_s=1.0)
            for name in names
        ),
        seed=0,
    )
