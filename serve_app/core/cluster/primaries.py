"""Which of several holders keep a model, so that not all of them let it go because others have it.

Every worker says in its reports which of its models it keeps. Holders are ranked by a hash of model and replica. A
worker keeps a model unless it has heard enough others who rank before it say that they do. So a copy is a duplicate
only where somebody else has *said* to keep it: whoever acts on an old view can be wrong about who holds what, but as
long as the others are up to date, one of them keeps it. To lose what it keeps costs a worker a whole load, as if it
were the last copy; to lose the others costs a load or the way to the next holder, whichever is less.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterable, Mapping
from functools import lru_cache

from serve_app.core.cluster.reports import WorkerReport


@lru_cache(maxsize=1 << 16)
def rendezvous_rank(model_id: str, replica: str) -> int:
    """Of two holders of a model, the one with the lower rank keeps it."""
    return int.from_bytes(hashlib.blake2b(f"{model_id} {replica}".encode(), digest_size=8).digest())


def primaries_at(
    replica: str,
    location: str,
    held: Collection[str],
    others: Iterable[WorkerReport],
    min_copies: Mapping[str, int],
) -> frozenset[str]:
    """Which of the models that a worker holds it keeps.

    Of each model there are as many keepers as its ``min_copies`` say, at least one, on different locations first.

    Args:
        replica: the worker; what it says itself in ``others`` is left out.
        location: where it is.
        held: its models.
        others: the last reports, as far as it knows.
        min_copies: models of which there must be several.
    """
    keepers: dict[str, list[tuple[int, str]]] = {}
    mine = frozenset(held)
    for report in others:
        if report.replica != replica and not report.leaving:
            for model_id in report.primary_for & mine:
                keepers.setdefault(model_id, []).append((rendezvous_rank(model_id, report.replica), report.location))
    spare = {
        model_id
        for model_id, known in keepers.items()
        if _turn((rendezvous_rank(model_id, replica), location), known) >= max(1, min_copies.get(model_id, 1))
    }
    return mine - spare


def _turn(own: tuple[int, str], others: list[tuple[int, str]]) -> int:
    """How many of the others come before: those of a lower rank, but the second at one location after all firsts."""
    firsts: dict[str, tuple[int, str]] = {}
    for keeper in sorted([own, *others]):
        firsts.setdefault(keeper[1], keeper)
    return sorted([own, *others], key=lambda keeper: (firsts[keeper[1]] is not keeper, keeper)).index(own)


class PrimaryTracker:
    """One worker's part: what it says to keep, and what it treats as if there were no other copy.

    It treats as a duplicate only what it has *reported* not to keep, so that the others know.

    Args:
        replica: the worker.
        location: where it is.
        min_copies: models of which there must be several.
    """

    def __init__(self, replica: str, location: str, min_copies: Mapping[str, int] | None = None) -> None:
        self._replica, self._location = replica, location
        self._min_copies = min_copies or {}
        self._seen: frozenset[str] = frozenset()
        self._reported: frozenset[str] = frozenset()
        self.primary_for: frozenset[str] = frozenset()

    def report(self, held: Collection[str]) -> frozenset[str]:
        """What the worker says to keep, as it reports; what has just come is kept until the next look."""
        self._reported = self.primary_for.intersection(held) | (frozenset(held) - self._seen)
        return self._reported

    def update(self, held: Collection[str], others: Iterable[WorkerReport]) -> frozenset[str]:
        """Decide anew what to keep; returns what must not be treated as a duplicate."""
        self._seen = frozenset(held)
        self.primary_for = primaries_at(self._replica, self._location, held, others, self._min_copies)
        return self.primary_for | self._reported.intersection(held)

    def required(self, guarded: Iterable[str]) -> list[str]:
        """Those of them of which there must be a number of copies; those of which there must be most come first."""
        named = [model_id for model_id in guarded if self._min_copies.get(model_id, 0) > 0]
        return sorted(named, key=lambda model_id: (-self._min_copies[model_id], model_id))
