"""Which of several holders is primary for a model, so that not all of them evict it because others hold it.

Every worker says in its reports which models it is primary for. Holders are ranked by rendezvous hashing of model and
replica. A worker is primary for a model unless enough replicas that rank before it report to be. So a copy is a
duplicate only if another worker has *reported* to be primary: an old view can be wrong about holders, but as long as
the others are up to date, one of them keeps the model. Losing a primary copy costs a worker a whole load, as if it were
the last copy; losing a duplicate costs a load or the latency to the next holder, whichever is less.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterable, Mapping
from functools import lru_cache

from serve_app.core.cluster.reports import WorkerReport


@lru_cache(maxsize=1 << 16)
def rendezvous_rank(model_id: str, replica: str) -> int:
    """The rank of a holder of a model; the lowest one is primary."""
    return int.from_bytes(hashlib.blake2b(f"{model_id} {replica}".encode(), digest_size=8).digest())


def primaries_at(
    replica: str,
    location: str,
    held: Collection[str],
    others: Iterable[WorkerReport],
    min_copies: Mapping[str, int],
) -> frozenset[str]:
    """The models that a worker is primary for.

    Each model has as many primary copies as its ``min_copies`` say, at least one, at different locations first.

    Args:
        replica: the worker's replica id; its own report among ``others`` is left out.
        location: where it is.
        held: its models.
        others: the last reports, as far as it knows.
        min_copies: models of which there must be several copies.
    """
    primaries: dict[str, list[tuple[int, str]]] = {}
    mine = frozenset(held)
    for report in others:
        if report.replica != replica and not report.leaving:
            for model_id in report.primary_for & mine:
                primaries.setdefault(model_id, []).append((rendezvous_rank(model_id, report.replica), report.location))
    spare = {
        model_id
        for model_id, known in primaries.items()
        if _ahead((rendezvous_rank(model_id, replica), location), known) >= max(1, min_copies.get(model_id, 1))
    }
    return mine - spare


def _ahead(own: tuple[int, str], others: list[tuple[int, str]]) -> int:
    """The number of copies that rank before this one.

    The best copy of each location ranks before every second copy; otherwise the hash decides.
    """
    firsts: dict[str, tuple[int, str]] = {}
    for primary in sorted([own, *others]):
        firsts.setdefault(primary[1], primary)
    return sorted([own, *others], key=lambda primary: (firsts[primary[1]] is not primary, primary)).index(own)


class PrimaryTracker:
    """The primary copies of one worker: what it reports, and which copies it treats as last ones.

    It treats as duplicates only copies that it has *reported* not to be primary for, so that the others know.

    Args:
        replica: the worker's replica id.
        location: where it is.
        min_copies: models of which there must be several copies.

    Attributes:
        primary_for: as of the last ``update``.
    """

    def __init__(self, replica: str, location: str, min_copies: Mapping[str, int] | None = None) -> None:
        self._replica, self._location = replica, location
        self._min_copies = min_copies or {}
        self._seen: frozenset[str] = frozenset()
        self._reported: frozenset[str] = frozenset()
        self.primary_for: frozenset[str] = frozenset()

    def report(self, held: Collection[str]) -> frozenset[str]:
        """The models to report as primary; models that have come since ``update`` are among them."""
        self._reported = self.primary_for.intersection(held) | (frozenset(held) - self._seen)
        return self._reported

    def update(self, held: Collection[str], others: Iterable[WorkerReport]) -> frozenset[str]:
        """Decide again what to be primary for; returns the copies that count as last ones."""
        self._seen = frozenset(held)
        self.primary_for = primaries_at(self._replica, self._location, held, others, self._min_copies)
        return self.primary_for | self._reported.intersection(held)

    def required(self, last_copies: Iterable[str]) -> list[str]:
        """The models among them that need a number of copies, those that need most first."""
        named = [model_id for model_id in last_copies if self._min_copies.get(model_id, 0) > 0]
        return sorted(named, key=lambda model_id: (-self._min_copies[model_id], model_id))
